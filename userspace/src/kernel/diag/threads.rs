//! The threads that ask the kernel's sock_diag: one for each namespace that is asked about right now, up to a bound, and one for each
//! that is stuck. A thread lives while there is work.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use super::lane::{Exchange, Lane, Next};
use crate::kernel::{KernelError, NetnsCookie};

/// Threads that are not stuck.
const MOST_THREADS: usize = 64;
/// Far more than a batch takes.
const DEADLINE: Duration = Duration::from_millis(500);
/// They call the kernel and little else.
const STACK: usize = 256 << 10;

/// All threads of one agent.
#[derive(Debug)]
pub struct DiagThreads {
    deadline: Duration,
    this: Weak<DiagThreads>,
    pool: Mutex<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    /// A namespace keeps its lane while a thread is stuck there, whoever forgets it: so each has one such thread at most.
    lanes: HashMap<NetnsCookie, Weak<Lane>>,
    /// Those that wait for a thread.
    waiting: VecDeque<Arc<Lane>>,
    running: usize,
    stuck: usize,
}

impl DiagThreads {
    pub fn new() -> Arc<Self> {
        Self::with_deadline(DEADLINE)
    }

    pub(super) fn with_deadline(deadline: Duration) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            deadline,
            this: this.clone(),
            pool: Mutex::default(),
        })
    }

    /// How many namespaces' sockets the kernel does not come to an end with.
    pub fn stuck(&self) -> usize {
        self.pool().stuck
    }

    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// The lane of a namespace, made if there is none.
    pub(super) fn lane<E: Exchange + 'static>(
        &self,
        netns: NetnsCookie,
        pod: &str,
        open: impl FnOnce() -> Result<E, KernelError>,
    ) -> Result<Arc<Lane>, KernelError> {
        let mut pool = self.pool();
        pool.lanes.retain(|_, lane| lane.strong_count() > 0);
        if let Some(lane) = pool.lanes.get(&netns).and_then(Weak::upgrade) {
            return Ok(lane);
        }
        let lane = Lane::new(pod, Box::new(open()?), self.this.clone());
        pool.lanes.insert(netns, Arc::downgrade(&lane));
        Ok(lane)
    }

    /// Gives a lane a thread, or a place among those that wait for one.
    pub(super) fn work_for(&self, lane: Arc<Lane>) {
        let mut pool = self.pool();
        if pool.running >= MOST_THREADS {
            pool.waiting.push_back(lane);
            return;
        }
        pool.running += 1;
        drop(pool);
        self.spawn(lane);
    }

    fn spawn(&self, lane: Arc<Lane>) {
        let Some(this) = self.this.upgrade() else {
            return;
        };
        let first = Arc::clone(&lane);
        let spawned = thread::Builder::new()
            .name("sock_diag".to_owned())
            .stack_size(STACK)
            .spawn(move || this.run(first));
        if let Err(error) = spawned {
            tracing::error!(%error, "no thread could be started to destroy sockets or to look at them; trying again");
            let mut pool = self.pool();
            pool.running = pool.running.saturating_sub(1);
            let waiting = std::mem::take(&mut pool.waiting);
            drop(pool);
            for lane in std::iter::once(lane).chain(waiting) {
                lane.abandon();
            }
        }
    }

    fn run(&self, mut lane: Arc<Lane>) {
        loop {
            if let Next::GivenUp = lane.work() {
                return;
            }
            let mut pool = self.pool();
            match pool.waiting.pop_front() {
                Some(next) => {
                    drop(pool);
                    lane = next;
                }
                None => {
                    pool.running = pool.running.saturating_sub(1);
                    return;
                }
            }
        }
    }

    /// A thread is stuck: its place is another's.
    pub(super) fn lost(&self) {
        let mut pool = self.pool();
        pool.stuck += 1;
        match pool.waiting.pop_front() {
            Some(next) => {
                drop(pool);
                self.spawn(next);
            }
            None => pool.running = pool.running.saturating_sub(1),
        }
    }

    /// A thread that was stuck came back; it ends.
    pub(super) fn found(&self) {
        let mut pool = self.pool();
        pool.stuck = pool.stuck.saturating_sub(1);
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
