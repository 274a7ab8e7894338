//! The fabric: the namespace and bridge that join the nodes, and the owner of everything made for a test.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, ensure};

use crate::capture::Capture;
use crate::cgroup::{self, Cgroup};
use crate::cleanup::{self, BPFFS};
use crate::ip;
use crate::netns::Netns;
use crate::node::Node;
use crate::run::RunId;

/// The bridge in the fabric's and each node's namespace.
pub const BRIDGE: &str = "br0";
/// All nodes and pods of a fabric share 10.77.0.0/16 (and fd77::/64), on one link.
pub(crate) const PREFIX_V4: u8 = 16;
pub(crate) const PREFIX_V6: u8 = 64;
/// The nodes a fabric may have: their number is an octet of their addresses.
const MOST_NODES: u8 = 250;

/// What agents of the fabric are told, so that they get mesh and certificates from its control plane; nothing while it has none.
pub(crate) type Told = Arc<OnceLock<Vec<(&'static str, String)>>>;

/// What a fabric may be asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct FabricOptions {
    /// Give nodes and pods IPv6 addresses too.
    pub ipv6: bool,
}

/// Nodes, pods and the programs in them. Dropping it ends the programs and removes everything; handles of nodes and
/// pods that are still around are then of no use.
#[derive(Debug)]
pub struct Fabric {
    pub(crate) run: RunId,
    options: FabricOptions,
    netns: Netns,
    cgroup: Cgroup,
    directory: PathBuf,
    nodes: AtomicU8,
    pub(crate) control_plane: Told,
}

impl Fabric {
    /// A fabric without nodes, IPv4 only.
    pub fn new() -> Result<Self> {
        Self::with(FabricOptions::default())
    }

    /// A fabric without nodes.
    pub fn with(options: FabricOptions) -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "namespaces and cgroups need root: run this with sudo"
        );
        let run = RunId::fresh()?;
        cleanup::ensure_bpffs()?;
        cleanup::supervise(&run)?;
        Self::build(run.clone(), options).inspect_err(|_| report(cleanup::remove_run(&run)))
    }

    fn build(run: RunId, options: FabricOptions) -> Result<Self> {
        let directory = Path::new(cleanup::RUN).join(run.directory());
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .with_context(|| format!("making {}", directory.display()))?;
        let cgroup = Cgroup::create(cgroup::root()?.join(run.directory()))?;
        let netns = Netns::create(run.netns("fabric"))?;
        ip::batch(Some(netns.name()), &bridge_lines(0))?;
        Ok(Self {
            run,
            options,
            netns,
            cgroup,
            directory,
            nodes: AtomicU8::new(0),
            control_plane: Told::default(),
        })
    }

    /// Adds a node: `n1`, `n2` and so on.
    pub fn node(&self) -> Result<Node> {
        let number = self.nodes.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        ensure!(
            number <= MOST_NODES,
            "a fabric has room for {MOST_NODES} nodes"
        );
        Node::create(self, number)
    }

    /// Watches all that passes between the nodes.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.netns, BRIDGE)
    }

    /// The id in all names of this fabric.
    pub fn run_id(&self) -> &RunId {
        &self.run
    }

    /// The namespace of the bridge that joins the nodes.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The cgroup above those of all nodes.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A directory for the test's files, root's alone, removed with the fabric.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where agents of this fabric pin their programs and maps. Not made here; removed with the fabric.
    pub fn pin_directory(&self) -> PathBuf {
        Path::new(BPFFS).join(self.run.directory())
    }

    /// Whether pods get IPv6 addresses.
    pub fn ipv6(&self) -> bool {
        self.options.ipv6
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        report(cleanup::remove_run(&self.run));
    }
}

/// A destructor can do no more with an error than show it.
fn report(outcome: Result<()>) {
    if let Err(error) = outcome {
        eprintln!("culvert-harness: {error:#}");
    }
}

/// For the bridge of this node; 0 is the fabric's own.
pub(crate) fn bridge_lines(node: u8) -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        // No spanning tree and no delay: a port forwards as soon as it is up.
        // An address of its own: otherwise it is that of a port, and changes as pods come and go. Whoever talks to the node would go on
        // sending to the one before for many seconds.
        format!(
            "link add {BRIDGE} address 02:77:00:00:00:{node:02x} type bridge forward_delay 0 stp_state 0 mcast_snooping 0"
        ),
        format!("link set {BRIDGE} up"),
    ]
}

/// Lets an address change its owner at any time. Otherwise a neighbour entry is kept for a second, whoever announces
/// himself; the kernel has no default for this outside its first namespace.
pub(crate) fn believe_at_once(interface: &str) -> String {
    format!("ntable change name arp_cache dev {interface} locktime 0")
}

/// Host `host` of node `node`; host 1 is the node itself.
pub(crate) fn address_v4(node: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, node, host)
}

/// The same in IPv6.
pub(crate) fn address_v6(node: u8, host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, u16::from(node), u16::from(host))
}
