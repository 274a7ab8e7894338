//! What the enforcer knows of one moment, and the decisions that follow from it. Nothing here touches the kernel.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use culvert_abi::{Endpoint, OWN_PORTS, Pod, Verdict, VerdictKey, action, scope};

use super::{
    EnforcerSettings,
    inherited::Inherited,
    later::Attached,
    numbers::Numbers,
    pairs::{Pair, Pairs, Source},
    services::Services,
    sweep::View,
};
use crate::{
    enrol::{KnownPod, LocalPod, belongs_to_another},
    kernel::{NetnsCookie, ServiceTables},
    mesh::{Destination, Mesh, TunnelProtocol, Workload},
    policy::{Applicable, Connection, Decision, Identity, PolicyName},
    proxy::LaterPolicies,
};

pub struct State {
    pub mesh: Arc<Mesh>,
    pub pods: HashMap<NetnsCookie, Enrolled>,
    /// Who has which address.
    pub addresses: HashMap<IpAddr, NetnsCookie>,
    pub identities: Numbers<Identity>,
    /// A workload has one number for each of its addresses: policies may look at them.
    pub workloads: Numbers<(Arc<str>, IpAddr)>,
    pub policies: Numbers<PolicyName>,
    pub services: Services<Arc<ServiceTables>>,
    pub pairs: Pairs,
    /// Addresses that turned out not to be their pods', still in the tables.
    pub dropped: Vec<IpAddr>,
    /// Pods of an earlier agent that cannot be served yet.
    pub waiting: Vec<KnownPod>,
    /// Until [`Enforcer::start`].
    pub inherited: Inherited,
    pub next_generation: u64,
    pub next_pod: u32,
    /// Open flows are judged.
    pub started: bool,
    /// A mesh was ever in force.
    pub known: bool,
    /// Something could not be written or cut, or is still to be judged.
    pub dirty: bool,
    /// There may be verdicts that nobody follows any more.
    pub has_void_verdicts: bool,
}

pub struct Enrolled {
    pub pod: Arc<LocalPod>,
    pub number: u32,
    pub workload: Option<Arc<Workload>>,
    pub applicable: Applicable,
    /// Empty where later policies mean the same for open flows.
    pub attached: Attached,
    /// One for each address, with the same generation.
    pub endpoints: Vec<(IpAddr, Endpoint)>,
}

/// A decision, and what it is kept under.
pub struct Decided {
    pub key: VerdictKey,
    pub pair: Pair,
    pub verdict: Verdict,
}

/// Whether any of a workload's direct flows may be short-circuited; which, by port, is asked when one is worth it.
fn may_be_short(workload: Option<&Workload>) -> bool {
    workload.is_some_and(|workload| workload.short_circuit.is_on_somewhere())
}

impl State {
    /// An earlier agent's decisions are still in force: its pods are not back, or there is no mesh to judge by.
    pub fn is_waiting(&self) -> bool {
        !(self.started && self.known || self.inherited.is_empty())
    }

    /// The pod of this node that has this address, if this port of it may be reached directly.
    pub fn endpoint(&self, destination: SocketAddr) -> Option<(Endpoint, Arc<Workload>)> {
        if OWN_PORTS.contains(&destination.port()) {
            return None;
        }
        let enrolled = self.pods.get(self.addresses.get(&destination.ip())?)?;
        let (_, endpoint) = enrolled
            .endpoints
            .iter()
            .find(|(ip, _)| *ip == destination.ip())?;
        Some((*endpoint, Arc::clone(enrolled.workload.as_ref()?)))
    }

    /// The verdict for a pair, with its key and the pair as the destination's policies see it. `None` where there can be none:
    /// the pod has left, or its addresses are treated differently.
    pub fn decide(&mut self, asker: NetnsCookie, pair: &Pair) -> Option<Decided> {
        let destination = pair.destination;
        let (endpoint, workload) = self.endpoint(destination)?;
        if endpoint.flags & Endpoint::STEER != 0 {
            return None;
        }
        let by_pod = endpoint.flags & Endpoint::BY_POD != 0;
        let asker = self.pods.get(&asker)?;
        let identity = match &pair.source {
            Source::Identity(identity) => identity.clone(),
            Source::Pod(cookie) => self.pods.get(cookie)?.pod.identity.clone(),
        };
        let sources = asker
            .pod
            .addresses()
            .into_iter()
            .filter(|ip| ip.is_ipv4() == destination.is_ipv4());
        let mut decisions = sources.map(|ip| {
            let connection = Connection::new(Some(identity.clone()), ip, destination);
            self.mesh.authorize(&workload, &connection).decision
        });
        let decision = decisions.next()?;
        if by_pod
            && decisions.any(|other| {
                matches!(other, Decision::Allow(_)) != matches!(decision, Decision::Allow(_))
            })
        {
            return None;
        }
        let (action, policy) = match &decision {
            Decision::Allow(permit) => (action::ALLOW, permit.policy().cloned()),
            Decision::Deny(reason) => (action::DENY, super::super::policy_of(reason).cloned()),
        };
        let (source, number, scope) = if by_pod {
            (Source::Pod(asker.pod.cookie()), asker.number, scope::POD)
        } else {
            let number = self.identities.of(&identity);
            (Source::Identity(identity), number, scope::IDENTITY)
        };
        let key = VerdictKey {
            source: number,
            workload: endpoint.workload,
            port: destination.port(),
            scope,
            padding: 0,
        };
        let verdict = Verdict {
            generation: endpoint.generation,
            action,
            policy: policy.map_or(0, |name| self.policies.of(&name)),
        };
        let pair = Pair {
            source,
            destination,
            action,
        };
        Some(Decided { key, pair, verdict })
    }

    /// Reads a pod's workload and policies anew; true if anything that verdicts depend on is different. `now` is in nanoseconds of the
    /// boot's monotonic clock, as flows are dated.
    pub fn refresh(
        &mut self,
        enrolled: &mut Enrolled,
        settings: &EnforcerSettings,
        now: u64,
    ) -> bool {
        let workload = enrolled.pod.workload(&self.mesh).cloned();
        let applicable = workload
            .as_ref()
            .map(|workload| self.mesh.policies_for(workload))
            .unwrap_or_default();
        let moved = self.choose_addresses(enrolled, workload.as_deref(), settings);
        let flags: Vec<u32> = enrolled
            .endpoints
            .iter()
            .map(|(ip, _)| {
                let reachable = settings.direct
                    && workload.as_ref().is_some_and(|workload| {
                        self.may_be_direct(workload, &enrolled.pod, *ip, &settings.network)
                    });
                if !reachable {
                    // Not in the mesh (yet), or not as a tunnel's end: the agent knows what to do with each connection.
                    return Endpoint::STEER;
                }
                let mut flags = 0;
                if applicable.looks_at_addresses() {
                    flags |= Endpoint::BY_POD;
                }
                if may_be_short(workload.as_deref()) {
                    flags |= Endpoint::SHORT_CIRCUIT;
                }
                flags
            })
            .collect();
        let same = enrolled
            .endpoints
            .iter()
            .zip(&flags)
            .all(|((_, endpoint), flags)| endpoint.generation != 0 && endpoint.flags == *flags);
        if same && !moved && workload == enrolled.workload && applicable == enrolled.applicable {
            return false;
        }
        self.next_generation += 1;
        for ((ip, endpoint), flags) in enrolled.endpoints.iter_mut().zip(flags) {
            if let Some(before) = self.inherited.endpoints.get(ip)
                && let Some(workload) = &workload
            {
                let name = (Arc::clone(&workload.uid), *ip);
                self.workloads.inherit(&name, before.workload);
            }
            endpoint.generation = self.next_generation;
            endpoint.flags = flags;
            endpoint.workload = workload.as_ref().map_or(0, |workload| {
                self.workloads.of(&(Arc::clone(&workload.uid), *ip))
            });
        }
        // A workload that was not known had no flows that policy had let in.
        if settings.later_policies == LaterPolicies::Spare
            && let (Some(before), Some(after)) = (&enrolled.workload, &workload)
        {
            let before = &before.authorization_policies;
            enrolled
                .attached
                .change(before, &after.authorization_policies, now);
        }
        enrolled.workload = workload;
        enrolled.applicable = applicable;
        true
    }

    /// Decides anew which addresses are a pod's; `true` if they were others before.
    fn choose_addresses(
        &mut self,
        enrolled: &mut Enrolled,
        workload: Option<&Workload>,
        settings: &EnforcerSettings,
    ) -> bool {
        let pod = Arc::clone(&enrolled.pod);
        let cookie = pod.cookie();
        let is_foreign = |ip: IpAddr| {
            let named = workload.is_some_and(|workload| workload.has_address(ip));
            let taken = self.addresses.get(&ip).is_some_and(|has| *has != cookie);
            belongs_to_another(workload, &self.mesh, &settings.network, ip) || taken && !named
        };
        let foreign: Vec<IpAddr> = match settings.keep_foreign_addresses {
            true => Vec::new(),
            false => {
                let all = pod.configured_addresses().iter().copied();
                all.filter(|ip| is_foreign(*ip)).collect()
            }
        };
        if pod.set_foreign(foreign.clone()) {
            tracing::warn!(pod = %pod.uid(), ?foreign, own = ?pod.addresses(), "addresses of a pod that the mesh gives to other workloads have changed: they are not the pod's");
        }
        let own = pod.addresses();
        if enrolled.endpoints.iter().map(|(ip, _)| ip).eq(&own) {
            return false;
        }
        let before = std::mem::take(&mut enrolled.endpoints);
        for (ip, _) in &before {
            if !own.contains(ip) {
                self.dropped.push(*ip);
                if self.addresses.get(ip) == Some(&cookie) {
                    self.addresses.remove(ip);
                }
            }
        }
        for ip in own {
            self.addresses.insert(ip, cookie);
            let known = before.iter().find(|(known, _)| *known == ip).copied();
            enrolled.endpoints.push(known.unwrap_or((
                ip,
                Endpoint {
                    netns_cookie: cookie.0,
                    workload: 0,
                    flags: 0,
                    generation: 0,
                },
            )));
        }
        true
    }

    /// Whether a pod is, at one of its addresses, what a direct connection may reach.
    fn may_be_direct(
        &self,
        workload: &Arc<Workload>,
        pod: &LocalPod,
        ip: IpAddr,
        network: &str,
    ) -> bool {
        workload.protocol == TunnelProtocol::Hbone
            && workload.direct
            && workload.waypoint.is_none()
            && workload.identity() == &pod.identity
            && workload.has_address(ip)
            // The address may be a service's, or another workload's.
            && self.mesh.lookup(network, ip, None) == Destination::Workload(Arc::clone(workload))
    }

    pub fn pod_entry(&mut self, enrolled: &Enrolled) -> Pod {
        // A pod that the mesh does not know at this address has an identity, but nobody has said what it may do.
        let outside = enrolled.workload.as_ref().is_none_or(|workload| {
            let primary = enrolled.endpoints.first();
            workload.protocol != TunnelProtocol::Hbone
                || primary.is_none_or(|(ip, _)| !workload.has_address(*ip))
        });
        let asked_not_to = enrolled
            .workload
            .as_ref()
            .is_some_and(|workload| !workload.direct);
        let mut devices = [0; Pod::DEVICES];
        for (place, device) in devices.iter_mut().zip(&enrolled.pod.devices) {
            *place = *device;
        }
        Pod {
            netns_cookie: enrolled.pod.cookie().0,
            identity: self.identities.of(&enrolled.pod.identity),
            pod: enrolled.number,
            flags: if outside || asked_not_to {
                Pod::NO_DIRECT
            } else if may_be_short(enrolled.workload.as_deref()) {
                Pod::SHORT_CIRCUIT
            } else {
                0
            },
            // An earlier agent's views mean something else.
            view: if self.is_waiting() {
                0
            } else {
                self.services.view_of(enrolled.workload.as_deref())
            },
            devices,
            // The tables know which.
            quota: 0,
            padding: 0,
        }
    }

    /// What open flows are judged by; `None` before [`Enforcer::start`], while pods of an earlier agent may still be missing,
    /// and before there is a mesh to judge by: what an earlier agent admitted goes on until then.
    pub fn view(&self, settings: &EnforcerSettings) -> Option<View> {
        (self.started && self.known).then(|| View {
            mesh: Arc::clone(&self.mesh),
            waiting: self.waiting(settings),
            pods: self
                .pods
                .iter()
                .map(|(cookie, enrolled)| {
                    (
                        *cookie,
                        (Arc::clone(&enrolled.pod), enrolled.workload.clone()),
                    )
                })
                .collect(),
            attached: self
                .pods
                .iter()
                .filter(|(_, enrolled)| enrolled.attached.differ())
                .map(|(cookie, enrolled)| (*cookie, enrolled.attached.clone()))
                .collect(),
        })
    }

    /// Who waits. One whose identity the mesh does not tell is nobody.
    fn waiting(
        &self,
        settings: &EnforcerSettings,
    ) -> HashMap<NetnsCookie, (Identity, Vec<IpAddr>)> {
        let known = self.waiting.iter().filter_map(|pod| {
            let identity = pod.spec.identity(&self.mesh, &settings.trust_domain).ok()?;
            let workload = pod.spec.workload(&self.mesh).map(AsRef::as_ref);
            let is_own =
                |ip: &IpAddr| !belongs_to_another(workload, &self.mesh, &settings.network, *ip);
            let own = pod.ips.iter().copied().filter(is_own).collect();
            Some((pod.cookie, (identity, own)))
        });
        known.collect()
    }

    /// By the number of the workload.
    pub fn generations(&self) -> HashMap<u32, u64> {
        self.pods
            .values()
            .flat_map(|enrolled| &enrolled.endpoints)
            .map(|(_, endpoint)| (endpoint.workload, endpoint.generation))
            .collect()
    }
}
