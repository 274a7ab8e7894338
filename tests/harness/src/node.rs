//! A node: the namespace of the agent and the host's programs, a bridge for its pods, and a cgroup subtree.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result, ensure};

use crate::agent::{Agent, AgentOptions};
use crate::announce::announce;
use crate::capture::Capture;
use crate::cgroup::Cgroup;
use crate::fabric::{
    BRIDGE, Fabric, PREFIX_V4, PREFIX_V6, Told, address_v4, address_v6, believe_at_once,
    bridge_lines,
};
use crate::ip;
use crate::netns::Netns;
use crate::pod::{Pod, PodOptions};
use crate::process::Launch;
use crate::run::RunId;
use crate::sockets::{SocketEntry, socket_table};

/// The node's own host number; pods begin at 10.
const OWN_HOST: u8 = 1;
const FIRST_POD: u8 = 10;
const LAST_POD: u8 = 254;

/// A node. Clones are the same node.
#[derive(Clone, Debug)]
pub struct Node {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) run: RunId,
    name: String,
    number: u8,
    ipv6: bool,
    netns: Netns,
    cgroup: Cgroup,
    agent_cgroup: Cgroup,
    host_cgroup: Cgroup,
    pods_cgroup: Cgroup,
    directory: PathBuf,
    shared_directory: PathBuf,
    pin_directory: PathBuf,
    next_pod: AtomicU8,
    pub(crate) control_plane: Told,
}

impl Node {
    pub(crate) fn create(fabric: &Fabric, number: u8) -> Result<Self> {
        let name = format!("n{number}");
        let path = fabric.cgroup().path().join(&name);
        let cgroup = Cgroup::create(path.clone())?;
        let agent_cgroup = Cgroup::create(path.join("agent"))?;
        let host_cgroup = Cgroup::create(path.join("host"))?;
        let pods_cgroup = Cgroup::create(path.join("pods"))?;
        let directory = fabric.directory().join(&name);
        std::fs::create_dir(&directory)
            .with_context(|| format!("making {}", directory.display()))?;

        let netns = Netns::create(fabric.run.netns(&name))?;
        ip::batch(
            Some(fabric.netns().name()),
            &[
                format!(
                    "link add {name} type veth peer name up0 netns {}",
                    netns.name()
                ),
                format!("link set {name} master {BRIDGE} up"),
            ],
        )?;
        let mut lines = bridge_lines(number);
        lines.push(believe_at_once(BRIDGE));
        lines.push(format!("link set up0 master {BRIDGE} up"));
        lines.push(format!(
            "address add {}/{PREFIX_V4} dev {BRIDGE}",
            address_v4(number, OWN_HOST)
        ));
        if fabric.ipv6() {
            lines.push(format!(
                "address add {}/{PREFIX_V6} dev {BRIDGE} nodad",
                address_v6(number, OWN_HOST)
            ));
        }
        ip::batch(Some(netns.name()), &lines)?;
        announce(
            (&netns, BRIDGE),
            (fabric.netns(), BRIDGE),
            address_v4(number, OWN_HOST),
        )?;
        let inner = Inner {
            run: fabric.run.clone(),
            number,
            ipv6: fabric.ipv6(),
            netns,
            cgroup,
            agent_cgroup,
            host_cgroup,
            pods_cgroup,
            directory,
            shared_directory: fabric.directory().to_owned(),
            pin_directory: fabric.pin_directory().join(&name),
            next_pod: AtomicU8::new(FIRST_POD),
            control_plane: Arc::clone(&fabric.control_plane),
            name,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Adds a pod with the next address.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        self.pod_with(name, PodOptions::default())
    }

    /// Adds a pod, with an address of the caller's choice if the options name one.
    pub fn pod_with(&self, name: &str, options: PodOptions) -> Result<Pod> {
        let host = self.inner.next_pod.fetch_add(1, Ordering::Relaxed);
        ensure!(
            (FIRST_POD..=LAST_POD).contains(&host),
            "node {} has no pod address left",
            self.inner.name
        );
        Pod::create(self, name, host, options)
    }

    /// Starts an agent on this node.
    pub fn start_agent(&self, options: AgentOptions) -> Result<Agent> {
        Agent::start(self, options)
    }

    /// A program in the node's namespace and the agent's cgroup.
    pub fn agent_command(&self, program: impl AsRef<Path>) -> Launch {
        Launch::new(
            program.as_ref(),
            &format!("{}/agent", self.inner.name),
            &self.inner.netns,
            &self.inner.agent_cgroup,
        )
    }

    /// A program of the node itself, outside all pods: a kubelet, an operator's shell.
    pub fn command(&self, program: impl AsRef<Path>) -> Launch {
        Launch::new(
            program.as_ref(),
            &self.inner.name,
            &self.inner.netns,
            &self.inner.host_cgroup,
        )
    }

    /// A program of a pod that shares the node's network: in its namespace, but in a cgroup of a pod.
    pub fn host_pod_command(&self, program: impl AsRef<Path>) -> Launch {
        Launch::new(
            program.as_ref(),
            &format!("{}/host-pod", self.inner.name),
            &self.inner.netns,
            &self.inner.pods_cgroup,
        )
    }

    /// Runs a closure on a thread in the node's namespace (see [`Netns::enter`]).
    pub fn in_netns<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.inner.netns.enter(work)
    }

    /// Watches the node's bridge: all that passes between its pods, and to and from the fabric.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.inner.netns, BRIDGE)
    }

    /// The TCP sockets in the node's namespace.
    pub fn sockets(&self) -> Result<Vec<SocketEntry>> {
        socket_table(&self.inner.netns)
    }

    /// `n1`, `n2` and so on; also what workloads call their node.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The node's IPv4 address.
    pub fn address(&self) -> IpAddr {
        IpAddr::V4(self.address_v4())
    }

    pub(crate) fn address_v4(&self) -> Ipv4Addr {
        address_v4(self.inner.number, OWN_HOST)
    }

    /// The node's IPv6 address, if the fabric has them.
    pub fn address_v6(&self) -> Option<Ipv6Addr> {
        self.inner
            .ipv6
            .then(|| address_v6(self.inner.number, OWN_HOST))
    }

    /// The cgroup above those of the pods.
    pub fn pods_cgroup(&self) -> &Cgroup {
        &self.inner.pods_cgroup
    }

    pub(crate) fn number(&self) -> u8 {
        self.inner.number
    }

    /// The node's namespace.
    pub fn netns(&self) -> &Netns {
        &self.inner.netns
    }

    /// The node's cgroup, above the agent's, the host's and the pods': the agent's `CULVERT_CGROUP_ROOT`.
    pub fn cgroup(&self) -> &Cgroup {
        &self.inner.cgroup
    }

    /// The node's own files.
    pub fn directory(&self) -> &Path {
        &self.inner.directory
    }

    /// Files that all nodes of the fabric share.
    pub fn shared_directory(&self) -> &Path {
        &self.inner.shared_directory
    }

    /// Where this node's agent pins programs and maps: its `CULVERT_PIN_DIR`.
    pub fn pin_directory(&self) -> &Path {
        &self.inner.pin_directory
    }
}
