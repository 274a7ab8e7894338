//! Keeps the kernel part's tables true: who is where, under which generation, and what was decided.
//!
//! Invariant: what the tables say belongs to the one mesh snapshot in `State`. A change is made under the lock: first the
//! endpoints' generations, which void every verdict at once, then the sweep over open flows, again after every program that
//! may have read the old generation has ended.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use culvert_abi::{Endpoint, FlowKey, OWN_PORTS, Pod, Verdict, VerdictKey, action, scope};

use crate::{
    enrol::LocalPod,
    kernel::{FlowEvent, KernelError, NetnsCookie, OpenFlow, Tables, address, socket_address, sys},
    mesh::{Mesh, TunnelProtocol, Workload},
    policy::{Applicable, Connection, Decision, Evaluation, Identity, PolicyName},
    proxy::Judge,
};

/// Revoked flows remembered until their end was reported; older ones lose their reason, nothing else.
const REVOKED_KEPT: usize = 65_536;

/// Far more than a program of ours runs, where the kernel offers no better way to wait for its end.
const PROGRAMS_TAKE: Duration = Duration::from_millis(100);

/// Names a flow: the key alone is used again.
pub type FlowName = (FlowKey, u32);

/// The feeder of the kernel part.
pub struct Enforcer {
    tables: Arc<Tables>,
    /// A test has switched off what follows a change of policy.
    skip_sweep: bool,
    state: Mutex<State>,
}

struct State {
    mesh: Arc<Mesh>,
    pods: HashMap<NetnsCookie, Enrolled>,
    identities: Numbers<Identity>,
    workloads: Numbers<Arc<str>>,
    policies: Numbers<PolicyName>,
    next_generation: u64,
    next_pod: u32,
    revoked: HashSet<FlowName>,
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
    endpoint: Endpoint,
}

/// One moment's pods and mesh.
struct View {
    mesh: Arc<Mesh>,
    pods: HashMap<NetnsCookie, (Arc<LocalPod>, Option<Arc<Workload>>)>,
}

impl View {
    fn is_allowed(&self, flow: &OpenFlow) -> bool {
        // A destination that left the mesh is not ours to guard; a source that left it is nobody.
        let Some((_, workload)) = self.pods.get(&NetnsCookie(flow.flow.server_netns)) else {
            return true;
        };
        let Some(workload) = workload else {
            return false;
        };
        let source = self
            .pods
            .get(&NetnsCookie(flow.flow.client_netns))
            .map(|(pod, _)| pod.identity.clone());
        let connection = Connection::new(source, flow.client().ip(), flow.server());
        self.mesh.authorize(workload, &connection).is_allowed()
    }

    /// Destroys both ends: each is told at once, also when segments between them are lost.
    fn cut(&self, flow: &OpenFlow) -> io::Result<()> {
        let (client, server) = (flow.client(), flow.server());
        let ends = [
            (
                flow.flow.server_netns,
                server,
                client,
                flow.flow.server_socket,
            ),
            (
                flow.flow.client_netns,
                client,
                server,
                flow.flow.client_socket,
            ),
        ];
        let mut result = Ok(());
        for (netns, local, remote, cookie) in ends {
            if let Some((pod, _)) = self.pods.get(&NetnsCookie(netns))
                && let Err(error) = pod.destroyer.destroy(local, remote, cookie)
            {
                result = Err(error);
            }
        }
        result
    }
}

/// Numbers for names; a number is never used for another name, and 0 names nothing.
struct Numbers<T> {
    numbers: HashMap<T, u32>,
    next: u32,
}

impl<T: Hash + Eq + Clone> Numbers<T> {
    fn new() -> Self {
        Self {
            numbers: HashMap::new(),
            next: 1,
        }
    }

    fn of(&mut self, name: &T) -> u32 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = self.next;
        self.next = self.next.saturating_add(1);
        self.numbers.insert(name.clone(), number);
        number
    }

    fn name(&self, number: u32) -> Option<&T> {
        self.numbers
            .iter()
            .find(|(_, known)| **known == number)
            .map(|(name, _)| name)
    }

    fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.numbers.retain(|name, _| keep(name));
    }
}

impl Enforcer {
    /// Takes the tables over. What an earlier agent decided is void: its numbers mean nothing to this one.
    pub fn new(tables: Arc<Tables>, skip_sweep: bool) -> Result<Self, KernelError> {
        // Unique over the agents of one boot.
        let mut next_generation =
            u64::try_from(sys::monotonic_now().as_nanos()).unwrap_or(u64::MAX / 2);
        // Pods stay in the mesh (their traffic goes to an agent or nowhere), but as nobody in particular.
        for (cookie, pod) in tables.pods() {
            tables.put_pod(
                cookie,
                Pod {
                    identity: 0,
                    workload: 0,
                    pod: 0,
                    ..pod
                },
            )?;
        }
        for (address, endpoint) in tables.endpoints() {
            next_generation += 1;
            let closed = Endpoint {
                generation: next_generation,
                flags: Endpoint::STEER,
                ..endpoint
            };
            tables.put_endpoint(socket_address(address, 0).ip(), closed)?;
        }
        tables.sweep_verdicts(|_, _| true)?;
        let state = State {
            mesh: Arc::default(),
            pods: HashMap::new(),
            identities: Numbers::new(),
            workloads: Numbers::new(),
            policies: Numbers::new(),
            next_generation: next_generation + 1,
            next_pod: 1,
            revoked: HashSet::new(),
            started: false,
            known: false,
            dirty: false,
        };
        Ok(Self {
            tables,
            skip_sweep,
            state: Mutex::new(state),
        })
    }

    /// Enters a pod: from now on its connections are decided, as client and as server.
    pub fn add(&self, pod: Arc<LocalPod>) -> Result<(), KernelError> {
        let mut state = self.state();
        let number = state.next_pod;
        state.next_pod = state.next_pod.saturating_add(1);
        let mut enrolled = Enrolled {
            number,
            workload: None,
            applicable: Applicable::default(),
            endpoint: Endpoint {
                netns_cookie: pod.cookie().0,
                workload: 0,
                flags: 0,
                generation: 0,
            },
            pod,
        };
        state.refresh(&mut enrolled);
        let cookie = enrolled.pod.cookie();
        self.tables
            .put_endpoint(enrolled.pod.ip, enrolled.endpoint)?;
        let entry = state.pod_entry(&enrolled);
        if let Err(error) = self.tables.put_pod(cookie, entry) {
            self.tables.remove_endpoint(enrolled.pod.ip)?;
            return Err(error);
        }
        state.pods.insert(cookie, enrolled);
        // It may have open flows of an earlier enrolment, which nobody has judged while it was away.
        state.dirty |= state.started;
        Ok(())
    }

    /// Removes a pod. Its direct flows go on where policy would let a client without an identity in.
    pub fn remove(&self, pod: &LocalPod) -> Result<(), KernelError> {
        let cookie = pod.cookie();
        let view = {
            let mut state = self.state();
            self.tables.remove_endpoint(pod.ip)?;
            self.tables.remove_pod(cookie)?;
            self.tables.remove_claims(cookie)?;
            state.pods.remove(&cookie);
            let used: HashSet<_> = state
                .pods
                .values()
                .map(|other| other.pod.identity.clone())
                .collect();
            state.identities.retain(|identity| used.contains(identity));
            let used: HashSet<_> = state
                .pods
                .values()
                .filter_map(|other| Some(Arc::clone(&other.workload.as_ref()?.uid)))
                .collect();
            state.workloads.retain(|uid| used.contains(uid));
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

    /// All pods of an earlier agent are back: from now on open flows are judged, beginning with those that are there.
    pub fn start(&self) -> Result<usize, KernelError> {
        {
            let mut state = self.state();
            state.started = true;
            state.dirty = true;
        }
        self.bring_in_line(None)
    }

    /// Brings the kernel in line with a new mesh; returns how many direct flows it cut.
    ///
    /// What could not be written or cut is noted, and [`Self::retry`] tries again.
    pub fn apply(&self, mesh: Arc<Mesh>) -> Result<usize, KernelError> {
        self.bring_in_line(Some(mesh))
    }

    fn bring_in_line(&self, mesh: Option<Arc<Mesh>>) -> Result<usize, KernelError> {
        let mut failed = None;
        let view = {
            let mut state = self.state();
            if let Some(mesh) = mesh {
                state.mesh = mesh;
                state.known = true;
            }
            let again = std::mem::take(&mut state.dirty);
            let mut changed = again;
            let mut pods = std::mem::take(&mut state.pods);
            for (cookie, enrolled) in &mut pods {
                if !state.refresh(enrolled) && !again {
                    continue;
                }
                changed = true;
                let entry = state.pod_entry(enrolled);
                let written = self
                    .tables
                    .put_endpoint(enrolled.pod.ip, enrolled.endpoint)
                    .and_then(|()| self.tables.put_pod(*cookie, entry));
                if let Err(error) = written {
                    state.dirty = true;
                    failed = Some(error);
                }
            }
            state.pods = pods;
            if changed && !self.skip_sweep {
                state.view()
            } else {
                None
            }
        };
        let Some(view) = view else {
            return failed.map_or(Ok(0), Err);
        };
        let mut cut = self.sweep(&view);
        // Programs that read the old generation before it changed may make a flow after the first sweep.
        if let Err(error) = sys::wait_for_running_programs() {
            tracing::warn!(%error, "cannot wait for running programs; waiting a while instead");
            std::thread::sleep(PROGRAMS_TAKE);
        }
        cut += self.sweep(&view);
        let mut state = self.state();
        let generations = state.generations();
        self.tables.sweep_verdicts(|key, verdict| {
            generations.get(&key.workload) != Some(&verdict.generation)
        })?;
        let policies: HashSet<_> = state
            .mesh
            .policies()
            .map(|policy| policy.name.clone())
            .collect();
        state.policies.retain(|name| policies.contains(name));
        failed.map_or(Ok(cut), Err)
    }

    /// Tries again what failed before, and judges the flows of pods that have come since, if there is any of that.
    pub fn retry(&self) -> Result<usize, KernelError> {
        if self.state().dirty {
            self.bring_in_line(None)
        } else {
            Ok(0)
        }
    }

    /// The policy behind a number in a kernel event.
    pub fn policy(&self, number: u32) -> Option<PolicyName> {
        self.state().policies.name(number).cloned()
    }

    /// The direct flows that are open now.
    pub fn open_flows(&self) -> HashSet<FlowName> {
        self.tables
            .flows()
            .iter()
            .map(|flow| (flow.key, flow.flow.sequence))
            .collect()
    }

    /// Whether this flow was cut by us; asked once, when its end is reported.
    pub fn was_revoked(&self, key: &FlowKey, sequence: u32) -> bool {
        self.state().revoked.remove(&(*key, sequence))
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
        if let Some(pod) = pod
            && let Err(error) = pod.destroyer.destroy(local, remote, event.socket.cookie)
        {
            tracing::warn!(%error, %client, %server, "an isolated connection could not be destroyed; it stays mute");
        }
    }

    /// Cuts the flows that a view forbids. Connections need not wait meanwhile: nothing is locked.
    fn sweep(&self, view: &View) -> usize {
        let mut cut = 0;
        for flow in self.tables.flows() {
            let name = (flow.key, flow.flow.sequence);
            if view.is_allowed(&flow) || self.state().revoked.contains(&name) {
                continue;
            }
            match view.cut(&flow) {
                Ok(()) => {
                    self.state().remember_revoked(name);
                    cut += 1;
                }
                Err(error) => {
                    tracing::error!(%error, client = %flow.client(), server = %flow.server(), "a forbidden flow could not be cut; trying again");
                    self.state().dirty = true;
                }
            }
        }
        cut
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Judge for Enforcer {
    /// Decides a connection between two pods of this node and remembers the verdict for the next ones.
    ///
    /// `None` when the destination is not a pod that may be reached directly: its own agent decides.
    fn judge(&self, source: &LocalPod, destination: SocketAddr) -> Option<Evaluation> {
        let mut state = self.state();
        let enrolled = state
            .pods
            .values()
            .find(|enrolled| enrolled.pod.ip == destination.ip())?;
        if enrolled.endpoint.flags & Endpoint::STEER != 0 || OWN_PORTS.contains(&destination.port())
        {
            return None;
        }
        let workload = Arc::clone(enrolled.workload.as_ref()?);
        let endpoint = enrolled.endpoint;
        let connection = Connection::new(Some(source.identity.clone()), source.ip, destination);
        let evaluation = state.mesh.authorize(&workload, &connection);
        let (action, policy) = match &evaluation.decision {
            Decision::Allow(permit) => (action::ALLOW, permit.policy().cloned()),
            Decision::Deny(reason) => (action::DENY, super::policy_of(reason).cloned()),
        };
        let number = state
            .pods
            .get(&source.cookie())
            .map(|enrolled| enrolled.number)?;
        let by_pod = endpoint.flags & Endpoint::BY_POD != 0;
        let key = VerdictKey {
            source: if by_pod {
                number
            } else {
                state.identities.of(&source.identity)
            },
            workload: endpoint.workload,
            port: destination.port(),
            scope: if by_pod { scope::POD } else { scope::IDENTITY },
            padding: 0,
        };
        let policy = policy.map_or(0, |name| state.policies.of(&name));
        let verdict = Verdict {
            generation: endpoint.generation,
            action,
            policy,
        };
        if let Err(error) = self.tables.put_verdict(key, verdict) {
            // Without a verdict the next connection comes here again: slower, not wrong.
            tracing::warn!(%error, "a verdict could not be cached");
        }
        Some(evaluation)
    }
}

impl State {
    /// Reads a pod's workload and policies anew; true if anything that verdicts depend on is different.
    fn refresh(&mut self, enrolled: &mut Enrolled) -> bool {
        let workload = enrolled.pod.workload(&self.mesh).cloned();
        let applicable = workload
            .as_ref()
            .map(|workload| self.mesh.policies_for(workload))
            .unwrap_or_default();
        let first = enrolled.endpoint.generation == 0;
        if !first && workload == enrolled.workload && applicable == enrolled.applicable {
            return false;
        }
        let mut flags = 0;
        match &workload {
            Some(workload)
                if workload.protocol == TunnelProtocol::Hbone
                    && workload.waypoint.is_none()
                    && workload.identity() == &enrolled.pod.identity
                    && workload.has_address(enrolled.pod.ip) =>
            {
                if applicable.looks_at_addresses() {
                    flags |= Endpoint::BY_POD;
                }
            }
            // Not in the mesh (yet), or not as a tunnel's end: the agent knows what to do with each connection.
            _ => flags |= Endpoint::STEER,
        }
        self.next_generation += 1;
        enrolled.endpoint.generation = self.next_generation;
        enrolled.endpoint.flags = flags;
        enrolled.endpoint.workload = workload
            .as_ref()
            .map_or(0, |workload| self.workloads.of(&workload.uid));
        enrolled.workload = workload;
        enrolled.applicable = applicable;
        true
    }

    fn pod_entry(&mut self, enrolled: &Enrolled) -> Pod {
        // A pod that the mesh does not know at this address has an identity, but nobody has said what it may do.
        let outside = enrolled.workload.as_ref().is_none_or(|workload| {
            workload.protocol != TunnelProtocol::Hbone || !workload.has_address(enrolled.pod.ip)
        });
        Pod {
            address: address(enrolled.pod.ip),
            identity: self.identities.of(&enrolled.pod.identity),
            workload: enrolled.endpoint.workload,
            pod: enrolled.number,
            flags: if outside { Pod::NO_DIRECT } else { 0 },
            device: enrolled.pod.device,
            padding: 0,
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

    fn remember_revoked(&mut self, name: FlowName) {
        if self.revoked.len() >= REVOKED_KEPT {
            self.revoked.clear();
        }
        self.revoked.insert(name);
    }

    fn generations(&self) -> HashMap<u32, u64> {
        self.pods
            .values()
            .map(|enrolled| (enrolled.endpoint.workload, enrolled.endpoint.generation))
            .collect()
    }
}
