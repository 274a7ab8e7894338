//! Cutting the open direct flows that one moment's pods and policies forbid.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::later::Attached;
use crate::{
    enrol::LocalPod,
    kernel::{Asked, Fate, FlowName, NetnsCookie, OpenFlow, Outcome, SocketName},
    mesh::{Mesh, Workload},
    policy::{Connection, Identity},
    telemetry::FlowEnd,
};

/// Cut flows remembered until their end was reported; older ones lose their reason, nothing else.
const CUTS_KEPT: usize = 65_536;

/// How long clients' ends keep servers' ends waiting, if a client's namespace is slow.
const CLIENTS_FIRST: Duration = Duration::from_millis(20);

/// The flows that were cut and whose end nobody has reported yet. Noted before they are cut: the report may be quick.
#[derive(Default)]
pub struct Cuts {
    names: Mutex<HashMap<FlowName, FlowEnd>>,
    /// How many, for those who would ask about each of many flows.
    count: AtomicUsize,
}

impl Cuts {
    /// Notes flows that are about to be cut, and why; returns those that were not noted before.
    pub fn note(&self, flows: Vec<OpenFlow>, why: FlowEnd) -> Vec<OpenFlow> {
        self.change(|names| {
            if names.len() + flows.len() > CUTS_KEPT {
                names.clear();
            }
            let new = flows
                .into_iter()
                .filter(|flow| names.insert(flow.name(), why).is_none());
            new.collect()
        })
    }

    /// A flow that could not be cut.
    pub fn retract(&self, name: &FlowName) {
        self.change(|names| names.remove(name));
    }

    /// Why this flow was cut, if it was; asked once, when its end is reported.
    pub fn take(&self, name: &FlowName) -> Option<FlowEnd> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.change(|names| names.remove(name))
    }

    fn change<T>(&self, change: impl FnOnce(&mut HashMap<FlowName, FlowEnd>) -> T) -> T {
        let mut names: MutexGuard<'_, _> =
            self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut names);
        self.count.store(names.len(), Ordering::Release);
        result
    }
}

/// One moment's pods and mesh.
pub struct View {
    pub mesh: Arc<Mesh>,
    pub pods: HashMap<NetnsCookie, (Arc<LocalPod>, Option<Arc<Workload>>)>,
    /// Since when which policies are attached, of pods whose flows that makes a difference for.
    pub attached: HashMap<NetnsCookie, Attached>,
    /// Pods that cannot be served yet: who they are, and which addresses are theirs.
    pub waiting: HashMap<NetnsCookie, (Identity, Vec<IpAddr>)>,
}

/// What a decision depends on: flows of one pair are decided once.
type Question = (u64, IpAddr, u64, SocketAddr, Option<u64>);

/// Decides flows under one [`View`].
pub struct Decisions<'a> {
    view: &'a View,
    known: HashMap<Question, bool>,
}

impl View {
    pub fn decisions(&self) -> Decisions<'_> {
        Decisions {
            view: self,
            known: HashMap::new(),
        }
    }

    fn is_allowed(&self, flow: &OpenFlow) -> bool {
        // A destination that left the mesh is not ours to guard; a source that left it is nobody.
        let Some((_, workload)) = self.pods.get(&NetnsCookie(flow.flow.server_netns)) else {
            return true;
        };
        let Some(workload) = workload else {
            return false;
        };
        let client = NetnsCookie(flow.flow.client_netns);
        let address = flow.client().ip();
        let source = match self.pods.get(&client) {
            // Nobody keeps what he has reached from another's address.
            Some((pod, _)) if pod.is_foreign(address) => return false,
            Some((pod, _)) => Some(pod.identity.clone()),
            None => match self.waiting.get(&client) {
                Some((_, own)) if !own.contains(&address) => return false,
                waiting => waiting.map(|(identity, _)| identity.clone()),
            },
        };
        let connection = Connection::new(source, address, flow.server());
        let evaluation = match self.attached(flow) {
            Some(attached) => self.mesh.authorize_open(workload, &connection, |policy| {
                attached.counts(policy, flow.flow.opened_ns)
            }),
            None => self.mesh.authorize(workload, &connection),
        };
        evaluation.is_allowed()
    }

    fn attached(&self, flow: &OpenFlow) -> Option<&Attached> {
        self.attached.get(&NetnsCookie(flow.flow.server_netns))
    }

    /// Destroys both ends of each: each application is told at once, also when segments between them are lost. Returns which
    /// flows may live on, by their place, with the error's number.
    pub fn cut(&self, flows: &[OpenFlow]) -> HashMap<usize, i32> {
        // The clients' ends first: what they tell the servers' ends saves most of the second half.
        let clients = flows
            .iter()
            .map(|flow| (flow.flow.client_netns, flow.client_end()));
        let clients = self.begin(clients);
        let until = Instant::now() + CLIENTS_FIRST;
        let mut failed = HashMap::new();
        let late: Vec<Begun> = clients
            .into_iter()
            .filter_map(|begun| begun.until(until, &mut failed))
            .collect();
        let servers = flows
            .iter()
            .map(|flow| (flow.flow.server_netns, flow.server_end()));
        for begun in late.into_iter().chain(self.begin(servers)) {
            let Begun { places, asked } = begun;
            note(&places, asked.wait(), &mut failed);
        }
        failed
    }

    /// Begins to destroy ends, in all namespaces at once: one that does not answer holds no other up.
    fn begin(&self, ends: impl Iterator<Item = (u64, SocketName)>) -> Vec<Begun> {
        let mut by_netns = HashMap::<u64, (Vec<usize>, Vec<SocketName>)>::new();
        for (place, (netns, end)) in ends.enumerate() {
            let (places, names) = by_netns.entry(netns).or_default();
            places.push(place);
            names.push(end);
        }
        let of_pods = by_netns.into_iter().filter_map(|(netns, (places, names))| {
            let (pod, _) = self.pods.get(&NetnsCookie(netns))?;
            let asked = pod.diag.destroy(names);
            Some(Begun { places, asked })
        });
        of_pods.collect()
    }
}

/// Ends in one namespace that are being destroyed.
struct Begun {
    /// Of their flows.
    places: Vec<usize>,
    asked: Asked<Fate>,
}

impl Begun {
    /// Waits for a while; itself, if that was not enough.
    fn until(self, until: Instant, failed: &mut HashMap<usize, i32>) -> Option<Self> {
        match self.asked.wait_until(until) {
            Outcome::Answer(fates) => note(&self.places, Some(fates), failed),
            Outcome::Lost => note(&self.places, None, failed),
            Outcome::NotYet => return Some(self),
        }
        None
    }
}

fn note(places: &[usize], fates: Option<Vec<Fate>>, failed: &mut HashMap<usize, i32>) {
    match fates {
        Some(fates) => {
            for (place, fate) in places.iter().zip(fates) {
                if let Fate::Failed(errno) = fate {
                    failed.insert(*place, errno);
                }
            }
        }
        None => failed.extend(places.iter().map(|place| (*place, libc::ETIMEDOUT))),
    }
}

impl Decisions<'_> {
    pub fn is_allowed(&mut self, flow: &OpenFlow) -> bool {
        let question = (
            flow.flow.client_netns,
            flow.client().ip(),
            flow.flow.server_netns,
            flow.server(),
            self.view.attached(flow).map(|_| flow.flow.opened_ns),
        );
        *self
            .known
            .entry(question)
            .or_insert_with(|| self.view.is_allowed(flow))
    }
}
