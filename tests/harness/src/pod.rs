//! A pod: a namespace with `eth0` on its node's bridge, a cgroup, and programs inside both.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::announce::announce;
use crate::capture::Capture;
use crate::cgroup::{self, Cgroup};
use crate::fabric::{BRIDGE, PREFIX_V4, PREFIX_V6, address_v4, address_v6, believe_at_once};
use crate::ip;
use crate::netns::{self, Netns};
use crate::node::Node;
use crate::process::{Launch, probe_binary};
use crate::sockets::{SocketEntry, socket_table};

const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Names become parts of file names.
const LONGEST_NAME: usize = 63;

/// What a pod may be asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct PodOptions {
    /// An address of the caller's choice, for example one that another pod had.
    pub address: Option<Ipv4Addr>,
    /// The same for IPv6, in a fabric that has it.
    pub address_v6: Option<Ipv6Addr>,
    /// No IPv4 address.
    pub only_ipv6: bool,
}

/// A pod. Clones are the same pod; it lives until [`Pod::remove`] or the end of the fabric.
#[derive(Clone, Debug)]
pub struct Pod {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    node: Node,
    netns: Netns,
    cgroup: Cgroup,
    address: Option<Ipv4Addr>,
    address_v6: Option<Ipv6Addr>,
    port: String,
}

impl Pod {
    pub(crate) fn create(node: &Node, name: &str, host: u8, options: PodOptions) -> Result<Self> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        ensure!(
            !name.is_empty() && name.len() <= LONGEST_NAME && name.bytes().all(plain),
            "pod name `{name}`: up to {LONGEST_NAME} of a-z, 0-9 and -"
        );
        let cgroup = Cgroup::create(node.pods_cgroup().path().join(name))?;
        let netns = Netns::create(node.inner.run.netns(&format!("{}-{name}", node.name())))?;
        let own = || address_v4(node.number(), host);
        let address = (!options.only_ipv6).then(|| options.address.unwrap_or_else(own));
        let own = || address_v6(node.number(), host);
        let address_v6 = node
            .address_v6()
            .map(|_| options.address_v6.unwrap_or_else(own));
        ensure!(
            address.is_some() || address_v6.is_some(),
            "pod {name} has no address: the fabric has no IPv6"
        );
        // The host number is unique on the node, unlike an address the caller chose.
        let port = format!("p{host}");
        ip::batch(
            Some(node.netns().name()),
            &[
                format!(
                    "link add {port} type veth peer name eth0 netns {}",
                    netns.name()
                ),
                format!("link set {port} master {BRIDGE} up"),
            ],
        )?;
        let mut lines = vec!["link set lo up".to_owned(), believe_at_once("eth0")];
        if let Some(address) = address {
            lines.push(add_line(address.into(), "eth0"));
        }
        if let Some(address) = address_v6 {
            lines.push(add_line(address.into(), "eth0"));
        }
        lines.push("link set eth0 up".to_owned());
        // The node does not forward: the route only lets a connect to a service address get as far as the mesh.
        if address.is_some() {
            lines.push(format!("route add default via {}", node.address_v4()));
        }
        if let Some(gateway) = node.address_v6() {
            lines.push(format!("route add default via {gateway}"));
        }
        ip::batch(Some(netns.name()), &lines)?;
        let announced = address.unwrap_or(Ipv4Addr::UNSPECIFIED);
        announce((&netns, "eth0"), (node.netns(), BRIDGE), announced)?;
        let inner = Inner {
            name: name.to_owned(),
            node: node.clone(),
            netns,
            cgroup,
            address,
            address_v6,
            port,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// A program in the pod: in its namespace and its cgroup.
    pub fn command(&self, program: impl AsRef<Path>) -> Launch {
        let label = format!("{}/{}", self.inner.node.name(), self.inner.name);
        Launch::new(
            program.as_ref(),
            &label,
            &self.inner.netns,
            &self.inner.cgroup,
        )
    }

    /// `culvert-probe` in the pod. What it complains of is shown by its last lines, which a backtrace would fill.
    pub fn probe(&self) -> Result<Launch> {
        Ok(self.command(probe_binary()?).env("RUST_BACKTRACE", "0"))
    }

    /// Runs a closure on a thread in the pod's namespace, but not in its cgroup (see [`Netns::enter`]).
    pub fn in_netns<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.inner.netns.enter(work)
    }

    /// Ends the pod's programs and removes its namespace, cgroup and link. A second call does nothing.
    pub fn remove(&self) -> Result<()> {
        cgroup::remove_tree(self.inner.cgroup.path(), KILL_TIMEOUT)?;
        if self.inner.netns.path().exists() {
            // The namespace's end would take the link with it, but some time later.
            ip::batch(
                Some(self.inner.node.netns().name()),
                &[format!("link del {}", self.inner.port)],
            )?;
        }
        netns::delete(self.inner.netns.name())
    }

    /// Watches the pod's `eth0`, both directions.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.inner.netns, "eth0")
    }

    /// The TCP sockets in the pod's namespace.
    pub fn sockets(&self) -> Result<Vec<SocketEntry>> {
        socket_table(&self.inner.netns)
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The node it is on.
    pub fn node(&self) -> &Node {
        &self.inner.node
    }

    /// Its address: IPv4, or IPv6 if it has no other.
    pub fn address(&self) -> IpAddr {
        let v6 = || self.inner.address_v6.unwrap_or(Ipv6Addr::UNSPECIFIED);
        self.inner.address.map_or_else(|| v6().into(), IpAddr::from)
    }

    /// Its IPv6 address, if the fabric has them.
    pub fn address_v6(&self) -> Option<Ipv6Addr> {
        self.inner.address_v6
    }

    /// The addresses it was made with.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let v4 = self.inner.address.map(IpAddr::from);
        v4.into_iter()
            .chain(self.inner.address_v6.map(IpAddr::from))
            .collect()
    }

    /// Its address with a port, as the probe's `--to` takes it.
    pub fn at(&self, port: u16) -> String {
        SocketAddr::new(self.address(), port).to_string()
    }

    /// Its IPv6 address with a port.
    pub fn at_v6(&self, port: u16) -> Result<String> {
        let address = self.inner.address_v6;
        let address = address.with_context(|| format!("{} has no IPv6 address", self.name()))?;
        Ok(SocketAddr::new(address.into(), port).to_string())
    }

    /// Gives it one more address.
    pub fn add_address(&self, address: IpAddr) -> Result<()> {
        ip::batch(Some(self.inner.netns.name()), &[add_line(address, "eth0")])
    }

    /// Gives it one more device on its node's bridge, with an address of its own. What does not ask for it leaves by `eth0`.
    pub fn add_device(&self, device: &str, address: IpAddr) -> Result<()> {
        let (inner, node) = (&self.inner, &self.inner.node);
        let port = format!("{}-{device}", inner.port);
        let pod = inner.netns.name();
        ip::batch(
            Some(node.netns().name()),
            &[
                format!("link add {port} type veth peer name {device} netns {pod}"),
                format!("link set {port} master {BRIDGE} up"),
            ],
        )?;
        ip::batch(
            Some(pod),
            &[
                format!("{} metric 512", add_line(address, device)),
                format!("link set {device} up"),
            ],
        )?;
        let announced = match address {
            IpAddr::V4(address) => address,
            IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
        };
        announce((&inner.netns, device), (node.netns(), BRIDGE), announced)
    }

    /// Its namespace.
    pub fn netns(&self) -> &Netns {
        &self.inner.netns
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.inner.cgroup
    }
}

fn add_line(address: IpAddr, device: &str) -> String {
    match address {
        IpAddr::V4(address) => format!("address add {address}/{PREFIX_V4} dev {device}"),
        IpAddr::V6(address) => format!("address add {address}/{PREFIX_V6} dev {device} nodad"),
    }
}
