//! Keeps the kernel part's tables true: who is where, under which generation, and what was decided.
//!
//! Invariant: what the tables say belongs to the one mesh snapshot in `State`. A change is made under the lock (`change.rs`).

mod change;
mod inherited;
mod later;
mod numbers;
mod pairs;
mod services;
mod state;
mod sweep;

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use culvert_abi::{Endpoint, action};

use crate::{
    enrol::{KnownPod, LocalPod, PodSpec, belongs_to_another},
    kernel::{EventSocket, FlowName, KernelError, NetnsCookie, OpenFlow, SocketName, Tables, sys},
    mesh::{Mesh, ServiceName},
    policy::{Applicable, Connection, Evaluation, PolicyName},
    proxy::{Judge, LaterPolicies},
    telemetry::FlowEnd,
};
use change::wait_for_running_programs;
use inherited::Inherited;
use later::Attached;
use numbers::Numbers;
use pairs::{Pair, Pairs, Source};
use services::{Member, Services};
use state::{Decided, Enrolled, State};
use sweep::Cuts;
pub use sweep::View;

/// What the enforcer follows besides the mesh.
#[derive(Clone, Debug)]
pub struct EnforcerSettings {
    /// This node's network.
    pub network: Arc<str>,
    /// Of identities that do not name theirs.
    pub trust_domain: Arc<str>,
    /// Pods may talk to each other directly.
    pub direct: bool,
    /// What policies that are attached while direct flows are open mean for those.
    pub later_policies: LaterPolicies,
    /// A test has switched off what follows a change of policy.
    pub skip_sweep: bool,
    /// A test has switched off that a pod's verdicts are bounded in number.
    pub keep_old_verdicts: bool,
    /// A test has switched off that what the kernel part knows of services follows the mesh, once it knows any.
    pub skip_service_sync: bool,
    /// A test has switched off that an address which the mesh gives to another is not a pod's.
    pub keep_foreign_addresses: bool,
}

/// The feeder of the kernel part.
pub struct Enforcer {
    tables: Arc<Tables>,
    settings: EnforcerSettings,
    state: Mutex<State>,
    cuts: Cuts,
    /// Forbidden flows could not be cut.
    owed: AtomicBool,
    /// How many, when somebody was last told.
    said: AtomicUsize,
}

impl Enforcer {
    /// Takes the tables over. What an earlier agent decided stands until [`Self::start`].
    pub fn new(tables: Arc<Tables>, settings: EnforcerSettings) -> Result<Self, KernelError> {
        let inherited = Inherited::read(&tables)?;
        if inherited.is_empty() {
            tables.set_changing(false)?;
            tables.vouch()?;
        }
        // Unique over the agents of one boot.
        let now = now();
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
            dropped: Vec::new(),
            waiting: Vec::new(),
            next_generation: now.max(inherited.highest_generation()) + 1,
            next_pod: first,
            inherited,
            started: false,
            known: false,
            dirty: false,
            has_void_verdicts: false,
        };
        Ok(Self {
            tables,
            settings,
            state: Mutex::new(state),
            cuts: Cuts::default(),
            owed: AtomicBool::new(false),
            said: AtomicUsize::new(0),
        })
    }

    /// Pods of an earlier agent that cannot be served yet: their open flows are judged as theirs. Those of one that waits no more
    /// are judged again.
    pub fn set_waiting(&self, pods: Vec<KnownPod>) {
        let mut state = self.state();
        let is_gone = |old: &KnownPod| pods.iter().all(|pod| pod.cookie != old.cookie);
        if state.waiting.iter().any(is_gone) {
            self.owed.store(true, Ordering::Release);
        }
        state.waiting = pods;
    }

    /// Of a pod's addresses, those that the mesh gives to another workload, and those that are its own.
    pub fn sort_addresses(
        &self,
        spec: &PodSpec,
        mesh: &Mesh,
        ips: Vec<IpAddr>,
    ) -> (Vec<IpAddr>, Vec<IpAddr>) {
        let own = spec.workload(mesh).map(AsRef::as_ref);
        ips.into_iter().partition(|ip| {
            !self.settings.keep_foreign_addresses
                && belongs_to_another(own, mesh, &self.settings.network, *ip)
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
            attached: Attached::default(),
            endpoints: pod
                .addresses()
                .into_iter()
                .map(|ip| (ip, unknown))
                .collect(),
            pod,
        };
        state.refresh(&mut enrolled, &self.settings, now());
        // One that an earlier agent had is left as it was, unless it was removed meanwhile: then it is nobody in particular yet.
        let waiting = state.is_waiting();
        state.dirty |= waiting;
        let stands = waiting
            && self
                .tables
                .pods()?
                .iter()
                .any(|(found, _)| *found == cookie);
        if !stands && let Err(error) = self.write(&mut state, &enrolled) {
            state.addresses.retain(|_, has| *has != cookie);
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

    /// The pod first: what is on its way to it arrives when it is known to leave, not where only its endpoint is missing.
    fn erase(&self, enrolled: &Enrolled) -> Result<(), KernelError> {
        self.tables.remove_pod(enrolled.pod.cookie())?;
        for (ip, _) in &enrolled.endpoints {
            self.tables.remove_endpoint(*ip)?;
        }
        Ok(())
    }

    /// Removes a pod. Its direct flows go on where policy would let a client without an identity in: the others are to be cut by
    /// what is returned.
    pub fn remove(&self, pod: &LocalPod) -> Result<Option<View>, KernelError> {
        let cookie = pod.cookie();
        let mut state = self.state();
        if let Some(enrolled) = state.pods.remove(&cookie) {
            self.erase(&enrolled)?;
            for (ip, _) in &enrolled.endpoints {
                state.addresses.remove(ip);
            }
        }
        if state.is_waiting() {
            // The rest is an earlier agent's, until it is replaced as a whole.
            return Ok(None);
        }
        self.sync_services(&mut state);
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
        let forgotten = pairs.forget(|asker, pair| {
            asker == cookie || !addresses.contains_key(&pair.destination.ip())
        });
        self.tables.remove_verdicts(&forgotten)?;
        state.has_void_verdicts = true;
        Ok(state.view(&self.settings))
    }

    /// Deletes what claims a pod that has left still has. What was on its way when it left must have arrived: without its claim it would
    /// be cut.
    pub fn forget_claims(&self, pod: &LocalPod) -> Result<(), KernelError> {
        self.tables.remove_claims(pod.cookie())
    }

    /// Tries again what failed before, clears up, and judges the flows of pods that have come since, if there is any of that.
    pub fn retry(&self) -> Result<usize, KernelError> {
        self.delete_retired()?;
        let mut cut = if self.state().dirty {
            self.bring_in_line(None)?
        } else {
            0
        };
        cut += self.sweep_owed();
        self.delete_void_verdicts()?;
        Ok(cut)
    }

    fn sweep_owed(&self) -> usize {
        // Whatever else cannot be cut meanwhile is noted again.
        if !self.owed.swap(false, Ordering::AcqRel) {
            return 0;
        }
        let view = self.state().view(&self.settings);
        match view {
            Some(view) => self.sweep(&view),
            None => {
                self.owed.store(true, Ordering::Release);
                0
            }
        }
    }

    /// Tells the kernel part among which endpoints to choose. What fails is tried again.
    fn sync_services(&self, state: &mut State) {
        if !self.tables.is_owner() {
            return;
        }
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

    /// Makes room: a void verdict decides nothing, but the table, which is read whole for this, holds it. Not with each change,
    /// whose flows are waiting to be cut.
    fn delete_void_verdicts(&self) -> Result<(), KernelError> {
        let mut state = self.state();
        if !state.has_void_verdicts || state.is_waiting() || self.settings.skip_sweep {
            return Ok(());
        }
        let generations = state.generations();
        self.tables.sweep_verdicts(|key, verdict| {
            generations.get(&key.workload) != Some(&verdict.generation)
        })?;
        state.has_void_verdicts = false;
        Ok(())
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

    /// Why this flow was cut by us, if it was; asked once, when its end is reported.
    pub fn cut_as(&self, name: &FlowName) -> Option<FlowEnd> {
        self.cuts.take(name)
    }

    /// Resets a short-circuited flow whose reader cannot see what was sent. Returns whether it was open. Blocks.
    pub fn cut_stuck(&self, flow: &OpenFlow) -> bool {
        let Some(view) = self.state().view(&self.settings) else {
            return false;
        };
        let stuck = self.cuts.note(vec![*flow], FlowEnd::Stuck);
        !stuck.is_empty() && view.cut(&stuck).is_empty()
    }

    /// Has a connection destroyed that was established without a valid claim. Waits for nothing.
    pub fn destroy_isolated(
        &self,
        (client, server): (SocketAddr, SocketAddr),
        socket: EventSocket,
    ) {
        let (local, remote) = if socket.client_end {
            (client, server)
        } else {
            (server, client)
        };
        let pod = self
            .state()
            .pods
            .get(&socket.netns)
            .map(|enrolled| Arc::clone(&enrolled.pod));
        let Some(pod) = pod else {
            return;
        };
        let isolated = SocketName {
            local,
            remote,
            cookie: socket.cookie,
        };
        pod.diag.destroy_soon(isolated);
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
        self.tables.put_verdict(key, verdict)?;
        match state.pairs.remember(asker, key, pair) {
            Some(evicted) if !self.settings.keep_old_verdicts => {
                self.tables.remove_verdict(&evicted)
            }
            _ => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// In nanoseconds of the boot's monotonic clock, as the kernel part dates flows.
fn now() -> u64 {
    u64::try_from(sys::monotonic_now().as_nanos()).unwrap_or(u64::MAX / 2)
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
        let ip = if source.has_address(source_ip) {
            source_ip
        } else {
            // One that has none any more is nowhere.
            let own = source.addresses().into_iter().next();
            own.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
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
