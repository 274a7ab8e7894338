//! One pod's listeners and everything that was accepted from them.

use std::{io, net::TcpListener as StdListener, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::CancellationToken;

use super::{Context, Workers, dial, hbone::Stop, hbone_server, inbound, outbound, workers::Worker};
use crate::{enrol::LocalPod, kernel::PodListeners};

/// Connections that one pod may have in the agent at a time: more are reset, so that a pod harms only itself.
const CONNECTIONS_PER_POD: usize = 4096;
/// Pause after a failed accept, which mostly means that there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The proxy of one pod.
pub struct PodProxy {
    pod: Arc<LocalPod>,
    worker: Worker,
    /// No new connections.
    accepting: CancellationToken,
    stop: Stop,
}

/// What a connection of a pod needs beside the [`Context`].
#[derive(Clone)]
pub(super) struct Ours {
    pub context: Arc<Context>,
    pub pod: Arc<LocalPod>,
    pub worker: Worker,
    pub stop: Stop,
}

#[derive(Clone, Copy)]
enum Port {
    Outbound,
    Inbound,
    Hbone,
}

impl PodProxy {
    /// Starts to accept.
    pub fn start(workers: &Workers, context: &Arc<Context>, pod: Arc<LocalPod>, listeners: PodListeners) -> io::Result<Self> {
        let worker = workers.next().ok_or_else(|| io::Error::other("there are no data threads"))?;
        let accepting = CancellationToken::new();
        let stop = Stop::default();
        let permits = Arc::new(Semaphore::new(CONNECTIONS_PER_POD));
        let ours = Ours { context: Arc::clone(context), pod: Arc::clone(&pod), worker: worker.clone(), stop: stop.clone() };
        let PodListeners { outbound, inbound, hbone } = listeners;
        for (listener, port) in [(outbound, Port::Outbound), (inbound, Port::Inbound), (hbone, Port::Hbone)] {
            let (ours, accepting, permits) = (ours.clone(), accepting.clone(), Arc::clone(&permits));
            worker.tasks.spawn_on(
                async move {
                    if let Some(Err(error)) = accepting.run_until_cancelled(accept(listener, port, ours, permits)).await {
                        tracing::error!(%error, "a listener of a pod failed; its connections are refused");
                    }
                },
                &worker.handle,
            );
        }
        Ok(Self { pod, worker, accepting, stop })
    }

    pub fn pod(&self) -> &Arc<LocalPod> {
        &self.pod
    }

    /// No new connections; tunnels are told to go away; what is open goes on.
    pub fn drain(&self) {
        self.accepting.cancel();
        self.stop.drain.cancel();
    }

    /// Cuts everything.
    pub fn close(self) {
        self.accepting.cancel();
        self.stop.close.cancel();
        let uid = Arc::<str>::from(self.pod.uid().as_str());
        self.worker.pool.close_where(|key| key.source == uid);
    }
}

async fn accept(listener: StdListener, port: Port, ours: Ours, permits: Arc<Semaphore>) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, pod = %ours.pod.uid(), "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match Arc::clone(&permits).try_acquire_owned() {
            Ok(permit) => begin(stream, port, &ours, permit),
            Err(_) => dial::reset(stream),
        }
    }
}

fn begin(stream: TcpStream, port: Port, ours: &Ours, permit: OwnedSemaphorePermit) {
    let tasks = ours.worker.tasks.clone();
    let ours = ours.clone();
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection ended before it was looked at");
        return;
    }
    tasks.spawn(async move {
        match port {
            Port::Outbound => outbound::handle(ours, stream).await,
            Port::Inbound => inbound::handle_plaintext(ours, stream).await,
            Port::Hbone => hbone_server::handle(ours, stream).await,
        }
        drop(permit);
    });
}
