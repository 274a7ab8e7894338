//! The requests about the sockets of one namespace, worked through by one thread at a time.
//!
//! Invariants: no lock is held while the kernel is asked; who waits goes on once the kernel has made no progress for a while, and
//! the namespace then counts as stuck: it is refused at once until the kernel answers. Destroying comes before looking.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use super::{DiagThreads, Fate, SocketMeasures, SocketName};

/// Sockets of one system call. All answers must fit into the receive buffer, at some 1.3 KiB of the kernel's memory each.
pub const BATCH: usize = 256;
/// Sockets that wait to be destroyed without anybody waiting for it.
const MOST_SOON: usize = 4096;
/// Requests of one namespace. There are a few callers, each of which waits.
const MOST_JOBS: usize = 64;
/// Who waits goes on after so long, also where the kernel makes progress.
const MOST_WAIT: Duration = Duration::from_secs(5);

/// Asks the kernel about at most [`BATCH`] sockets; blocks for as long as the kernel likes.
pub trait Exchange: Send {
    fn destroy(&mut self, sockets: &[SocketName]) -> Vec<Fate>;
    fn measure(&mut self, sockets: &[SocketName]) -> io::Result<Vec<(usize, SocketMeasures)>>;
}

/// A namespace's requests.
pub struct Lane {
    pod: String,
    threads: Weak<DiagThreads>,
    state: Mutex<State>,
}

struct State {
    /// With the thread while it asks.
    exchange: Option<Box<dyn Exchange>>,
    soon: Vec<SocketName>,
    destroys: VecDeque<Job<Fate>>,
    measures: VecDeque<Job<(usize, SocketMeasures)>>,
    working: Working,
    /// When the kernel last answered, or was first asked.
    progress: Instant,
}

/// Who works for a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Working {
    Nobody,
    /// A thread will.
    Waits,
    Asks,
    /// A thread does, and nobody waits for it any more.
    Stuck,
}

struct Job<T> {
    sockets: Vec<SocketName>,
    /// So many were asked about.
    done: usize,
    found: Vec<T>,
    answer: SyncSender<Vec<T>>,
}

/// One system call's worth of work.
enum Step {
    Soon(Vec<SocketName>),
    Destroy(Job<Fate>),
    Measure(Job<(usize, SocketMeasures)>),
}

/// What a thread does next.
pub enum Next {
    /// Nothing is left here.
    Done,
    /// It was given up meanwhile, and its place with it.
    GivenUp,
}

/// An answer that is on its way.
#[derive(Debug)]
pub struct Asked<T> {
    answer: Receiver<Vec<T>>,
    lane: Arc<Lane>,
    began: Instant,
}

/// What came within some time.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome<T> {
    Answer(Vec<T>),
    NotYet,
    /// Nothing will come.
    Lost,
}

impl Lane {
    pub fn new(pod: &str, exchange: Box<dyn Exchange>, threads: Weak<DiagThreads>) -> Arc<Self> {
        Arc::new(Self {
            pod: pod.to_owned(),
            threads,
            state: Mutex::new(State {
                exchange: Some(exchange),
                soon: Vec::new(),
                destroys: VecDeque::new(),
                measures: VecDeque::new(),
                working: Working::Nobody,
                progress: Instant::now(),
            }),
        })
    }

    pub fn destroy(self: &Arc<Self>, sockets: Vec<SocketName>) -> Asked<Fate> {
        self.ask(sockets, |state| &mut state.destroys)
    }

    pub fn measure(self: &Arc<Self>, sockets: Vec<SocketName>) -> Asked<(usize, SocketMeasures)> {
        self.ask(sockets, |state| &mut state.measures)
    }

    /// Also when stuck: whoever comes back from the kernel does it.
    pub fn destroy_soon(self: &Arc<Self>, socket: SocketName) {
        let mut state = self.state();
        if state.soon.len() >= MOST_SOON {
            tracing::debug!(pod = %self.pod, "too many sockets wait to be destroyed; one stays mute");
            return;
        }
        state.soon.push(socket);
        self.wake(state);
    }

    fn ask<T>(
        self: &Arc<Self>,
        sockets: Vec<SocketName>,
        queue: impl FnOnce(&mut State) -> &mut VecDeque<Job<T>>,
    ) -> Asked<T> {
        let (sender, answer) = sync_channel(1);
        let asked = Asked {
            answer,
            lane: Arc::clone(self),
            began: Instant::now(),
        };
        self.is_stalled();
        let mut state = self.state();
        if state.working != Working::Stuck {
            let jobs = queue(&mut state);
            if jobs.len() < MOST_JOBS {
                jobs.push_back(Job {
                    found: Vec::with_capacity(sockets.len()),
                    sockets,
                    done: 0,
                    answer: sender,
                });
            }
            self.wake(state);
        }
        asked
    }

    /// Sees to it that somebody works.
    fn wake(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.working != Working::Nobody {
            return;
        }
        state.working = Working::Waits;
        state.progress = Instant::now();
        drop(state);
        if let Some(threads) = self.threads.upgrade() {
            threads.work_for(Arc::clone(self));
        }
    }

    /// No thread can be had: nobody waits for one.
    pub fn abandon(&self) {
        let mut state = self.state();
        state.working = Working::Nobody;
        state.forget_jobs();
    }

    /// Works until nothing is left.
    pub fn work(self: &Arc<Self>) -> Next {
        loop {
            let (step, mut exchange) = {
                let mut state = self.state();
                let step = state.next();
                match (step, state.exchange.take()) {
                    (Some(step), Some(exchange)) => {
                        state.working = Working::Asks;
                        state.progress = Instant::now();
                        (step, exchange)
                    }
                    (step, exchange) => {
                        if step.is_some() {
                            // Its thread panicked with it: nobody waits for what cannot be asked any more.
                            state.forget_jobs();
                        }
                        state.exchange = exchange;
                        state.working = Working::Nobody;
                        return Next::Done;
                    }
                }
            };
            let step = self.take(step, exchange.as_mut());
            let mut state = self.state();
            state.exchange = Some(exchange);
            state.progress = Instant::now();
            if state.working == Working::Stuck {
                return self.recover(state);
            }
            state.put_back(step);
        }
    }

    /// Asks the kernel; returns what is left of it.
    fn take(&self, step: Step, exchange: &mut dyn Exchange) -> Option<Step> {
        match step {
            Step::Soon(sockets) => {
                let fates = exchange.destroy(&sockets);
                for (socket, fate) in sockets.iter().zip(fates) {
                    if let Fate::Failed(errno) = fate {
                        let error = io::Error::from_raw_os_error(errno);
                        tracing::warn!(%error, pod = %self.pod, local = %socket.local, remote = %socket.remote, "an isolated connection could not be destroyed; it stays mute");
                    }
                }
                None
            }
            Step::Destroy(mut job) => {
                let fates = exchange.destroy(job.batch());
                job.found.extend(fates);
                job.advance().map(Step::Destroy)
            }
            Step::Measure(mut job) => {
                let done = job.done;
                match exchange.measure(job.batch()) {
                    Ok(found) => job.found.extend(
                        found
                            .into_iter()
                            .map(|(index, measures)| (done + index, measures)),
                    ),
                    // They are counted when they end.
                    Err(error) => {
                        tracing::debug!(%error, pod = %self.pod, "open flows could not be measured");
                    }
                }
                job.advance().map(Step::Measure)
            }
        }
    }

    fn recover(self: &Arc<Self>, mut state: MutexGuard<'_, State>) -> Next {
        state.working = Working::Nobody;
        let more = !state.soon.is_empty();
        if let Some(threads) = self.threads.upgrade() {
            threads.found();
        }
        tracing::info!(pod = %self.pod, "the kernel lets this pod's sockets be destroyed again");
        if more {
            self.wake(state);
        }
        Next::GivenUp
    }

    /// Whether the kernel has made no progress for too long; what waits is then given up.
    fn is_stalled(&self) -> bool {
        let Some(threads) = self.threads.upgrade() else {
            return true;
        };
        let mut state = self.state();
        let late = state.progress.elapsed() >= threads.deadline();
        match state.working {
            Working::Stuck => true,
            Working::Nobody => false,
            // So many others are asked that there is no thread for this one: it keeps its turn.
            Working::Waits => late,
            Working::Asks if !late => false,
            Working::Asks => {
                state.working = Working::Stuck;
                state.forget_jobs();
                drop(state);
                tracing::error!(
                    pod = %self.pod, deadline = ?threads.deadline(),
                    "the kernel does not come to an end with destroying or looking at this pod's sockets: a process keeps one of them busy (in a page fault on a file system that does not answer, perhaps); connections of this pod that policy forbids are cut at their other end, and here once that process goes on or is killed"
                );
                threads.lost();
                true
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Lane({})", self.pod)
    }
}

impl State {
    fn next(&mut self) -> Option<Step> {
        if !self.soon.is_empty() {
            let batch = self.soon.len().min(BATCH);
            return Some(Step::Soon(self.soon.drain(..batch).collect()));
        }
        let destroy = self.destroys.pop_front().map(Step::Destroy);
        destroy.or_else(|| self.measures.pop_front().map(Step::Measure))
    }

    fn put_back(&mut self, step: Option<Step>) {
        match step {
            Some(Step::Destroy(job)) => self.destroys.push_front(job),
            Some(Step::Measure(job)) => self.measures.push_front(job),
            Some(Step::Soon(_)) | None => {}
        }
    }

    /// Those who wait are told by it.
    fn forget_jobs(&mut self) {
        self.destroys.clear();
        self.measures.clear();
    }
}

impl<T> Job<T> {
    fn batch(&self) -> &[SocketName] {
        let rest = self.sockets.get(self.done..).unwrap_or_default();
        rest.get(..BATCH).unwrap_or(rest)
    }

    /// The job if there is more to do; answered otherwise.
    fn advance(mut self) -> Option<Self> {
        self.done += self.batch().len();
        if self.done < self.sockets.len() {
            return Some(self);
        }
        // Nobody may be waiting any more.
        let _ = self.answer.try_send(self.found);
        None
    }
}

impl<T> Asked<T> {
    /// Waits until some moment.
    pub fn wait_until(&self, until: Instant) -> Outcome<T> {
        let left = until.saturating_duration_since(Instant::now());
        match self.answer.recv_timeout(left) {
            Ok(answer) => Outcome::Answer(answer),
            Err(RecvTimeoutError::Timeout) => Outcome::NotYet,
            Err(RecvTimeoutError::Disconnected) => Outcome::Lost,
        }
    }

    /// Waits for as long as the kernel makes progress, within reason; `None` when there is no answer.
    pub fn wait(self) -> Option<Vec<T>> {
        /// How often is looked whether it still does.
        const LOOK: Duration = Duration::from_millis(50);
        loop {
            match self.wait_until(Instant::now() + LOOK) {
                Outcome::Answer(answer) => return Some(answer),
                Outcome::Lost => return None,
                Outcome::NotYet if self.lane.is_stalled() => return None,
                Outcome::NotYet if self.began.elapsed() >= MOST_WAIT => return None,
                Outcome::NotYet => {}
            }
        }
    }
}
