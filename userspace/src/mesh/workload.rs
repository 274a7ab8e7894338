//! A workload: one pod or external machine that takes part in the mesh.
//!
//! A source describes it as a [`WorkloadSpec`]; `Mesh::build` turns that into a [`Workload`], whose identity is known to be
//! well-formed and whose defaults are filled in.

use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use super::namespaces::Named;
use super::{NetworkAddress, ServiceName, ShortCircuit, ShortCircuitAnnotation};
use crate::policy::{Identity, PolicyName};

/// A workload of a [`Mesh`](super::Mesh): what is its own, and what it shares with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Unique in the mesh, such as `cluster//Pod/namespace/name`.
    pub uid: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// Its addresses, on `network`. There may be none.
    pub addresses: Box<[IpAddr]>,
    /// The node it runs on.
    pub node: Arc<str>,
    /// Whether services may send to it.
    pub status: Health,
    /// Its share of a service's connections in relation to the other endpoints; none counts as 1.
    pub capacity: Option<u32>,
    pub(super) traits: Arc<Traits>,
}

/// What the pods of one deployment have in common, kept once: a mesh has many pods and few deployments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traits {
    /// The pods' namespace.
    pub namespace: Arc<str>,
    /// Never empty.
    pub service_account: Arc<str>,
    /// Never empty.
    pub trust_domain: Arc<str>,
    /// Where the addresses mean something.
    pub network: Arc<str>,
    /// They share the network namespace of their node, and its address with whoever else does.
    pub host_network: bool,
    /// How they are reached.
    pub protocol: TunnelProtocol,
    /// A name to reach them by, where they have no address.
    pub hostname: Arc<str>,
    /// What connections addressed to them pass through first.
    pub waypoint: Option<GatewayAddress>,
    /// The way into their network from other networks.
    pub network_gateway: Option<GatewayAddress>,
    /// The services they are endpoints of.
    pub services: Vec<(ServiceName, PortMap)>,
    /// Policies that apply beside those of their namespace and of the mesh.
    pub authorization_policies: Vec<PolicyName>,
    /// The cluster they run in.
    pub cluster_id: Arc<str>,
    /// Where they run.
    pub locality: Locality,
    /// For telemetry.
    pub canonical_name: Arc<str>,
    /// For telemetry.
    pub canonical_revision: Arc<str>,
    /// The deployment or the like.
    pub workload_name: Arc<str>,
    /// Whether their connections within the node may be direct, as they or their namespace say.
    pub direct: bool,
    /// Which of their direct connections may be short-circuited, as they, their namespace or the agent says.
    pub short_circuit: ShortCircuit,
    pub(super) identity: Identity,
}

/// Traits that are in use, each once.
#[derive(Debug, Default)]
pub struct SharedTraits {
    known: HashSet<Arc<Traits>>,
    /// How many there were after those that nobody used any more were dropped.
    settled: usize,
}

impl SharedTraits {
    const FEW: usize = 64;

    /// The traits themselves, or others that equal them.
    pub(super) fn of(&mut self, traits: Traits) -> Arc<Traits> {
        if let Some(known) = self.known.get(&traits) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.settled.saturating_mul(2).max(Self::FEW) {
            self.known.retain(|traits| Arc::strong_count(traits) > 1);
            self.settled = self.known.len();
        }
        let traits = Arc::new(traits);
        self.known.insert(Arc::clone(&traits));
        traits
    }
}

impl Hash for Traits {
    /// Few differ in nothing of this.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity.hash(state);
        self.workload_name.hash(state);
        self.locality.hash(state);
        self.services.first().map(|(name, _)| name).hash(state);
    }
}

/// What a source says about a workload.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkloadSpec {
    /// Unique in the mesh, such as `cluster//Pod/namespace/name`.
    pub uid: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// Empty means `default`.
    pub service_account: Arc<str>,
    /// Empty means the mesh's own.
    pub trust_domain: Arc<str>,
    /// Its addresses, on `network`. There may be none.
    pub addresses: Vec<IpAddr>,
    /// Where the addresses mean something. Empty means the mesh's default.
    pub network: Arc<str>,
    /// It shares the network namespace of its node, and its address with whoever else does.
    pub host_network: bool,
    /// How it is reached.
    pub protocol: TunnelProtocol,
    /// The node it runs on.
    pub node: Arc<str>,
    /// A name to reach it by, where it has no address.
    pub hostname: Arc<str>,
    /// What connections addressed to it pass through first.
    pub waypoint: Option<GatewayAddress>,
    /// The way into its network from other networks.
    pub network_gateway: Option<GatewayAddress>,
    /// The services it is an endpoint of.
    pub services: Vec<(ServiceName, PortMap)>,
    /// Policies that apply beside those of its namespace and of the mesh.
    pub authorization_policies: Vec<PolicyName>,
    /// Whether services may send to it.
    pub status: Health,
    /// The cluster it runs in.
    pub cluster_id: Arc<str>,
    /// Where it runs.
    pub locality: Locality,
    /// Its share of a service's connections in relation to the other endpoints; none counts as 1.
    pub capacity: Option<u32>,
    /// For telemetry.
    pub canonical_name: Arc<str>,
    /// For telemetry.
    pub canonical_revision: Arc<str>,
    /// The deployment or the like that it belongs to.
    pub workload_name: Arc<str>,
    /// What its annotations ask of Culvert.
    pub annotations: Annotations,
}

/// What the annotations `culvert.dev/...` of a pod or a namespace say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Annotations {
    /// `culvert.dev/direct`: whether connections within the node may be direct. The pod's word counts before its namespace's,
    /// and without one they may.
    pub direct: Option<bool>,
    /// `culvert.dev/short-circuit`, likewise, for each port; without one it is that of [`MeshDefaults`](super::MeshDefaults).
    pub short_circuit: Option<ShortCircuitAnnotation>,
}

/// What is known of a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: Arc<str>,
    /// For its pods that say nothing themselves.
    pub annotations: Annotations,
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TunnelProtocol {
    /// Plain TCP.
    #[default]
    Tcp,
    /// Through a tunnel to its port 15008.
    Hbone,
}

/// Whether a workload is fit for service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Health {
    /// It is.
    #[default]
    Healthy,
    /// It is not.
    Unhealthy,
}

/// Where a workload runs. Empty parts are not known.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Locality {
    /// The region.
    pub region: Arc<str>,
    /// The zone in the region.
    pub zone: Arc<str>,
    /// The part of the zone.
    pub subzone: Arc<str>,
}

/// A waypoint or network gateway.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    /// Which one.
    pub destination: GatewayDestination,
    /// Its HBONE port.
    pub hbone_mtls_port: u16,
}

/// What a gateway is named by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// A service.
    Service(ServiceName),
    /// An address.
    Address(NetworkAddress),
}

/// Service port to target port, ascending. A target of 0 is left for the endpoint to say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortMap(Box<[(u16, u16)]>);

impl Workload {
    /// Whom its certificate names.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What annotations are looked up by.
    pub(super) fn named(&self) -> Named<'_> {
        Named {
            namespace: &self.namespace,
            deployment: &self.workload_name,
            pod: &self.name,
        }
    }

    /// Whether its addresses are its own, and it is found by them.
    pub(super) fn is_indexed_by_address(&self) -> bool {
        !self.host_network && !self.addresses.is_empty()
    }

    /// True if it has this address.
    pub fn has_address(&self, ip: IpAddr) -> bool {
        self.addresses.contains(&ip.to_canonical())
    }
}

impl Deref for Workload {
    type Target = Traits;

    fn deref(&self) -> &Traits {
        &self.traits
    }
}

impl PortMap {
    /// The target of a service port.
    pub fn target(&self, service_port: u16) -> Option<u16> {
        let at = self
            .0
            .binary_search_by_key(&service_port, |(port, _)| *port)
            .ok()?;
        self.0.get(at).map(|(_, target)| *target)
    }

    /// All pairs of service port and target port.
    pub fn iter(&self) -> impl Iterator<Item = (u16, u16)> {
        self.0.iter().copied()
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if it says nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(u16, u16)> for PortMap {
    /// Of several pairs with one service port the last counts.
    fn from_iter<I: IntoIterator<Item = (u16, u16)>>(pairs: I) -> Self {
        let sorted: std::collections::BTreeMap<_, _> = pairs.into_iter().collect();
        Self(sorted.into_iter().collect())
    }
}
