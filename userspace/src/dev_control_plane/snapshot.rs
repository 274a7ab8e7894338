//! All resources of one moment, by type and name, encoded and versioned. Built from a mesh by `publish`, read by `session`.
//!
//! Invariants: a version follows from the encoding alone, so that it outlives a restart; resources are in the order of their names.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;

use super::encode;
use crate::mesh::{Mesh, Service, Workload};

/// A type of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Workloads and services.
    Address,
    /// Policies.
    Authorization,
}

/// An encoded resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Differs where the encoding does.
    pub version: String,
    /// What it is also asked for by: `network/ip`.
    pub aliases: Vec<String>,
    /// The type of `value`.
    pub type_url: String,
    /// The message.
    pub value: Bytes,
}

/// The resources of one type.
#[derive(Debug, Clone, Default)]
pub struct Resources {
    entries: BTreeMap<Arc<str>, Arc<Entry>>,
    aliases: BTreeMap<String, BTreeSet<Arc<str>>>,
    /// The workloads behind a service, by its name.
    endpoints: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
}

/// The resources of all types.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Counts the snapshots.
    pub revision: u64,
    addresses: Resources,
    authorizations: Resources,
}

impl Kind {
    /// As it is written in requests.
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
        }
    }

    /// The type that is written so.
    pub fn of(type_url: &str) -> Option<Self> {
        [Self::Address, Self::Authorization]
            .into_iter()
            .find(|kind| kind.type_url() == type_url)
    }
}

impl Entry {
    /// A resource as it should be.
    pub fn new(kind: Kind, value: Bytes, aliases: Vec<String>) -> Self {
        Self {
            version: version(&value),
            aliases,
            type_url: kind.type_url().to_owned(),
            value,
        }
    }
}

impl Resources {
    /// Adds a resource, or replaces the one of that name.
    pub fn insert(&mut self, name: &str, entry: Entry) {
        let name: Arc<str> = name.into();
        for alias in &entry.aliases {
            let named = self.aliases.entry(alias.clone()).or_default();
            named.insert(Arc::clone(&name));
        }
        self.entries.insert(name, Arc::new(entry));
    }

    /// The resource of this very name.
    pub fn entry(&self, name: &str) -> Option<&Arc<Entry>> {
        self.entries.get(name)
    }

    /// All, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Entry>)> {
        self.entries.iter()
    }

    /// Those that a client means by `asked`: a name, or an alias that several may have. Of a service its endpoints too, as istiod has it:
    /// without them nothing can be done with it.
    pub fn meant(&self, asked: &str) -> impl Iterator<Item = (&Arc<str>, &Arc<Entry>)> {
        let exact = self.entries.get_key_value(asked).map(|(name, _)| name);
        let named = exact.into_iter();
        let named = named.chain(self.aliases.get(asked).into_iter().flatten());
        let all = named.flat_map(|name| {
            let endpoints = self.endpoints.get(name).into_iter().flatten();
            std::iter::once(name).chain(endpoints)
        });
        all.filter_map(|name| self.entries.get_key_value(name))
    }
}

impl Snapshot {
    /// What this mesh holds.
    pub fn of(mesh: &Mesh, revision: u64) -> Self {
        let mut snapshot = Self {
            revision,
            ..Self::default()
        };
        for workload in mesh.workloads() {
            snapshot.add_workload(workload);
        }
        for service in mesh.services() {
            snapshot.add_service(service);
        }
        for policy in mesh.policies() {
            let value = encode::authorization(policy).encode_to_vec().into();
            let entry = Entry::new(Kind::Authorization, value, Vec::new());
            snapshot.authorizations.insert(policy.name.as_str(), entry);
        }
        snapshot
    }

    /// Adds a workload, or replaces the one of its uid.
    pub fn add_workload(&mut self, workload: &Workload) {
        let value = encode::workload(workload).encode_to_vec().into();
        let aliases = workload
            .addresses
            .iter()
            .map(|ip| alias(&workload.network, *ip));
        let entry = Entry::new(Kind::Address, value, aliases.collect());
        self.addresses.insert(&workload.uid, entry);
        for (service, _) in &workload.services {
            let endpoints = &mut self.addresses.endpoints;
            let behind = endpoints.entry(service.as_str().into()).or_default();
            behind.insert(Arc::clone(&workload.uid));
        }
    }

    fn add_service(&mut self, service: &Service) {
        let value = encode::service(service).encode_to_vec().into();
        let aliases = service
            .vips
            .iter()
            .filter_map(|vip| Some(alias(&vip.network, vip.single()?)));
        let entry = Entry::new(Kind::Address, value, aliases.collect());
        self.addresses.insert(service.id.as_str(), entry);
    }

    /// Those of one type.
    pub fn resources(&self, kind: Kind) -> &Resources {
        match kind {
            Kind::Address => &self.addresses,
            Kind::Authorization => &self.authorizations,
        }
    }

    /// Those of one type, to change them.
    pub fn resources_mut(&mut self, kind: Kind) -> &mut Resources {
        match kind {
            Kind::Address => &mut self.addresses,
            Kind::Authorization => &mut self.authorizations,
        }
    }
}

/// The version of this encoding. The hasher's keys are fixed; another release of the compiler may hash otherwise, and then everything
/// is sent once more.
pub fn version(value: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(value);
    format!("{:016x}", hasher.finish())
}

fn alias(network: &str, ip: IpAddr) -> String {
    format!("{network}/{ip}")
}
