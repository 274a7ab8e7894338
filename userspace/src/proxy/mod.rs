//! Carrying what the kernel part does not let through directly: out of a pod, into a pod, through tunnels or in plaintext.
//!
//! Invariants: a connection is relayed only with a permit of policy at its destination; what fails is reset, never ended as if it
//! were complete; everything of a pod runs on one thread, both halves of a connection always. `node` starts a [`Proxy`] and hands
//! it pods.

mod arrival;
mod budget;
mod deadline;
mod dial;
pub mod hbone;
mod hbone_server;
mod inbound;
mod knobs;
mod open;
mod outbound;
mod passthrough;
mod pod;
pub mod relay;
mod report;
mod route;
pub mod tls;
mod workers;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

pub use knobs::ProxyKnobs;
pub use open::{LaterPolicies, OpenConnections};
pub use pod::PodProxy;
pub use workers::Workers;

use crate::{
    enrol::LocalPod, identity::Certificates, mesh::Store, policy::Evaluation, telemetry::Telemetry,
    xds::Demand,
};

/// Decides about connections to pods of this node on behalf of the kernel part, which remembers it.
pub trait Judge: Send + Sync {
    /// `None` when the destination is not a pod of this node that may be reached directly.
    ///
    /// `source_ip` is the address that the connection comes from.
    fn judge(
        &self,
        source: &LocalPod,
        source_ip: std::net::IpAddr,
        destination: std::net::SocketAddr,
    ) -> Option<Evaluation>;
}

/// What a request inside a tunnel may name, with any port but ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Authority {
    /// The pod's own addresses.
    #[default]
    OwnAddress,
    /// Those, or what the pod is the waypoint of; the request leads to the pod all the same, at the port that is named.
    OrBehindWaypoint,
}

/// What every connection needs.
pub struct Context {
    pub mesh: Arc<Store>,
    /// Where the mesh holds only what was asked for.
    pub demand: Option<Demand>,
    /// The network of this node.
    pub network: Arc<str>,
    pub certificates: Certificates,
    pub judge: Arc<dyn Judge>,
    pub telemetry: Arc<Telemetry>,
    pub open: Arc<OpenConnections>,
    /// Cancelled when a part of the proxy has ended that must not.
    pub failed: CancellationToken,
    pub server: hbone::ServerSettings,
    /// What requests to this node's pods may name.
    pub authority: Authority,
    /// What peers' certificates are looked at with.
    pub peers: tls::PeerChecks,
    pub knobs: ProxyKnobs,
}
