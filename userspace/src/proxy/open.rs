//! The proxied connections into this node's pods, so that a change of policy cuts those it forbids.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

use super::{ProxyKnobs, inbound, report::Cut, workers::Worker};
use crate::{
    enrol::LocalPod,
    mesh::{Mesh, Workload},
    policy::Connection,
};

/// Connections that a data thread cuts before it turns to others again, some milliseconds at most.
const AT_ONCE: usize = 128;

/// All of them.
#[derive(Default)]
pub struct OpenConnections {
    table: Mutex<Table>,
    later_policies: LaterPolicies,
}

/// What a policy with a selector means, once it is attached to a workload, for connections that are open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LaterPolicies {
    /// The same as for new ones.
    #[default]
    Apply,
    /// Nothing; those attached before go on to apply, also when they change.
    Spare,
}

#[derive(Default)]
struct Table {
    next: u64,
    /// In the order of their beginning: neighbours mostly share a tunnel.
    open: BTreeMap<u64, Entry>,
}

struct Entry {
    pod: Arc<LocalPod>,
    connection: Connection,
    /// What it was opened to, as that was then: where policies attached later spare it.
    opened_to: Option<Arc<Workload>>,
    /// Where it runs.
    worker: Worker,
    cancel: CancellationToken,
    revoked: Arc<AtomicBool>,
}

/// What one data thread is to cut.
struct Sentence {
    worker: Worker,
    connections: Vec<CancellationToken>,
}

/// Keeps one connection in the table.
pub(super) struct OpenConnection {
    owner: Arc<OpenConnections>,
    id: u64,
    pub cancel: CancellationToken,
    revoked: Arc<AtomicBool>,
}

impl OpenConnections {
    pub fn new(later_policies: LaterPolicies) -> Self {
        Self {
            table: Mutex::default(),
            later_policies,
        }
    }

    /// Enters a connection. To be called before the mesh is loaded that policy is asked of: a change in between is
    /// then seen by one of the two. Policies that the pod's workload does not list in `now` are attached later.
    pub(super) fn enter(
        self: &Arc<Self>,
        pod: &Arc<LocalPod>,
        now: &Mesh,
        connection: &Connection,
        worker: &Worker,
        parent: &CancellationToken,
    ) -> OpenConnection {
        let cancel = parent.child_token();
        let revoked = Arc::<AtomicBool>::default();
        let entry = Entry {
            pod: Arc::clone(pod),
            connection: connection.clone(),
            opened_to: match self.later_policies {
                LaterPolicies::Apply => None,
                LaterPolicies::Spare => pod.workload(now).cloned(),
            },
            worker: worker.clone(),
            cancel: cancel.clone(),
            revoked: Arc::clone(&revoked),
        };
        let mut table = self.table();
        table.next = table.next.wrapping_add(1);
        let id = table.next;
        table.open.insert(id, entry);
        OpenConnection {
            owner: Arc::clone(self),
            id,
            cancel,
            revoked,
        }
    }

    /// Cuts what `mesh` forbids; returns how many.
    pub fn reauthorize(&self, mesh: &Mesh, knobs: ProxyKnobs) -> usize {
        if !knobs.reauthorizes() {
            return 0;
        }
        let mut cut = 0;
        for Sentence {
            worker,
            connections,
        } in self.forbid(mesh, knobs)
        {
            cut += connections.len();
            worker.tasks.spawn_on(execute(connections), &worker.handle);
        }
        cut
    }

    /// Marks those that `mesh` forbids, and returns what ends them.
    fn forbid(&self, mesh: &Mesh, knobs: ProxyKnobs) -> Vec<Sentence> {
        let table = self.table();
        // Connections of one pair are decided once.
        let mut known = HashMap::new();
        let forbidden = table.open.values().filter(|entry| {
            let opened_to = entry.opened_to.as_deref();
            let then = opened_to.map(std::ptr::from_ref::<Workload>);
            let question = (entry.pod.cookie(), &entry.connection, then);
            let denied = *known.entry(question).or_insert_with(|| {
                inbound::authorize(mesh, &entry.pod, &entry.connection, opened_to, knobs).is_err()
            });
            denied && !entry.revoked.swap(true, Ordering::Relaxed)
        });
        let mut sentences = HashMap::<usize, Sentence>::new();
        for entry in forbidden {
            let sentence = sentences.entry(entry.worker.number);
            let sentence = sentence.or_insert_with(|| Sentence {
                worker: entry.worker.clone(),
                connections: Vec::new(),
            });
            sentence.connections.push(entry.cancel.clone());
        }
        sentences.into_values().collect()
    }

    pub fn count(&self) -> usize {
        self.table().open.len()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts connections on their own thread. Woken from another one, they would run in turn with their tunnels, each of which would
/// write for every single stream.
async fn execute(connections: Vec<CancellationToken>) {
    for some in connections.chunks(AT_ONCE) {
        some.iter().for_each(CancellationToken::cancel);
        tokio::task::yield_now().await;
    }
}

impl OpenConnection {
    /// Whether policy cut it, as opposed to the agent's or the pod's end.
    pub fn cut(&self) -> Option<Cut> {
        self.revoked.load(Ordering::Relaxed).then_some(Cut::Policy)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.owner.table().open.remove(&self.id);
    }
}
