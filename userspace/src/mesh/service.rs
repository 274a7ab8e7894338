//! A service: a name and virtual addresses in front of workloads, and the rules to choose among them.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use super::{GatewayAddress, NetworkCidr, PortMap, ServiceName};

/// A service of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Namespace and hostname, unique in the mesh.
    pub id: ServiceName,
    /// The name of the Kubernetes object.
    pub name: Arc<str>,
    /// Its virtual addresses; a range stands for each of its addresses.
    pub vips: Vec<NetworkCidr>,
    /// Its ports.
    pub ports: PortMap,
    /// Identities that its endpoints may have beside their own.
    pub subject_alt_names: Vec<Arc<str>>,
    /// Where there are any, each connection to it passes through one of them first.
    pub waypoints: Vec<WeightedWaypoint>,
    /// How an endpoint is chosen.
    pub load_balancer: LoadBalancer,
    /// Which of its endpoints' addresses may be used.
    pub ip_families: IpFamilies,
    /// Preferred over others of the same address or hostname.
    pub canonical: bool,
}

/// One of a service's waypoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightedWaypoint {
    /// Which one.
    pub gateway: GatewayAddress,
    /// Its share of the service's connections in relation to the other waypoints.
    pub weight: NonZeroU32,
}

impl From<GatewayAddress> for WeightedWaypoint {
    /// The only one.
    fn from(gateway: GatewayAddress) -> Self {
        Self {
            gateway,
            weight: NonZeroU32::MIN,
        }
    }
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadBalancer {
    /// What client and endpoint should share, the most important first.
    pub routing_preferences: Vec<LocalityScope>,
    /// What that means.
    pub mode: LoadBalancerMode,
    /// Whether unhealthy endpoints are chosen.
    pub health_policy: HealthPolicy,
}

/// What a client and an endpoint may share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LocalityScope {
    /// The network.
    Network,
    /// The region.
    Region,
    /// The zone, in the same region.
    Zone,
    /// The subzone, in the same zone.
    Subzone,
    /// The node.
    Node,
    /// The cluster.
    Cluster,
}

/// What routing preferences mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LoadBalancerMode {
    /// Nothing: all endpoints are equal.
    #[default]
    Standard,
    /// Only endpoints that share all of them.
    Strict,
    /// The endpoints that share the most of them.
    Failover,
    /// No choice: the connection goes to the address it was opened to.
    Passthrough,
}

/// Whether unhealthy endpoints are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum HealthPolicy {
    /// They are not.
    #[default]
    OnlyHealthy,
    /// They are like any other.
    AllowAll,
}

/// Which addresses of an endpoint may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum IpFamilies {
    /// Any.
    #[default]
    Automatic,
    /// IPv4.
    Ipv4Only,
    /// IPv6.
    Ipv6Only,
    /// Both.
    Dual,
}

impl Service {
    /// Its namespace.
    pub fn namespace(&self) -> &str {
        self.id.namespace()
    }

    /// The name that clients look up.
    pub fn hostname(&self) -> &str {
        self.id.hostname()
    }
}

impl IpFamilies {
    /// True if this address may be used.
    pub fn allow(self, ip: IpAddr) -> bool {
        match self {
            Self::Automatic | Self::Dual => true,
            Self::Ipv4Only => ip.is_ipv4(),
            Self::Ipv6Only => ip.is_ipv6(),
        }
    }
}
