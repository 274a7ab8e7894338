//! The data threads: one current-thread runtime each, with a tunnel pool of its own.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{runtime, sync::oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::hbone::{Pool, PoolSettings};
use super::tls::PeerChecks;

/// How long cutting connections may take.
const CUT: Duration = Duration::from_secs(1);

/// One data thread.
#[derive(Clone)]
pub(super) struct Worker {
    pub number: usize,
    pub handle: runtime::Handle,
    pub pool: Arc<Pool>,
    pub tasks: TaskTracker,
}

/// All data threads.
pub struct Workers {
    workers: Vec<Worker>,
    threads: Vec<(oneshot::Sender<()>, thread::JoinHandle<()>)>,
    next: AtomicUsize,
}

impl Workers {
    /// Starts `count` threads, at least one.
    pub fn start(count: usize, settings: PoolSettings, checks: &PeerChecks) -> io::Result<Self> {
        let mut workers = Vec::new();
        let mut threads = Vec::new();
        for number in 0..count.max(1) {
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            workers.push(Worker {
                number,
                handle: runtime.handle().clone(),
                pool: Arc::new(Pool::new(settings, checks.clone())),
                tasks: TaskTracker::new(),
            });
            let (stop, stopped) = oneshot::channel::<()>();
            let thread = thread::Builder::new()
                .name(format!("data-{number}"))
                .spawn(move || {
                    let _ = runtime.block_on(stopped);
                    runtime.shutdown_background();
                })?;
            threads.push((stop, thread));
        }
        Ok(Self {
            workers,
            threads,
            next: AtomicUsize::new(0),
        })
    }

    /// The thread for the next pod, in turn.
    pub(super) fn next(&self) -> Option<Worker> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.workers
            .get(turn.checked_rem(self.workers.len())?)
            .cloned()
    }

    /// Waits for the pods' tasks, which their owners have told to end, then ends the threads. What is open at the deadline is cut by
    /// `closing`, so that it is logged and counted like all others.
    pub async fn stop(self, deadline: Duration, closing: Vec<CancellationToken>) {
        let finishing = async {
            for worker in &self.workers {
                worker.tasks.close();
                worker.tasks.wait().await;
                worker.pool.shutdown(Duration::from_millis(100)).await;
            }
        };
        if tokio::time::timeout(deadline, finishing).await.is_err() {
            tracing::warn!(
                "connections were still open when the grace period ended; they are reset"
            );
            for closing in &closing {
                closing.cancel();
            }
            let cut = async {
                for worker in &self.workers {
                    worker.tasks.wait().await;
                }
            };
            let _ = tokio::time::timeout(CUT, cut).await;
        }
        for (stop, thread) in self.threads {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}
