//! What a mesh is looked up by, and how one resource is put in or taken out.
//!
//! Invariants: every index names the same resources; a clone shares all that is equal, so that a change costs what it touches,
//! whatever the size of the mesh. Read by `snapshot`, changed by `draft`.

use std::collections::BTreeMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::shared_map::SharedMap as Map;
use super::{NetworkCidr, Service, ServiceName, Workload};
use crate::policy::{Authorization, PolicyName, Scope};

#[derive(Debug, Clone, Default)]
pub struct Indexes {
    pub workloads: Map<Arc<str>, Arc<Workload>>,
    /// By namespace, then name. Pods of two clusters may share both.
    pub names: Map<Arc<str>, Map<Arc<str>, Sharing>>,
    pub services: Map<ServiceName, Arc<Service>>,
    pub endpoints: Map<ServiceName, Vec<Arc<Workload>>>,
    pub networks: Map<Arc<str>, Network>,
    pub policies: Map<PolicyName, Arc<Authorization>>,
    /// In the order of their names, so that a decision names the same policy each time.
    pub global_policies: Vec<Arc<Authorization>>,
    /// Likewise.
    pub namespace_policies: Map<Arc<str>, Vec<Arc<Authorization>>>,
}

/// The addresses of one network.
#[derive(Debug, Clone, Default)]
pub struct Network {
    /// The one that came last is first: it has the address, and the others wait for it to go.
    pub workloads: Map<IpAddr, Sharing>,
    pub vips: Vips,
}

/// Services by their addresses. Several may share one.
#[derive(Debug, Clone, Default)]
pub struct Vips {
    exact: Map<IpAddr, Vec<Arc<Service>>>,
    ranges: Map<IpNet, Vec<Arc<Service>>>,
    /// How many ranges there are of a length of prefix. Lengths of both families are mixed, their ranges are not equal.
    lengths: BTreeMap<u8, usize>,
}

/// The workloads of one name or address: nearly always one, which then takes no more room than itself.
#[derive(Debug, Clone)]
pub enum Sharing {
    One(Arc<Workload>),
    Several(Arc<[Arc<Workload>]>),
}

impl Sharing {
    pub fn as_slice(&self) -> &[Arc<Workload>] {
        match self {
            Self::One(only) => std::slice::from_ref(only),
            Self::Several(all) => all,
        }
    }

    fn with_first(&self, new: &Arc<Workload>) -> Self {
        let all = std::iter::once(new).chain(self.as_slice()).cloned();
        Self::Several(all.collect())
    }

    /// With another at the place of one.
    fn with(&self, gone: &Arc<Workload>, new: &Arc<Workload>) -> Self {
        let exchanged =
            |one: &Arc<Workload>| Arc::clone(if Arc::ptr_eq(one, gone) { new } else { one });
        match self {
            Self::One(only) => Self::One(exchanged(only)),
            Self::Several(all) => Self::Several(all.iter().map(exchanged).collect()),
        }
    }

    /// `None` when that was the last.
    fn without(&self, gone: &Arc<Workload>) -> Option<Self> {
        let rest = self.as_slice().iter();
        let rest: Vec<_> = rest
            .filter(|one| !Arc::ptr_eq(one, gone))
            .cloned()
            .collect();
        match &*rest {
            [] => None,
            [only] => Some(Self::One(Arc::clone(only))),
            _ => Some(Self::Several(rest.into())),
        }
    }
}

impl Indexes {
    /// Puts a workload in the place of the one with its uid.
    pub fn put_workload(&mut self, workload: &Arc<Workload>) {
        let before = self.workloads.get(&workload.uid).cloned();
        self.workloads
            .insert(Arc::clone(&workload.uid), Arc::clone(workload));
        if let Some(before) = &before {
            self.remove_name(before);
            self.remove_addresses(before);
        }
        let named = self.names.or_default(&workload.namespace);
        share(named, &workload.name, workload);
        if workload.is_indexed_by_address() {
            let network = self.networks.or_default(&workload.network);
            let mut seen: &[IpAddr] = &[];
            for (place, ip) in workload.addresses.iter().enumerate() {
                // Some list an address twice.
                if !seen.contains(ip) {
                    share(&mut network.workloads, ip, workload);
                }
                seen = workload.addresses.get(..=place).unwrap_or_default();
            }
        }
        self.put_endpoints(before.as_ref(), workload);
    }

    /// Puts a workload exactly where another one is, of the same names, addresses and services: who shares an address with it
    /// does not gain or lose it.
    pub fn exchange_workload(&mut self, before: &Arc<Workload>, after: &Arc<Workload>) {
        self.workloads
            .insert(Arc::clone(&after.uid), Arc::clone(after));
        if let Some(named) = self.names.get_mut(&after.namespace) {
            exchange(named, &after.name, before, after);
        }
        if let Some(network) = self.networks.get_mut(&after.network) {
            for ip in &after.addresses {
                exchange(&mut network.workloads, ip, before, after);
            }
        }
        self.put_endpoints(Some(before), after);
    }

    /// Takes a workload out; false if there is none of that uid.
    pub fn remove_workload(&mut self, uid: &str) -> bool {
        let Some(gone) = self.workloads.get(uid).cloned() else {
            return false;
        };
        self.workloads.remove(uid);
        self.remove_name(&gone);
        self.remove_addresses(&gone);
        for (service, _) in &gone.services {
            self.remove_endpoint(service, &gone);
        }
        true
    }

    fn remove_name(&mut self, gone: &Arc<Workload>) {
        let Some(named) = self.names.get_mut(&gone.namespace) else {
            return;
        };
        unshare(named, &gone.name, gone);
        if named.is_empty() {
            self.names.remove(&gone.namespace);
        }
    }

    fn remove_addresses(&mut self, gone: &Arc<Workload>) {
        let Some(network) = self.networks.get_mut(&gone.network) else {
            return;
        };
        for ip in &gone.addresses {
            unshare(&mut network.workloads, ip, gone);
        }
        if network.is_empty() {
            self.networks.remove(&gone.network);
        }
    }

    /// An endpoint keeps its place among the others of a service.
    fn put_endpoints(&mut self, before: Option<&Arc<Workload>>, workload: &Arc<Workload>) {
        let lists = |one: &Workload, service| one.services.iter().any(|(name, _)| name == service);
        for (service, _) in before.iter().flat_map(|before| &before.services) {
            if let Some(before) = before
                && !lists(workload, service)
            {
                self.remove_endpoint(service, before);
            }
        }
        for (place, (service, _)) in workload.services.iter().enumerate() {
            let mut earlier = workload.services.iter().take(place);
            if earlier.any(|(name, _)| name == service) {
                // One that lists a service twice is still one endpoint of it.
                continue;
            }
            let endpoints = self.endpoints.or_default(service);
            let place = before
                .filter(|before| lists(before, service))
                .and_then(|before| endpoints.iter().position(|one| Arc::ptr_eq(one, before)));
            match place.and_then(|place| endpoints.get_mut(place)) {
                Some(place) => *place = Arc::clone(workload),
                None => endpoints.push(Arc::clone(workload)),
            }
        }
    }

    fn remove_endpoint(&mut self, service: &ServiceName, gone: &Arc<Workload>) {
        let Some(endpoints) = self.endpoints.get_mut(service) else {
            return;
        };
        endpoints.retain(|endpoint| !Arc::ptr_eq(endpoint, gone));
        if endpoints.is_empty() {
            self.endpoints.remove(service);
        }
    }

    /// Puts a service in the place of the one with its name.
    pub fn put_service(&mut self, service: &Arc<Service>) {
        self.remove_service(service.id.as_str());
        self.services
            .insert(service.id.clone(), Arc::clone(service));
        for vip in &service.vips {
            let network = self.networks.or_default(&vip.network);
            network.vips.put(vip, service);
        }
    }

    /// Takes a service out; false if there is none of that name.
    pub fn remove_service(&mut self, name: &str) -> bool {
        let Some(gone) = self.services.get(name).cloned() else {
            return false;
        };
        self.services.remove(name);
        for vip in &gone.vips {
            if let Some(network) = self.networks.get_mut(&vip.network) {
                network.vips.remove(vip, &gone);
                if network.is_empty() {
                    self.networks.remove(&vip.network);
                }
            }
        }
        true
    }

    /// Puts a policy in the place of the one with its name.
    pub fn put_policy(&mut self, policy: &Arc<Authorization>) {
        self.remove_policy(&policy.name);
        self.policies
            .insert(policy.name.clone(), Arc::clone(policy));
        let policies = match policy.scope {
            Scope::Global => &mut self.global_policies,
            Scope::Namespace => {
                let namespace: Arc<str> = policy.name.namespace().into();
                self.namespace_policies.or_default(&namespace)
            }
            Scope::WorkloadSelector => return,
        };
        let place = policies.partition_point(|other| other.name < policy.name);
        policies.insert(place, Arc::clone(policy));
    }

    /// Takes a policy out; false if there is none of that name.
    pub fn remove_policy(&mut self, name: &PolicyName) -> bool {
        let Some(gone) = self.policies.get(name).cloned() else {
            return false;
        };
        self.policies.remove(name);
        match gone.scope {
            Scope::Global => self.global_policies.retain(|one| !Arc::ptr_eq(one, &gone)),
            Scope::Namespace => {
                if let Some(policies) = self.namespace_policies.get_mut(name.namespace()) {
                    policies.retain(|one| !Arc::ptr_eq(one, &gone));
                    if policies.is_empty() {
                        self.namespace_policies.remove(name.namespace());
                    }
                }
            }
            Scope::WorkloadSelector => {}
        }
        true
    }
}

impl Network {
    /// Who has this address.
    pub fn workload(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.get(&ip)?.as_slice().first()
    }

    fn is_empty(&self) -> bool {
        self.workloads.is_empty() && self.vips.exact.is_empty() && self.vips.ranges.is_empty()
    }
}

impl Vips {
    /// The services with exactly this address, else those with the narrowest range around it.
    pub fn sharing(&self, ip: IpAddr) -> Option<&[Arc<Service>]> {
        let narrowest = || {
            self.lengths.keys().rev().find_map(|length| {
                let range = IpNet::new(ip, *length).ok()?.trunc();
                self.ranges.get(&range)
            })
        };
        self.exact.get(&ip).or_else(narrowest).map(Vec::as_slice)
    }

    /// The services with exactly this address.
    pub fn exactly(&self, ip: IpAddr) -> &[Arc<Service>] {
        self.exact.get(&ip).map_or(&[], Vec::as_slice)
    }

    fn put(&mut self, vip: &NetworkCidr, service: &Arc<Service>) {
        let sharing = match vip.single() {
            Some(ip) => self.exact.or_default(&ip),
            None => {
                if !self.ranges.contains_key(&vip.net) {
                    *self.lengths.entry(vip.net.prefix_len()).or_default() += 1;
                }
                self.ranges.or_default(&vip.net)
            }
        };
        // A service that repeats an address is still one service there.
        if !sharing.iter().any(|other| Arc::ptr_eq(other, service)) {
            sharing.push(Arc::clone(service));
        }
    }

    fn remove(&mut self, vip: &NetworkCidr, gone: &Arc<Service>) {
        if let Some(ip) = vip.single() {
            leave(&mut self.exact, &ip, gone);
        } else if leave(&mut self.ranges, &vip.net, gone)
            && let Some(count) = self.lengths.get_mut(&vip.net.prefix_len())
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.lengths.remove(&vip.net.prefix_len());
            }
        }
    }
}

fn share<K: Hash + Eq + Clone>(map: &mut Map<K, Sharing>, key: &K, new: &Arc<Workload>) {
    let sharing = match map.get(key) {
        Some(before) => before.with_first(new),
        None => Sharing::One(Arc::clone(new)),
    };
    map.insert(key.clone(), sharing);
}

fn exchange<K: Hash + Eq + Clone>(
    map: &mut Map<K, Sharing>,
    key: &K,
    before: &Arc<Workload>,
    after: &Arc<Workload>,
) {
    // Not every workload is found by its addresses.
    if let Some(sharing) = map.get(key) {
        map.insert(key.clone(), sharing.with(before, after));
    }
}

fn unshare<K: Hash + Eq + Clone>(map: &mut Map<K, Sharing>, key: &K, gone: &Arc<Workload>) {
    match map.get(key).map(|sharing| sharing.without(gone)) {
        Some(Some(rest)) => map.insert(key.clone(), rest),
        Some(None) => {
            map.remove(key);
        }
        None => {}
    }
}

/// Takes a service out of those that share a key; true if that was the last.
fn leave<K: Hash + Eq + Clone>(
    map: &mut Map<K, Vec<Arc<Service>>>,
    key: &K,
    gone: &Arc<Service>,
) -> bool {
    let Some(sharing) = map.get_mut(key) else {
        return false;
    };
    sharing.retain(|one| !Arc::ptr_eq(one, gone));
    let last = sharing.is_empty();
    if last {
        map.remove(key);
    }
    last
}
