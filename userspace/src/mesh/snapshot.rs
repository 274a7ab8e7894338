//! The snapshot and its look-ups.
//!
//! Invariants: never changes once built; all look-ups accept IPv4-mapped addresses and treat them as IPv4. A look-up costs a
//! few hashes, whatever the size of the mesh, and a clone shares everything.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::indexes::{Indexes, Sharing};
use super::{Service, ServiceName, Workload};
use crate::policy::{
    Applicable, Authorization, Connection, Evaluation, PolicyName, Strictness, evaluate,
};

/// One state of the mesh.
#[derive(Debug, Clone, Default)]
pub struct Mesh {
    indexes: Indexes,
    strictness: Strictness,
}

/// What an address stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// A virtual address of this service.
    Service(Arc<Service>),
    /// An address of this workload.
    Workload(Arc<Workload>),
    /// Nothing of the mesh.
    Unknown,
}

impl Mesh {
    pub(super) fn from_indexes(indexes: Indexes, strictness: Strictness) -> Self {
        Self {
            indexes,
            strictness,
        }
    }

    pub(super) fn indexes(&self) -> &Indexes {
        &self.indexes
    }

    /// The workload that has this address on this network: the one that came last, if several were given it.
    pub fn workload_by_ip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        let network = self.indexes.networks.get(network)?;
        network.workload(ip.to_canonical())
    }

    /// The workload with this uid.
    pub fn workload_by_uid(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.indexes.workloads.get(uid)
    }

    /// All workloads with this name in this namespace: one per cluster.
    pub fn workloads_by_name(&self, namespace: &str, name: &str) -> &[Arc<Workload>] {
        self.indexes
            .names
            .get(namespace)
            .and_then(|names| names.get(name))
            .map_or(&[], Sharing::as_slice)
    }

    /// The workload with this name in this namespace, if there is exactly one.
    pub fn workload_by_name(&self, namespace: &str, name: &str) -> Option<&Arc<Workload>> {
        match self.workloads_by_name(namespace, name) {
            [only] => Some(only),
            _ => None,
        }
    }

    /// The service with this name, `namespace/hostname`.
    pub fn service_by_name(&self, name: &str) -> Option<&Arc<Service>> {
        self.indexes.services.get(name)
    }

    /// The policy with this name.
    pub fn policy(&self, name: &PolicyName) -> Option<&Arc<Authorization>> {
        self.indexes.policies.get(name)
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.indexes.workloads.values()
    }

    /// All services, in no order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.indexes.services.values()
    }

    /// All policies, in no order.
    pub fn policies(&self) -> impl ExactSizeIterator<Item = &Arc<Authorization>> {
        self.indexes.policies.values()
    }

    /// What an address that `client` connects to stands for: a service with exactly this address, else the one with the
    /// narrowest range around it, else a workload. Among several services that of the client's namespace wins, then a
    /// canonical one, then the first by name.
    pub fn lookup(&self, network: &str, ip: IpAddr, client: Option<&Workload>) -> Destination {
        let ip = ip.to_canonical();
        let Some(network) = self.indexes.networks.get(network) else {
            return Destination::Unknown;
        };
        if let Some(service) = network
            .vips
            .sharing(ip)
            .and_then(|sharing| preferred(sharing, client))
        {
            return Destination::Service(service.clone());
        }
        network
            .workload(ip)
            .map_or(Destination::Unknown, |workload| {
                Destination::Workload(workload.clone())
            })
    }

    /// The services with exactly this address.
    pub(super) fn services_at(&self, network: &str, ip: IpAddr) -> &[Arc<Service>] {
        self.indexes
            .networks
            .get(network)
            .map_or(&[], |network| network.vips.exactly(ip.to_canonical()))
    }

    /// The policies that apply to a workload, each once: those it lists, those of its namespace, those of the whole mesh.
    pub fn policies_for(&self, workload: &Workload) -> Applicable {
        self.policies_among(workload, |_| true)
    }

    /// Of those that the workload lists, only the ones that count.
    fn policies_among(
        &self,
        workload: &Workload,
        counts: impl Fn(&PolicyName) -> bool,
    ) -> Applicable {
        let mut applicable = Applicable::default();
        let mut seen = HashSet::new();
        let listed = workload.authorization_policies.iter();
        for name in listed.filter(|name| counts(name)) {
            if !seen.insert(name) {
                continue;
            }
            match self.policy(name) {
                Some(policy) => applicable.policies.push(policy.clone()),
                None => applicable.unknown.push(name.clone()),
            }
        }
        let namespace = self
            .indexes
            .namespace_policies
            .get(&workload.namespace)
            .into_iter()
            .flatten();
        for policy in namespace.chain(&self.indexes.global_policies) {
            if seen.insert(&policy.name) {
                applicable.policies.push(policy.clone());
            }
        }
        applicable
    }

    /// Decides about a connection to this workload.
    pub fn authorize(&self, destination: &Workload, connection: &Connection) -> Evaluation {
        evaluate(&self.policies_for(destination), connection, self.strictness)
    }

    /// Decides about a connection to this workload that is open. Of the policies that the workload lists, those with a selector, only the
    /// ones that count are asked; those of its namespace and of the whole mesh always are.
    pub fn authorize_open(
        &self,
        destination: &Workload,
        connection: &Connection,
        counts: impl Fn(&PolicyName) -> bool,
    ) -> Evaluation {
        let applicable = self.policies_among(destination, counts);
        evaluate(&applicable, connection, self.strictness)
    }

    /// The workloads that name this service, in the order of the resources.
    pub(super) fn backends(&self, service: &ServiceName) -> &[Arc<Workload>] {
        self.indexes
            .endpoints
            .get(service)
            .map_or(&[], Vec::as_slice)
    }
}

fn preferred<'a>(
    services: &'a [Arc<Service>],
    client: Option<&Workload>,
) -> Option<&'a Arc<Service>> {
    let of_client =
        |service: &Service| client.is_some_and(|client| service.namespace() == &*client.namespace);
    services.iter().min_by_key(|service| {
        (
            Reverse(of_client(service)),
            Reverse(service.canonical),
            service.id.as_str(),
        )
    })
}
