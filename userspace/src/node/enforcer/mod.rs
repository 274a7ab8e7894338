//! Keeps the kernel part's tables true: who is where, under which generation, and what was decided.
//!
//! Invariant: what the tables say belongs to the one mesh snapshot in `State`. A change is made under the lock: first the
//! endpoints' generations, which void every verdict at once, then the sweep over open flows, again after every program that
//! may have read the old generation has ended.

mod inherited;
mod numbers;
mod pairs;
mod services;
mod sweep;

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use culvert_abi::{Endpoint, OWN_PORTS, Pod, Verdict, VerdictKey, action, scope};

use crate::{
    enrol::LocalPod,
    kernel::{
        Fate, FlowEvent, FlowName, KernelError, NetnsCookie, ServiceTables, SocketName, Tables, sys,
    },
    mesh::{Destination, Mesh, ServiceName, TunnelProtocol, Workload},
    policy::{Applicable, Connection, Decision, Evaluation, Identity, PolicyName},
    proxy::Judge,
};
use inherited::Inherited;
use numbers::Numbers;
use pairs::{Pair, Pairs, Source};
use services::{Member, Services};
use sweep::{Revoked, View};

/// Far more than a program of ours runs, where the kernel offers no better way to wait for its end.
const PROGRAMS_TAKE: Duration = Duration::from_millis(100);

/// Pairs that are judged while a change is being written; more of them are judged after the flows that it forbids are cut.
const AT_ONCE: usize = 1024;

/// What the enforcer follows besides the mesh.
#[derive(Clone, Debug)]
pub struct EnforcerSettings {
    /// This node's network.
    pub network: Arc<str>,
    /// Pods may talk to each other directly.
    pub direct: bool,
    /// A test has switched off what follows a change of policy.
    pub skip_sweep: bool,
    /// A test has switched off that what the kernel part knows of services follows the mesh, once it knows any.
    pub skip_service_sync: bool,
}

/// The feeder of the kernel part.
pub struct Enforcer {
    tables: Arc<Tables>,
    settings: EnforcerSettings,
    state: Mutex<State>,
    revoked: Revoked,
}

struct State {
    mesh: Arc<Mesh>,
    pods: HashMap<NetnsCookie, Enrolled>,
    /// Who has which address.
    addresses: HashMap<IpAddr, NetnsCookie>,
    identities: Numbers<Identity>,
    /// A workload has one number for each of its addresses: policies may look at them.
    workloads: Numbers<(Arc<str>, IpAddr)>,
    policies: Numbers<PolicyName>,
    services: Services<Arc<ServiceTables>>,
    pairs: Pairs,
    /// Until [`Enforcer::start`].
    inherited: Inherited,
    next_generation: u64,
    next_pod: u32,
    /// Open flows are judged.
    started: bool,
    /// A mesh was ever in force.
    known: bool,
    /// Something could not be written or cut, or is still to be judged.
    dirty: bool,
}

struct Enrolled {
    pod: Arc<LocalPod>,
    number: u32,
    workload: Option<Arc<Workload>>,
    applicable: Applicable,
    /// One for each address, with the same generation.
    endpoints: Vec<(IpAddr, Endpoint)>,
}

/// A decision, and what it is kept under.
struct Decided {
    key: VerdictKey,
    pair: Pair,
    verdict: Verdict,
}

/// What is left to do after a change was written.
#[derive(Default)]
struct Change {
    /// What open flows are to be judged by; nothing when they need not be.
    view: Option<View>,
    /// Pairs whose verdicts are still to be given.
    late: Vec<(NetnsCookie, Pair)>,
    failed: Option<KernelError>,
}

impl Enforcer {
    /// Takes the tables over. What an earlier agent decided stands until [`Self::start`].
    pub fn new(tables: Arc<Tables>, settings: EnforcerSettings) -> Result<Self, KernelError> {
        let inherited = Inherited::read(&tables)?;
        if inherited.is_empty() {
            tables.vouch()?;
        }
        // Unique over the agents of one boot.
        let now = u64::try_from(sys::monotonic_now().as_nanos()).unwrap_or(u64::MAX / 2);
        let first = inherited.highest_number().saturating_add(1);
        let services = Services::new(Arc::clone(tables.services()), settings.network.clone());
        let state = State {
            mesh: Arc::default(),
            pods: HashMap::new(),
            addresses: HashMap::new(),
            identities: Numbers::starting_at(first),
            workloads: Numbers::starting_at(first),
            policies: Numbers::starting_at(1),
            services,
            pairs: Pairs::default(),
            next_generation: now.max(inherited.highest_generation()) + 1,
            next_pod: first,
            inherited,
            started: false,
            known: false,
            dirty: false,
        };
        Ok(Self {
            tables,
            settings,
            state: Mutex::new(state),
            revoked: Revoked::default(),
        })
    }

    /// Enters a pod: from now on its connections are decided, as client and as server. One that comes back to an agent which
    /// has just taken over is entered with all others, by [`Self::start`].
    pub fn add(&self, pod: Arc<LocalPod>) -> Result<(), KernelError> {
        let mut state = self.state();
        let cookie = pod.cookie();
        let before = state.inherited.pods.get(&cookie).copied();
        let number = match before {
            Some(before) => {
                state.identities.inherit(&pod.identity, before.identity);
                before.pod
            }
            None => {
                let number = state.next_pod;
                state.next_pod = number.saturating_add(1);
                number
            }
        };
        let unknown = Endpoint {
            netns_cookie: cookie.0,
            workload: 0,
            flags: 0,
            generation: 0,
        };
        let mut enrolled = Enrolled {
            number,
            workload: None,
            applicable: Applicable::default(),
            endpoints: pod.addresses.iter().map(|ip| (*ip, unknown)).collect(),
            pod,
        };
        state.refresh(&mut enrolled, &self.settings);
        if state.is_waiting() {
            state.dirty = true;
        } else if let Err(error) = self.write(&mut state, &enrolled) {
            self.erase(&enrolled)?;
            return Err(error);
        }
        for (ip, _) in &enrolled.endpoints {
            state.addresses.insert(*ip, cookie);
        }
        state.pods.insert(cookie, enrolled);
        if !state.is_waiting() {
            self.sync_services(&mut state);
        }
        // It may have open flows of an earlier enrolment, which nobody has judged while it was away.
        state.dirty |= state.started;
        Ok(())
    }

    /// Writes what the kernel part knows of a pod: first where it is, then that it is in the mesh.
    fn write(&self, state: &mut State, enrolled: &Enrolled) -> Result<(), KernelError> {
        for (ip, endpoint) in &enrolled.endpoints {
            self.tables.put_endpoint(*ip, *endpoint)?;
        }
        let entry = state.pod_entry(enrolled);
        self.tables.put_pod(enrolled.pod.cookie(), entry)
    }

    fn erase(&self, enrolled: &Enrolled) -> Result<(), KernelError> {
        for (ip, _) in &enrolled.endpoints {
            self.tables.remove_endpoint(*ip)?;
        }
        self.tables.remove_pod(enrolled.pod.cookie())
    }

    /// Removes a pod. Its direct flows go on where policy would let a client without an identity in.
    pub fn remove(&self, pod: &LocalPod) -> Result<(), KernelError> {
        let cookie = pod.cookie();
        let view = {
            let mut state = self.state();
            if let Some(enrolled) = state.pods.remove(&cookie) {
                self.erase(&enrolled)?;
                for (ip, _) in &enrolled.endpoints {
                    state.addresses.remove(ip);
                }
            }
            self.sync_services(&mut state);
            self.tables.remove_claims(cookie)?;
            let State {
                pods,
                identities,
                workloads,
                pairs,
                addresses,
                ..
            } = &mut *state;
            let used: HashSet<_> = pods.values().map(|other| &other.pod.identity).collect();
            identities.retain(|identity| used.contains(identity));
            let used: HashSet<_> = pods
                .values()
                .filter_map(|other| Some(&*other.workload.as_ref()?.uid))
                .collect();
            workloads.retain(|(uid, _)| used.contains(&**uid));
            pairs.forget(|asker, pair| {
                asker == cookie || !addresses.contains_key(&pair.destination.ip())
            });
            let generations = state.generations();
            self.tables
                .sweep_verdicts(|key, _| !generations.contains_key(&key.workload))?;
            state.view()
        };
        if let Some(view) = view {
            self.sweep(&view);
        }
        Ok(())
    }

    /// All pods of an earlier agent are back: from now on this one decides, and judges open flows, beginning with those that
    /// are there.
    pub fn start(&self) -> Result<usize, KernelError> {
        {
            let mut state = self.state();
            state.started = true;
            state.dirty = true;
        }
        let cut = self.bring_in_line(None)?;
        self.tables.vouch()?;
        Ok(cut)
    }

    /// Brings the kernel in line with a new mesh; returns how many direct flows it cut.
    ///
    /// What could not be written or cut is noted, and [`Self::retry`] tries again.
    pub fn apply(&self, mesh: Arc<Mesh>) -> Result<usize, KernelError> {
        self.bring_in_line(Some(mesh))
    }

    fn bring_in_line(&self, mesh: Option<Arc<Mesh>>) -> Result<usize, KernelError> {
        let Some(change) = self.write_change(mesh)? else {
            return Ok(0);
        };
        let mut failed = change.failed;
        let mut cut = 0;
        if let Some(view) = &change.view {
            cut = self.sweep(view);
            // Programs that read the old generation before it changed may make a flow after the first sweep.
            wait_for_running_programs();
            cut += self.sweep(view);
        }
        let mut state = self.state();
        for (asker, pair) in change.late {
            if let Err(error) = self.give_verdict(&mut state, asker, &pair) {
                failed = Some(error);
            }
        }
        if !self.settings.skip_sweep {
            let generations = state.generations();
            self.tables.sweep_verdicts(|key, verdict| {
                generations.get(&key.workload) != Some(&verdict.generation)
            })?;
        }
        let policies: HashSet<_> = state
            .mesh
            .policies()
            .map(|policy| policy.name.clone())
            .collect();
        state.policies.retain(|name| policies.contains(name));
        failed.map_or(Ok(cut), Err)
    }

    /// The change itself, as one: where it decides anything differently, no connection is decided by what is half-written. `None`
    /// when nothing changed for the pods of this node.
    fn write_change(&self, mesh: Option<Arc<Mesh>>) -> Result<Option<Change>, KernelError> {
        let mut state = self.state();
        if let Some(mesh) = mesh {
            state.mesh = mesh;
            state.known = true;
        }
        if state.is_waiting() {
            state.dirty = true;
            return Ok(None);
        }
        let again = std::mem::take(&mut state.dirty);
        let mut pods = std::mem::take(&mut state.pods);
        let mut changed = Vec::new();
        for (cookie, enrolled) in &mut pods {
            if state.refresh(enrolled, &self.settings) || again {
                changed.push(*cookie);
            }
        }
        state.pods = pods;
        let inherited = std::mem::take(&mut state.inherited);
        if changed.is_empty() && inherited.is_empty() {
            self.sync_services(&mut state);
            return Ok(None);
        }
        let mut change = Change::default();
        if let Err(error) = self.write_pods(&mut state, &changed, &inherited, &mut change) {
            state.dirty = true;
            state.inherited = inherited;
            change.failed = Some(error);
        }
        if let Err(error) = self.tables.set_changing(false) {
            state.dirty = true;
            change.failed = Some(error);
        }
        self.sync_services(&mut state);
        if !self.settings.skip_sweep {
            change.view = state.view();
        }
        Ok(Some(change))
    }

    /// First the verdicts of the new generation, then the endpoints, which put them into force: a connection that is just being
    /// made finds the new verdict where its own is void.
    fn write_pods(
        &self,
        state: &mut State,
        changed: &[NetnsCookie],
        inherited: &Inherited,
        change: &mut Change,
    ) -> Result<(), KernelError> {
        if !inherited.is_empty() {
            // What an earlier agent chose by its own numbers.
            self.tables.services().clear()?;
        }
        let concerned: HashSet<IpAddr> = changed
            .iter()
            .filter_map(|cookie| state.pods.get(cookie))
            .flat_map(|enrolled| enrolled.endpoints.iter().map(|(ip, _)| *ip))
            .collect();
        let mut pairs = state
            .pairs
            .towards(|destination| concerned.contains(&destination.ip()));
        for (asker, destination, action) in inherited.pairs() {
            if let Some(enrolled) = state.pods.get(&asker) {
                let source = Source::Identity(enrolled.pod.identity.clone());
                let pair = Pair {
                    source,
                    destination,
                    action,
                };
                pairs.push((asker, pair));
            }
        }
        if self.settings.skip_sweep {
            pairs.clear();
        }
        change.late = pairs.split_off(pairs.len().min(AT_ONCE));
        let mut decided = Vec::with_capacity(pairs.len());
        let mut differs = !change.late.is_empty();
        for (asker, pair) in pairs {
            if let Some(verdict) = state.decide(asker, &pair) {
                differs |= verdict.verdict.action != pair.action;
                decided.push((asker, verdict));
            }
        }
        if differs {
            self.tables.set_changing(true)?;
        }
        for (asker, verdict) in decided {
            self.keep_verdict(state, asker, verdict)?;
        }
        for cookie in changed {
            if let Some(enrolled) = state.pods.remove(cookie) {
                let written = self.write(state, &enrolled);
                state.pods.insert(*cookie, enrolled);
                written?;
            }
        }
        self.close_inherited(state, inherited)
    }

    /// Pods that an earlier agent served and this one does not (yet): their traffic goes to an agent or nowhere, as that of
    /// nobody in particular.
    fn close_inherited(&self, state: &mut State, inherited: &Inherited) -> Result<(), KernelError> {
        for (ip, endpoint) in &inherited.endpoints {
            if !state.addresses.contains_key(ip) {
                state.next_generation += 1;
                let closed = Endpoint {
                    generation: state.next_generation,
                    flags: Endpoint::STEER,
                    ..*endpoint
                };
                self.tables.put_endpoint(*ip, closed)?;
            }
        }
        for (cookie, pod) in &inherited.pods {
            if !state.pods.contains_key(cookie) {
                let nobody = Pod {
                    identity: 0,
                    pod: 0,
                    view: 0,
                    ..*pod
                };
                self.tables.put_pod(*cookie, nobody)?;
            }
        }
        Ok(())
    }

    /// Tries again what failed before, and judges the flows of pods that have come since, if there is any of that.
    pub fn retry(&self) -> Result<usize, KernelError> {
        self.delete_retired()?;
        if self.state().dirty {
            self.bring_in_line(None)
        } else {
            Ok(0)
        }
    }

    /// Tells the kernel part among which endpoints to choose. What fails is tried again.
    fn sync_services(&self, state: &mut State) {
        if self.settings.skip_service_sync && !state.services.is_empty() {
            return;
        }
        let State {
            pods,
            mesh,
            services,
            dirty,
            ..
        } = state;
        let members = pods.values().filter_map(|enrolled| {
            let endpoints = enrolled.endpoints.iter();
            Some(Member {
                workload: Arc::clone(enrolled.workload.as_ref()?),
                endpoints: endpoints
                    .map(|(ip, endpoint)| (*ip, endpoint.workload))
                    .collect(),
            })
        });
        let members: Vec<_> = members.collect();
        if let Err(error) = services.sync(mesh, &members) {
            tracing::error!(%error, "the kernel part could not be told of all services; trying again");
            *dirty = true;
        }
    }

    /// Deletes what services have no use for any more, once no program can be reading it.
    fn delete_retired(&self) -> Result<(), KernelError> {
        let retired = self.state().services.take_retired();
        if retired.is_empty() {
            return Ok(());
        }
        wait_for_running_programs();
        let mut state = self.state();
        if state.services.delete(retired)? {
            self.sync_services(&mut state);
        }
        Ok(())
    }

    /// The service behind a number in a kernel event.
    pub fn service(&self, number: u32) -> Option<ServiceName> {
        self.state().services.name(number).cloned()
    }

    /// The policy behind a number in a kernel event.
    pub fn policy(&self, number: u32) -> Option<PolicyName> {
        self.state().policies.name(number).cloned()
    }

    /// Whether this flow was cut by us; asked once, when its end is reported.
    pub fn was_revoked(&self, name: &FlowName) -> bool {
        self.revoked.take(name)
    }

    /// Destroys a connection that was established without a valid claim.
    pub fn destroy_isolated(&self, event: &FlowEvent) {
        let (client, server) = (event.client, event.server);
        let (local, remote) = if event.socket.client_end {
            (client, server)
        } else {
            (server, client)
        };
        let pod = self
            .state()
            .pods
            .get(&event.socket.netns)
            .map(|enrolled| Arc::clone(&enrolled.pod));
        let Some(pod) = pod else {
            return;
        };
        let isolated = SocketName {
            local,
            remote,
            cookie: event.socket.cookie,
        };
        if let Some(Fate::Failed(errno)) = pod.diag.destroy(&[isolated]).first() {
            let error = io::Error::from_raw_os_error(*errno);
            tracing::warn!(%error, %client, %server, "an isolated connection could not be destroyed; it stays mute");
        }
    }

    /// Cuts the flows that a view forbids. Connections need not wait meanwhile: nothing is locked.
    fn sweep(&self, view: &View) -> usize {
        let flows = match self.tables.flows() {
            Ok(flows) => flows,
            Err(error) => {
                tracing::error!(%error, "the open flows could not be read; trying again");
                self.state().dirty = true;
                return 0;
            }
        };
        let mut decisions = view.decisions();
        let forbidden = flows.into_iter().filter(|flow| !decisions.is_allowed(flow));
        let forbidden = self.revoked.note(forbidden.collect());
        let failed = view.cut(&forbidden);
        for (place, errno) in &failed {
            let Some(flow) = forbidden.get(*place) else {
                continue;
            };
            let error = io::Error::from_raw_os_error(*errno);
            tracing::error!(%error, client = %flow.client(), server = %flow.server(), "a forbidden flow could not be cut; trying again");
            self.revoked.retract(&flow.name());
        }
        if !failed.is_empty() {
            self.state().dirty = true;
        }
        forbidden.len() - failed.len()
    }

    /// Decides a pair anew, whose endpoint is known, and leaves the verdict for `connect`.
    fn give_verdict(
        &self,
        state: &mut State,
        asker: NetnsCookie,
        pair: &Pair,
    ) -> Result<(), KernelError> {
        match state.decide(asker, pair) {
            Some(decided) => self.keep_verdict(state, asker, decided),
            None => Ok(()),
        }
    }

    fn keep_verdict(
        &self,
        state: &mut State,
        asker: NetnsCookie,
        decided: Decided,
    ) -> Result<(), KernelError> {
        let Decided { key, pair, verdict } = decided;
        if let Some(evicted) = state.pairs.remember(asker, key, pair) {
            self.tables.remove_verdict(&evicted)?;
        }
        self.tables.put_verdict(key, verdict)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait_for_running_programs() {
    if let Err(error) = sys::wait_for_running_programs() {
        tracing::warn!(%error, "cannot wait for running programs; waiting a while instead");
        std::thread::sleep(PROGRAMS_TAKE);
    }
}

impl Judge for Enforcer {
    /// Decides a connection between two pods of this node and remembers the verdict for the next ones.
    ///
    /// `None` when the destination is not a pod that may be reached directly: its own agent decides.
    fn judge(
        &self,
        source: &LocalPod,
        source_ip: IpAddr,
        destination: SocketAddr,
    ) -> Option<Evaluation> {
        let mut state = self.state();
        let (endpoint, workload) = state.endpoint(destination)?;
        if endpoint.flags & Endpoint::STEER != 0 {
            return None;
        }
        let ip = if source.addresses.contains(&source_ip) {
            source_ip
        } else {
            source.ip
        };
        let connection = Connection::new(Some(source.identity.clone()), ip, destination);
        let evaluation = state.mesh.authorize(&workload, &connection);
        let pair = Pair {
            source: Source::Identity(source.identity.clone()),
            destination,
            action: action::DENY,
        };
        if state.is_waiting() {
            return Some(evaluation);
        }
        if let Err(error) = self.give_verdict(&mut state, source.cookie(), &pair) {
            // Without a verdict the next connection comes here again: slower, not wrong.
            tracing::warn!(%error, "a verdict could not be cached");
        }
        Some(evaluation)
    }
}

impl State {
    /// An earlier agent's decisions are still in force.
    fn is_waiting(&self) -> bool {
        !self.started && !self.inherited.is_empty()
    }

    /// The pod of this node that has this address, if this port of it may be reached directly.
    fn endpoint(&self, destination: SocketAddr) -> Option<(Endpoint, Arc<Workload>)> {
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
    fn decide(&mut self, asker: NetnsCookie, pair: &Pair) -> Option<Decided> {
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
            .addresses
            .iter()
            .filter(|ip| ip.is_ipv4() == destination.is_ipv4());
        let mut decisions = sources.map(|ip| {
            let connection = Connection::new(Some(identity.clone()), *ip, destination);
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
            Decision::Deny(reason) => (action::DENY, super::policy_of(reason).cloned()),
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

    /// Reads a pod's workload and policies anew; true if anything that verdicts depend on is different.
    fn refresh(&mut self, enrolled: &mut Enrolled, settings: &EnforcerSettings) -> bool {
        let workload = enrolled.pod.workload(&self.mesh).cloned();
        let applicable = workload
            .as_ref()
            .map(|workload| self.mesh.policies_for(workload))
            .unwrap_or_default();
        let flags: Vec<u32> = enrolled
            .endpoints
            .iter()
            .map(|(ip, _)| {
                let reachable = settings.direct
                    && workload.as_ref().is_some_and(|workload| {
                        self.may_be_direct(workload, &enrolled.pod, *ip, &settings.network)
                    });
                match reachable {
                    // Not in the mesh (yet), or not as a tunnel's end: the agent knows what to do with each connection.
                    false => Endpoint::STEER,
                    true if applicable.looks_at_addresses() => Endpoint::BY_POD,
                    true => 0,
                }
            })
            .collect();
        let same = enrolled
            .endpoints
            .iter()
            .zip(&flags)
            .all(|((_, endpoint), flags)| endpoint.generation != 0 && endpoint.flags == *flags);
        if same && workload == enrolled.workload && applicable == enrolled.applicable {
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
        enrolled.workload = workload;
        enrolled.applicable = applicable;
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

    fn pod_entry(&mut self, enrolled: &Enrolled) -> Pod {
        // A pod that the mesh does not know at this address has an identity, but nobody has said what it may do.
        let outside = enrolled.workload.as_ref().is_none_or(|workload| {
            workload.protocol != TunnelProtocol::Hbone || !workload.has_address(enrolled.pod.ip)
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
            } else {
                0
            },
            view: self.services.view_of(enrolled.workload.as_deref()),
            devices,
        }
    }

    /// What open flows are judged by; `None` before [`Enforcer::start`], while pods of an earlier agent may still be missing,
    /// and before there is a mesh to judge by: what an earlier agent admitted goes on until then.
    fn view(&self) -> Option<View> {
        (self.started && self.known).then(|| View {
            mesh: Arc::clone(&self.mesh),
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
        })
    }

    /// By the number of the workload.
    fn generations(&self) -> HashMap<u32, u64> {
        self.pods
            .values()
            .flat_map(|enrolled| &enrolled.endpoints)
            .map(|(_, endpoint)| (endpoint.workload, endpoint.generation))
            .collect()
    }
}
