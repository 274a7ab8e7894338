//! One pod's listeners and everything that was accepted from them.
//!
//! Invariants: what comes in cannot use up what may go out; a listener that ends before it is told to ends the agent, since its pod
//! would be refused for good.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Context, Workers,
    budget::{Budget, Permit},
    dial,
    hbone::Stop,
    hbone_server, inbound, outbound,
    workers::Worker,
};
use crate::{enrol::LocalPod, kernel::PodListeners};

/// Connections that one port of a pod may have in the agent at a time: more are reset, so that a pod harms only itself.
const CONNECTIONS_PER_PORT: usize = 4096;
/// How many of those to 15006 and 15008 one address may have.
const CONNECTIONS_PER_SOURCE: usize = 3072;
/// Connections to 15008 whose client has not proved an identity yet.
const HANDSHAKES: usize = 512;
/// How many of those one address may have.
const HANDSHAKES_PER_SOURCE: usize = 128;
/// Pause after a failed accept, which mostly means that there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long cutting a pod's connections may take.
const CLOSING: Duration = Duration::from_secs(1);

/// The proxy of one pod.
pub struct PodProxy {
    pod: Arc<LocalPod>,
    worker: Worker,
    /// No new connections.
    accepting: CancellationToken,
    stop: Stop,
    /// The connections of this pod.
    open: TaskTracker,
}

/// What a connection of a pod needs beside the [`Context`].
#[derive(Clone)]
pub(super) struct Ours {
    pub context: Arc<Context>,
    pub pod: Arc<LocalPod>,
    pub worker: Worker,
    pub stop: Stop,
    pub open: TaskTracker,
}

/// One of a pod's three ports, with the budget of its connections.
#[derive(Clone)]
enum Port {
    Outbound(Arc<Budget>),
    Inbound(Arc<Budget>),
    Hbone {
        handshakes: Arc<Budget>,
        tunnels: Arc<Budget>,
    },
}

impl PodProxy {
    /// Starts to accept.
    pub fn start(
        workers: &Workers,
        context: &Arc<Context>,
        pod: Arc<LocalPod>,
        listeners: PodListeners,
    ) -> io::Result<Self> {
        let worker = workers
            .next()
            .ok_or_else(|| io::Error::other("there are no data threads"))?;
        let accepting = CancellationToken::new();
        let stop = Stop::default();
        let ours = Ours {
            context: Arc::clone(context),
            pod: Arc::clone(&pod),
            worker: worker.clone(),
            stop: stop.clone(),
            open: TaskTracker::new(),
        };
        let open = ours.open.clone();
        let listeners = {
            // Registering with the thread's poller is all that can fail: here, so that the pod is not enrolled then.
            let _thread = worker.handle.enter();
            let PodListeners {
                outbound,
                inbound,
                hbone,
            } = listeners;
            [
                TcpListener::from_std(outbound)?,
                TcpListener::from_std(inbound)?,
                TcpListener::from_std(hbone)?,
            ]
        };
        for (listener, port) in listeners.into_iter().zip(ports(context)) {
            let (ours, accepting) = (ours.clone(), accepting.clone());
            let watched = Watched {
                expected: accepting.clone(),
                failed: context.failed.clone(),
            };
            worker.tasks.spawn_on(
                async move {
                    let _watched = watched;
                    accepting
                        .run_until_cancelled(accept(listener, port, ours))
                        .await;
                },
                &worker.handle,
            );
        }
        Ok(Self {
            pod,
            worker,
            accepting,
            stop,
            open,
        })
    }

    pub fn pod(&self) -> &Arc<LocalPod> {
        &self.pod
    }

    /// No new connections; tunnels are told to go away; what is open goes on.
    pub fn drain(&self) {
        self.accepting.cancel();
        self.stop.drain.cancel();
    }

    /// The same for a pod that leaves while the agent stays: what is open may take all the time it wants.
    pub fn leave(&self) {
        self.accepting.cancel();
        self.stop.leave.cancel();
        self.open.close();
    }

    /// What cuts everything that is open.
    pub fn closing(&self) -> CancellationToken {
        self.stop.close.clone()
    }

    /// Whether nothing is open any more after [`Self::leave`].
    pub fn is_idle(&self) -> bool {
        self.open.is_empty()
    }

    /// Waits until it is.
    pub async fn idle(&self) {
        self.open.wait().await;
    }

    /// Cuts everything, and waits until it is cut.
    pub async fn close(self) {
        self.accepting.cancel();
        self.stop.close.cancel();
        let uid = Arc::<str>::from(self.pod.uid().as_str());
        self.worker.pool.close_where(|key| key.source == uid);
        self.open.close();
        if timeout(CLOSING, self.open.wait()).await.is_err() {
            tracing::warn!(pod = %self.pod.uid(), "connections of a pod did not end in time");
        }
    }
}

fn ports(context: &Context) -> [Port; 3] {
    if !context.knobs.separates_budgets() {
        let all = Budget::new(CONNECTIONS_PER_PORT, CONNECTIONS_PER_PORT);
        // A tunnel would count twice.
        let tunnels = Budget::new(CONNECTIONS_PER_PORT, CONNECTIONS_PER_PORT);
        return [
            Port::Outbound(Arc::clone(&all)),
            Port::Inbound(Arc::clone(&all)),
            Port::Hbone {
                handshakes: all,
                tunnels,
            },
        ];
    }
    [
        // All from the pod itself.
        Port::Outbound(Budget::new(CONNECTIONS_PER_PORT, CONNECTIONS_PER_PORT)),
        Port::Inbound(Budget::new(CONNECTIONS_PER_PORT, CONNECTIONS_PER_SOURCE)),
        Port::Hbone {
            handshakes: Budget::new(HANDSHAKES, HANDSHAKES_PER_SOURCE),
            tunnels: Budget::new(CONNECTIONS_PER_PORT, CONNECTIONS_PER_SOURCE),
        },
    ]
}

impl Port {
    /// The budget that a connection takes from before anything is known of it.
    fn budget(&self) -> &Arc<Budget> {
        match self {
            Self::Outbound(budget) | Self::Inbound(budget) => budget,
            Self::Hbone { handshakes, .. } => handshakes,
        }
    }
}

/// Tells when a task ends that was not told to, also by a panic.
struct Watched {
    expected: CancellationToken,
    failed: CancellationToken,
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.expected.is_cancelled() {
            tracing::error!("a listener of a pod ended unexpectedly");
            self.failed.cancel();
        }
    }
}

async fn accept(listener: TcpListener, port: Port, ours: Ours) -> Infallible {
    loop {
        let (stream, source) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, pod = %ours.pod.uid(), "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match port.budget().take(canonical(source)) {
            Some(permit) => begin(stream, &port, &ours, permit),
            None => dial::reset(stream),
        }
    }
}

fn canonical(source: SocketAddr) -> IpAddr {
    source.ip().to_canonical()
}

fn begin(stream: TcpStream, port: &Port, ours: &Ours, permit: Permit) {
    let tasks = ours.worker.tasks.clone();
    let (ours, port) = (ours.clone(), port.clone());
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection ended before it was looked at");
        return;
    }
    let carrying = ours.open.clone().track_future(async move {
        match port {
            Port::Outbound(_) => {
                outbound::handle(ours, stream).await;
                drop(permit);
            }
            Port::Inbound(_) => {
                inbound::handle_plaintext(ours, stream).await;
                drop(permit);
            }
            Port::Hbone { tunnels, .. } => {
                hbone_server::handle(ours, stream, permit, &tunnels).await
            }
        }
    });
    tasks.spawn(carrying);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched() -> (Watched, CancellationToken, CancellationToken) {
        let (expected, failed) = (CancellationToken::new(), CancellationToken::new());
        (
            Watched {
                expected: expected.clone(),
                failed: failed.clone(),
            },
            expected,
            failed,
        )
    }

    #[tokio::test]
    async fn a_listener_that_panics_is_told() {
        let (watched, _expected, failed) = watched();
        let task = tokio::spawn(async move {
            let _watched = watched;
            panic!("for the test");
        });
        assert!(task.await.is_err());
        assert!(failed.is_cancelled());
    }

    #[tokio::test]
    async fn a_listener_that_was_told_to_end_is_not() {
        let (watched, expected, failed) = watched();
        expected.cancel();
        drop(watched);
        assert!(!failed.is_cancelled());
    }
}
