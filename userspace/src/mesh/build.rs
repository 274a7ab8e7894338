//! From resources to a [`Mesh`] as a whole: fills in defaults, checks that names and addresses are unambiguous.
//!
//! Invariant: a `Mesh` is built whole or not at all. Called by the sources in `xds` after each change.

use std::net::IpAddr;
use std::sync::Arc;

use super::namespaces::{Annotated, Named};
use super::{
    Draft, Mesh, Namespace, NamespaceAnnotations, Namespaces, Service, ServiceName, SharedTraits,
    ShortCircuitMode, Traits, Workload, WorkloadSpec,
};
use crate::policy::{Authorization, Identity, IdentityError, PolicyName, Strictness};

/// What a source read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshResources {
    /// All workloads.
    pub workloads: Vec<WorkloadSpec>,
    /// All services.
    pub services: Vec<Service>,
    /// All policies.
    pub policies: Vec<Authorization>,
    /// The namespaces about which something is known.
    pub namespaces: Vec<Namespace>,
}

/// What resources leave out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshDefaults {
    /// The trust domain of workloads that name none.
    pub trust_domain: Arc<str>,
    /// The network of workloads that name none.
    pub network: Arc<str>,
    /// How policies that are missing are read.
    pub strictness: Strictness,
    /// Which direct connections may be short-circuited where annotations leave it open.
    pub short_circuit: ShortCircuitMode,
    /// What [`ShortCircuitMode::Auto`] means: on where no program can tell on this kernel.
    pub auto_short_circuit: ShortCircuitMode,
}

/// Why resources do not make a mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    /// A workload cannot be referred to.
    #[error("a workload named {namespace}/{name} has no uid; give it one")]
    NoUid {
        /// Its namespace.
        namespace: Arc<str>,
        /// Its name.
        name: Arc<str>,
    },
    /// A workload has no valid identity.
    #[error("workload {uid} has no valid identity: {source}")]
    Identity {
        /// The workload.
        uid: Arc<str>,
        /// What is wrong.
        source: IdentityError,
    },
    /// Two workloads have one uid.
    #[error("two workloads have the uid {0}; uids must differ")]
    DuplicateUid(Arc<str>),
    /// Two workloads have one address on one network.
    #[error(
        "workloads {first} and {second} both have the address {ip} on the network {network:?}; remove it from one of them"
    )]
    SharedAddress {
        /// One of them.
        first: Arc<str>,
        /// The other.
        second: Arc<str>,
        /// The network.
        network: Arc<str>,
        /// The address.
        ip: IpAddr,
    },
    /// Two services have one name.
    #[error("two services have the name {0}; a hostname may occur once per namespace")]
    DuplicateService(ServiceName),
    /// Two policies have one name.
    #[error("two policies have the name {0}; a name may occur once per namespace")]
    DuplicatePolicy(PolicyName),
    /// Two namespaces have one name.
    #[error("the namespace {0} occurs twice; put its annotations into one")]
    DuplicateNamespace(Arc<str>),
}

impl Default for MeshDefaults {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            network: "".into(),
            strictness: Strictness::default(),
            short_circuit: ShortCircuitMode::default(),
            auto_short_circuit: ShortCircuitMode::Off,
        }
    }
}

impl Mesh {
    /// Builds the snapshot that these resources describe.
    ///
    /// # Errors
    /// Two resources claim one name or address, or a workload has no valid identity.
    pub fn build(resources: MeshResources, defaults: &MeshDefaults) -> Result<Self, MeshError> {
        let mut namespaces = Namespaces::new();
        for Namespace { name, annotations } in resources.namespaces {
            let said = NamespaceAnnotations {
                general: annotations,
                ..NamespaceAnnotations::default()
            };
            if namespaces.insert(name.clone(), said).is_some() {
                return Err(MeshError::DuplicateNamespace(name));
            }
        }
        let mut shared = SharedTraits::default();
        let mut draft = Draft::of(&Self::default(), defaults, &namespaces, &mut shared);
        for service in resources.services {
            if draft.has_service(&service) {
                return Err(MeshError::DuplicateService(service.id));
            }
            draft.put_service(service);
        }
        for spec in resources.workloads {
            if draft.has_workload(&spec.uid) {
                return Err(MeshError::DuplicateUid(spec.uid));
            }
            let workload = draft.put_workload(spec)?;
            if let Some((other, ip)) = draft.rival(&workload) {
                return Err(MeshError::SharedAddress {
                    first: other,
                    second: workload.uid.clone(),
                    network: workload.network.clone(),
                    ip,
                });
            }
        }
        for policy in resources.policies {
            if draft.has_policy(&policy.name) {
                return Err(MeshError::DuplicatePolicy(policy.name));
            }
            draft.put_policy(policy);
        }
        Ok(draft.finish())
    }
}

impl Workload {
    pub(super) fn new(
        spec: WorkloadSpec,
        namespaces: &Namespaces,
        defaults: &MeshDefaults,
        shared: &mut SharedTraits,
    ) -> Result<Self, MeshError> {
        if spec.uid.is_empty() {
            return Err(MeshError::NoUid {
                namespace: spec.namespace,
                name: spec.name,
            });
        }
        let or_default = |value: Arc<str>, default: &Arc<str>| match value.is_empty() {
            true => Arc::clone(default),
            false => value,
        };
        let trust_domain = or_default(spec.trust_domain, &defaults.trust_domain);
        let network = or_default(spec.network, &defaults.network);
        let service_account = match spec.service_account.is_empty() {
            true => "default".into(),
            false => spec.service_account,
        };
        let identity =
            Identity::new(&trust_domain, &spec.namespace, &service_account).map_err(|source| {
                MeshError::Identity {
                    uid: spec.uid.clone(),
                    source,
                }
            })?;
        let named = Named {
            namespace: &spec.namespace,
            deployment: &spec.workload_name,
            pod: &spec.name,
        };
        let said = Annotated::of(&named, &spec.annotations, namespaces, defaults);
        let traits = Traits {
            namespace: spec.namespace,
            service_account,
            trust_domain,
            network,
            host_network: spec.host_network,
            protocol: spec.protocol,
            hostname: spec.hostname,
            waypoint: spec.waypoint,
            network_gateway: spec.network_gateway,
            services: spec.services,
            authorization_policies: spec.authorization_policies,
            cluster_id: spec.cluster_id,
            locality: spec.locality,
            canonical_name: spec.canonical_name,
            canonical_revision: spec.canonical_revision,
            workload_name: spec.workload_name,
            direct: said.direct,
            short_circuit: said.short_circuit,
            identity,
        };
        Ok(Self {
            uid: spec.uid,
            name: spec.name,
            addresses: spec.addresses.iter().map(IpAddr::to_canonical).collect(),
            node: spec.node,
            status: spec.status,
            capacity: spec.capacity,
            traits: shared.of(traits),
        })
    }
}
