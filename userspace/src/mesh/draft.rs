//! A mesh that is being changed, one resource at a time.
//!
//! Invariants: the mesh it began with stays as it was, and shares what is equal; what is refused changes nothing. Made by the
//! sources in `xds`, for each change.

use std::net::IpAddr;
use std::sync::Arc;

use super::indexes::Indexes;
use super::namespaces::Annotated;
use super::{
    Annotations, Mesh, MeshDefaults, MeshError, Namespaces, Service, SharedTraits, Traits,
    Workload, WorkloadSpec,
};
use crate::policy::{Authorization, PolicyName};

/// A change of a mesh that is not in force yet.
#[derive(Debug)]
pub struct Draft<'a> {
    indexes: Indexes,
    defaults: &'a MeshDefaults,
    namespaces: &'a Namespaces,
    shared: &'a mut SharedTraits,
}

impl<'a> Draft<'a> {
    /// Begins with `mesh`. What workloads have in common is kept in `shared`, best the same for every change.
    pub fn of(
        mesh: &Mesh,
        defaults: &'a MeshDefaults,
        namespaces: &'a Namespaces,
        shared: &'a mut SharedTraits,
    ) -> Self {
        Self {
            indexes: mesh.indexes().clone(),
            defaults,
            namespaces,
            shared,
        }
    }

    /// Puts a workload in the place of the one with its uid. An address that another one has is from now on this one's: pods
    /// come with the address of one whose end is told later.
    ///
    /// # Errors
    /// It has no uid or no valid identity.
    pub fn put_workload(&mut self, spec: WorkloadSpec) -> Result<Arc<Workload>, MeshError> {
        let workload = Workload::new(spec, self.namespaces, self.defaults, self.shared)?;
        let workload = Arc::new(workload);
        self.indexes.put_workload(&workload);
        Ok(workload)
    }

    /// Lays what is said of namespaces now over every workload, and returns how many it changed. For meshes whose resources carry no
    /// annotations: a workload does not keep what its own said.
    pub fn annotate(&mut self) -> usize {
        let silent = Annotations::default();
        let mut changed = Vec::new();
        for before in self.indexes.workloads.values() {
            let said = Annotated::of(&before.named(), &silent, self.namespaces, self.defaults);
            if said.direct == before.direct && said.short_circuit == before.short_circuit {
                continue;
            }
            let traits = Traits {
                direct: said.direct,
                short_circuit: said.short_circuit,
                ..Traits::clone(&before.traits)
            };
            let after = Workload {
                traits: self.shared.of(traits),
                ..Workload::clone(before)
            };
            changed.push((Arc::clone(before), Arc::new(after)));
        }
        for (before, after) in &changed {
            self.indexes.exchange_workload(before, after);
        }
        changed.len()
    }

    /// Takes a workload out; false if there is none of that uid.
    pub fn remove_workload(&mut self, uid: &str) -> bool {
        self.indexes.remove_workload(uid)
    }

    /// Puts a service in the place of the one with its name.
    pub fn put_service(&mut self, service: Service) {
        self.indexes.put_service(&Arc::new(service));
    }

    /// Takes a service out; false if there is none of that name, `namespace/hostname`.
    pub fn remove_service(&mut self, name: &str) -> bool {
        self.indexes.remove_service(name)
    }

    /// Puts a policy in the place of the one with its name.
    pub fn put_policy(&mut self, policy: Authorization) {
        self.indexes.put_policy(&Arc::new(policy));
    }

    /// Takes a policy out; false if there is none of that name.
    pub fn remove_policy(&mut self, name: &PolicyName) -> bool {
        self.indexes.remove_policy(name)
    }

    /// The mesh as it is now.
    pub fn finish(self) -> Mesh {
        Mesh::from_indexes(self.indexes, self.defaults.strictness)
    }

    /// Whether there is such a workload already.
    pub(super) fn has_workload(&self, uid: &str) -> bool {
        self.indexes.workloads.contains_key(uid)
    }

    /// Whether there is such a service already.
    pub(super) fn has_service(&self, service: &Service) -> bool {
        self.indexes.services.contains_key(&service.id)
    }

    /// Whether there is such a policy already.
    pub(super) fn has_policy(&self, name: &PolicyName) -> bool {
        self.indexes.policies.contains_key(name)
    }

    /// Another workload that has one of this one's addresses.
    pub(super) fn rival(&self, workload: &Workload) -> Option<(Arc<str>, IpAddr)> {
        let network = self.indexes.networks.get(&workload.network)?;
        workload.addresses.iter().find_map(|ip| {
            let mut others = network.workloads.get(ip)?.as_slice().iter();
            let other = others.find(|other| other.uid != workload.uid)?;
            Some((Arc::clone(&other.uid), *ip))
        })
    }
}

#[cfg(test)]
mod tests;
