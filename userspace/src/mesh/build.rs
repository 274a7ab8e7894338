//! From resources to a [`Mesh`]: fills in defaults, checks that names and addresses are unambiguous, and indexes.
//!
//! Invariant: a `Mesh` is built whole or not at all. Called by the sources in `xds` after each change.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use super::snapshot::{Indexes, Network};
use super::{
    Annotations, Mesh, Namespace, Service, ServiceName, ShortCircuit, ShortCircuitMode, Workload,
    WorkloadSpec,
};
use crate::policy::{Authorization, Identity, IdentityError, PolicyName, Scope, Strictness};

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
        let mut indexes = Indexes::default();
        for service in resources.services {
            indexes.add_service(Arc::new(service))?;
        }
        let mut namespaces = HashMap::new();
        for Namespace { name, annotations } in resources.namespaces {
            insert_new(&mut namespaces, name.clone(), annotations)
                .map_err(|_| MeshError::DuplicateNamespace(name))?;
        }
        let silent = Annotations::default();
        for spec in resources.workloads {
            let namespace = namespaces.get(&spec.namespace).unwrap_or(&silent);
            let workload = Workload::new(spec, namespace, defaults)?;
            indexes.add_workload(Arc::new(workload))?;
        }
        for policy in resources.policies {
            indexes.add_policy(Arc::new(policy))?;
        }
        Ok(Self::from_indexes(indexes.settled(), defaults.strictness))
    }
}

impl Workload {
    fn new(
        mut spec: WorkloadSpec,
        namespace: &Annotations,
        defaults: &MeshDefaults,
    ) -> Result<Self, MeshError> {
        if spec.uid.is_empty() {
            return Err(MeshError::NoUid {
                namespace: spec.namespace,
                name: spec.name,
            });
        }
        let or_default = |value: &mut Arc<str>, default: &Arc<str>| {
            if value.is_empty() {
                *value = default.clone();
            }
        };
        or_default(&mut spec.trust_domain, &defaults.trust_domain);
        or_default(&mut spec.network, &defaults.network);
        if spec.service_account.is_empty() {
            spec.service_account = "default".into();
        }
        for ip in &mut spec.addresses {
            *ip = ip.to_canonical();
        }
        let identity = Identity::new(&spec.trust_domain, &spec.namespace, &spec.service_account)
            .map_err(|source| MeshError::Identity {
                uid: spec.uid.clone(),
                source,
            })?;
        let direct = spec.annotations.direct.or(namespace.direct).unwrap_or(true);
        let mut short_circuit = ShortCircuit::from(defaults.short_circuit);
        // The pod's word last, as it counts most.
        let words = [&namespace.short_circuit, &spec.annotations.short_circuit];
        for annotation in words.into_iter().flatten() {
            short_circuit = short_circuit.overridden_by(annotation);
        }
        Ok(Self {
            spec,
            identity,
            direct,
            short_circuit: short_circuit.with_auto(defaults.auto_short_circuit),
        })
    }
}

impl Indexes {
    fn add_service(&mut self, service: Arc<Service>) -> Result<(), MeshError> {
        insert_new(&mut self.services, service.id.clone(), service.clone())
            .map_err(|_| MeshError::DuplicateService(service.id.clone()))?;
        for vip in &service.vips {
            let vips = &mut self.networks.entry(vip.network.clone()).or_default().vips;
            let sharing = match vip.single() {
                Some(ip) => vips.exact.entry(ip).or_default(),
                None => vips
                    .ranges
                    .entry(vip.net.prefix_len())
                    .or_default()
                    .entry(vip.net)
                    .or_default(),
            };
            // A service that repeats an address is still one service there.
            if !sharing.iter().any(|other| Arc::ptr_eq(other, &service)) {
                sharing.push(service.clone());
            }
        }
        Ok(())
    }

    fn add_workload(&mut self, workload: Arc<Workload>) -> Result<(), MeshError> {
        insert_new(&mut self.workloads, workload.uid.clone(), workload.clone())
            .map_err(|_| MeshError::DuplicateUid(workload.uid.clone()))?;
        let named = self.names.entry(workload.namespace.clone()).or_default();
        named
            .entry(workload.name.clone())
            .or_default()
            .push(workload.clone());
        for (service, _) in &workload.services {
            let endpoints = self.endpoints.entry(service.clone()).or_default();
            if !endpoints
                .last()
                .is_some_and(|last| Arc::ptr_eq(last, &workload))
            {
                endpoints.push(workload.clone());
            }
        }
        if workload.addresses.is_empty() {
            return Ok(());
        }
        let network = self.networks.entry(workload.network.clone()).or_default();
        network.add_addresses(&workload)
    }

    fn add_policy(&mut self, policy: Arc<Authorization>) -> Result<(), MeshError> {
        insert_new(&mut self.policies, policy.name.clone(), policy.clone())
            .map_err(|_| MeshError::DuplicatePolicy(policy.name.clone()))?;
        match policy.scope {
            Scope::Global => self.global_policies.push(policy),
            Scope::Namespace => {
                let namespace: Arc<str> = policy.name.namespace().into();
                self.namespace_policies
                    .entry(namespace)
                    .or_default()
                    .push(policy);
            }
            Scope::WorkloadSelector => {}
        }
        Ok(())
    }

    /// In an order that does not depend on that of the resources, so that a decision names the same policy each time.
    fn settled(mut self) -> Self {
        self.global_policies.sort_by(|a, b| a.name.cmp(&b.name));
        for policies in self.namespace_policies.values_mut() {
            policies.sort_by(|a, b| a.name.cmp(&b.name));
        }
        self
    }
}

impl Network {
    /// The one place that decides whether workloads may share an address.
    fn add_addresses(&mut self, workload: &Arc<Workload>) -> Result<(), MeshError> {
        for ip in &workload.addresses {
            match self.workloads.entry(*ip) {
                Entry::Vacant(free) => {
                    free.insert(workload.clone());
                }
                Entry::Occupied(taken) if Arc::ptr_eq(taken.get(), workload) => {}
                Entry::Occupied(taken) => {
                    return Err(MeshError::SharedAddress {
                        first: taken.get().uid.clone(),
                        second: workload.uid.clone(),
                        network: workload.network.clone(),
                        ip: *ip,
                    });
                }
            }
        }
        Ok(())
    }
}

/// Inserts under a key that must be free.
fn insert_new<K: Hash + Eq, V>(map: &mut HashMap<K, V>, key: K, value: V) -> Result<(), Taken> {
    match map.entry(key) {
        Entry::Vacant(free) => {
            free.insert(value);
            Ok(())
        }
        Entry::Occupied(_) => Err(Taken),
    }
}

/// The key is not free.
struct Taken;
