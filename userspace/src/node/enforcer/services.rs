//! Which services the kernel part chooses endpoints for: those with an endpoint on this node, as its pods see them.
//!
//! Invariants: a table in the kernel has exactly the endpoints and weights that the agent would choose by; what does not fit, or
//! could not be written, is left to the agent. Called by the enforcer under its lock.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use culvert_abi::{Address, ServiceKey, Slot};

use super::numbers::Numbers;
use crate::{
    kernel::{KernelError, ServiceTables, SlotTable, address},
    mesh::{Candidate, ClientView, Mesh, Service, ServiceName, Workload, alias_table},
};

/// Where the tables are.
pub trait ServiceMaps {
    /// How many slots there can be.
    fn room(&self) -> u32;
    /// Points a service at a new table, or returns `None` where there is no room.
    fn put(
        &self,
        key: &ServiceKey,
        number: u32,
        slots: &[Slot],
    ) -> Result<Option<SlotTable>, KernelError>;
    /// Leaves a service to the agent.
    fn remove(&self, key: &ServiceKey) -> Result<(), KernelError>;
    /// Deletes a table that nothing points at.
    fn delete(&self, table: &SlotTable) -> Result<(), KernelError>;
}

impl ServiceMaps for Arc<ServiceTables> {
    fn room(&self) -> u32 {
        ServiceTables::room(self)
    }

    fn put(
        &self,
        key: &ServiceKey,
        number: u32,
        slots: &[Slot],
    ) -> Result<Option<SlotTable>, KernelError> {
        ServiceTables::put(self, key, number, slots)
    }

    fn remove(&self, key: &ServiceKey) -> Result<(), KernelError> {
        ServiceTables::remove(self, key)
    }

    fn delete(&self, table: &SlotTable) -> Result<(), KernelError> {
        ServiceTables::delete(self, table)
    }
}

/// A pod of this node that is in the mesh.
pub struct Member {
    pub workload: Arc<Workload>,
    /// Its addresses, each with the workload number that the kernel part knows it by there.
    pub endpoints: Vec<(IpAddr, u32)>,
}

/// What the kernel part has been told about services.
pub struct Services<M> {
    maps: M,
    network: Arc<str>,
    views: Numbers<ClientView>,
    names: Numbers<ServiceName>,
    current: HashMap<ServiceKey, Told>,
    retired: Vec<SlotTable>,
    /// Slots in the kernel, those of retired tables included.
    used: u32,
    left_out: bool,
    warned: bool,
}

/// A service's port in the kernel.
struct Told {
    number: u32,
    shares: Vec<Share>,
    table: SlotTable,
}

/// One endpoint in a table.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Share {
    address: Address,
    workload: u32,
    weight: u32,
    port: u16,
}

/// What the kernel part should be told.
struct Wanted {
    key: ServiceKey,
    number: u32,
    shares: Vec<Share>,
}

/// Tables that services no longer point at.
#[must_use = "their slots stay in the kernel until they are deleted"]
pub struct Retired(Vec<SlotTable>);

impl Retired {
    /// Whether there are any: otherwise nobody need wait for running programs.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<M: ServiceMaps> Services<M> {
    /// `maps` are empty. Services are looked up on `network`, the node's own.
    pub fn new(maps: M, network: Arc<str>) -> Self {
        Self {
            maps,
            network,
            views: Numbers::starting_at(1),
            names: Numbers::starting_at(1),
            current: HashMap::new(),
            retired: Vec::new(),
            used: 0,
            left_out: false,
            warned: false,
        }
    }

    /// The view that the pod's entry names; 0 sees no services. The next [`Self::sync`] must be told of the pod.
    pub fn view_of(&mut self, workload: Option<&Workload>) -> u32 {
        workload.map_or(0, |workload| self.views.of(&ClientView::of(workload)))
    }

    /// The service behind a number in an event.
    pub fn name(&self, number: u32) -> Option<&ServiceName> {
        self.names.name(number)
    }

    /// Whether the kernel part chooses for any service.
    pub fn is_empty(&self) -> bool {
        self.current.is_empty()
    }

    /// Brings the kernel part in line with the mesh and all pods of this node that are in it.
    ///
    /// What fails is left to the agent where possible, and tried again by the next call; the first failure is returned.
    pub fn sync(&mut self, mesh: &Mesh, pods: &[Member]) -> Result<(), KernelError> {
        let views: HashMap<_, _> = pods
            .iter()
            .map(|pod| (ClientView::of(&pod.workload), &*pod.workload))
            .collect();
        self.views.retain(|view| views.contains_key(view));
        self.names
            .retain(|name| mesh.service_by_name(name.as_str()).is_some());
        let mut views: Vec<_> = views
            .into_iter()
            .map(|(view, client)| (self.views.of(&view), client))
            .collect();
        views.sort_unstable_by_key(|(number, _)| *number);
        let here = Here::of(pods);
        self.left_out = false;
        let mut wanted = Vec::new();
        let mut room = self.maps.room();
        let names: BTreeSet<_> = pods
            .iter()
            .flat_map(|pod| pod.workload.services.iter().map(|(name, _)| name))
            .collect();
        for service in names
            .into_iter()
            .filter_map(|name| mesh.service_by_name(name.as_str()))
        {
            for (view, client) in &views {
                self.plan(mesh, service, *view, client, &here, &mut room, &mut wanted);
            }
        }
        let outcome = self.tell(wanted);
        if self.left_out && !self.warned {
            self.warned = true;
            tracing::warn!(
                slots = self.maps.room(),
                "the kernel part has no room for the endpoints of all services; the agent chooses for the others"
            );
        }
        outcome
    }

    /// What the kernel part should know of one service. What is beyond `room` is left out.
    #[expect(
        clippy::too_many_arguments,
        reason = "what is read, and the two things that are added to"
    )]
    fn plan(
        &mut self,
        mesh: &Mesh,
        service: &Service,
        view: u32,
        client: &Workload,
        here: &Here<'_>,
        room: &mut u32,
        wanted: &mut Vec<Wanted>,
    ) {
        for choice in mesh.kernel_choices(&self.network, service, client) {
            if !choice.candidates.iter().any(|one| here.number(one) != 0) {
                continue;
            }
            let slots = u32::try_from(choice.candidates.len()).unwrap_or(u32::MAX);
            let Some(rest) = room.checked_sub(slots) else {
                self.left_out = true;
                continue;
            };
            *room = rest;
            let shares = choice.candidates.iter().map(|candidate| {
                let (_, to, weight) = candidate;
                Share {
                    address: address(to.ip()),
                    workload: here.number(candidate),
                    weight: *weight,
                    port: to.port(),
                }
            });
            wanted.push(Wanted {
                key: ServiceKey {
                    address: address(choice.address.ip()),
                    view,
                    port: choice.address.port(),
                    padding: 0,
                },
                number: self.names.of(&service.id),
                shares: shares.collect(),
            });
        }
    }

    fn tell(&mut self, wanted: Vec<Wanted>) -> Result<(), KernelError> {
        let mut outcome = Ok(());
        let kept: HashSet<_> = wanted.iter().map(|wanted| wanted.key).collect();
        let gone: Vec<_> = self
            .current
            .keys()
            .filter(|key| !kept.contains(key))
            .copied()
            .collect();
        for key in gone {
            outcome = outcome.and(self.withdraw(&key));
        }
        for wanted in wanted {
            let unchanged = self
                .current
                .get(&wanted.key)
                .is_some_and(|told| told.number == wanted.number && told.shares == wanted.shares);
            if unchanged {
                continue;
            }
            let put = match self.put(&wanted) {
                Ok(Some(table)) => {
                    self.used = self.used.saturating_add(table.slots);
                    let told = Told {
                        number: wanted.number,
                        shares: wanted.shares,
                        table,
                    };
                    if let Some(before) = self.current.insert(wanted.key, told) {
                        self.retired.push(before.table);
                    }
                    continue;
                }
                Ok(None) => {
                    self.left_out = true;
                    Ok(())
                }
                Err(error) => Err(error),
            };
            // What was right before is wrong by now.
            outcome = outcome.and(put).and(self.withdraw(&wanted.key));
        }
        outcome
    }

    fn put(&self, wanted: &Wanted) -> Result<Option<SlotTable>, KernelError> {
        let weights: Vec<_> = wanted.shares.iter().map(|share| share.weight).collect();
        let slots: Vec<_> = alias_table(&weights)
            .into_iter()
            .filter_map(|slot| {
                let share = wanted.shares.get(slot.own)?;
                Some(Slot {
                    address: share.address,
                    workload: share.workload,
                    threshold: slot.threshold,
                    alias: slot.alias,
                    port: share.port,
                    padding: 0,
                })
            })
            .collect();
        let used = usize::try_from(self.used).unwrap_or(usize::MAX);
        let room = usize::try_from(self.maps.room()).unwrap_or(usize::MAX);
        if used.saturating_add(slots.len()) > room {
            return Ok(None);
        }
        self.maps.put(&wanted.key, wanted.number, &slots)
    }

    /// Leaves a service to the agent, if the kernel part knows it.
    fn withdraw(&mut self, key: &ServiceKey) -> Result<(), KernelError> {
        if self.current.contains_key(key) {
            self.maps.remove(key)?;
        }
        if let Some(told) = self.current.remove(key) {
            self.retired.push(told.table);
        }
        Ok(())
    }

    /// What [`Self::sync`] has replaced, to be deleted when no program that runs now runs any more.
    pub fn take_retired(&mut self) -> Retired {
        Retired(std::mem::take(&mut self.retired))
    }

    /// Deletes what was retired. True if that made room for what had found none: then it is time for another
    /// [`Self::sync`]. What fails is retired again.
    pub fn delete(&mut self, retired: Retired) -> Result<bool, KernelError> {
        let mut outcome = Ok(());
        let freed = !retired.is_empty();
        for table in retired.0 {
            match self.maps.delete(&table) {
                Ok(()) => self.used = self.used.saturating_sub(table.slots),
                Err(error) => {
                    self.retired.push(table);
                    outcome = outcome.and(Err(error));
                }
            }
        }
        outcome.map(|()| freed && self.left_out)
    }
}

/// Who has which address on this node.
struct Here<'a>(HashMap<IpAddr, (&'a str, u32)>);

impl<'a> Here<'a> {
    fn of(pods: &'a [Member]) -> Self {
        let endpoints = pods.iter().flat_map(|pod| {
            let uid = &*pod.workload.uid;
            pod.endpoints
                .iter()
                .map(move |(ip, number)| (*ip, (uid, *number)))
        });
        Self(endpoints.collect())
    }

    /// The number of an endpoint that is a pod of this node, else 0. A pod that only has the endpoint's address is another.
    fn number(&self, (endpoint, address, _): &Candidate) -> u32 {
        match self.0.get(&address.ip()) {
            Some((uid, number)) if *uid == &*endpoint.workload.uid => *number,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests;
