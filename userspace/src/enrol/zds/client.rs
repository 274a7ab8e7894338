//! The client: connects, has done what messages ask for, answers, and connects again.

use std::{collections::HashSet, path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    ZdsError,
    connection::{Connection, Packet},
    protocol::{self, AddedPod, Request},
    session::{Action, Session},
};
use crate::{
    enrol::{EnrolError, NetnsPlace, Origin, PodSpec, PodUid},
    kernel::Netns,
};

/// istio-cni waits for 5 seconds, and takes the connection for lost then.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);
/// Between two attempts to connect, doubling from the one to the other.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Who has the pods. What fails is tried again there.
pub trait PodHost: Send + Sync + 'static {
    /// Enrols a pod; one that is enrolled in another namespace begins anew in this one.
    fn enrol(&self, spec: PodSpec) -> impl Future<Output = Result<(), EnrolError>> + Send;
    /// Releases a pod, if it is istio-cni's.
    fn release(&self, uid: &PodUid) -> impl Future<Output = Result<(), EnrolError>> + Send;
    /// Releases all pods of istio-cni's but these.
    fn keep_only(&self, named: &HashSet<PodUid>) -> impl Future<Output = ()> + Send;
}

/// How things stand with istio-cni.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not connected, and why.
    Away(String),
    /// The snapshot is not complete.
    Listing,
    Synced,
}

/// The client of one socket.
pub struct Client<H> {
    path: PathBuf,
    host: Arc<H>,
    status: watch::Sender<Status>,
    /// Work that took longer than istio-cni waits goes on here.
    work: TaskTracker,
    any_user: bool,
}

impl<H: PodHost> Client<H> {
    /// `any_user`: a test wants to be told by another user than root.
    pub fn new(path: PathBuf, host: Arc<H>, any_user: bool) -> (Self, watch::Receiver<Status>) {
        let (status, seen) = watch::channel(Status::Away("not connected yet".to_owned()));
        let client = Self {
            path,
            host,
            status,
            work: TaskTracker::new(),
            any_user,
        };
        (client, seen)
    }

    /// Runs until `end`. After `draining` a lost connection stays lost: the newest one is the one that istio-cni tells of new pods, and
    /// an agent that ends must not be that.
    pub async fn run(self, draining: CancellationToken, end: CancellationToken) {
        let mut pause = FIRST_PAUSE;
        while !draining.is_cancelled() {
            let mut session = Session::new();
            let Some(Err(error)) = end.run_until_cancelled(self.serve(&mut session)).await else {
                break;
            };
            if session.is_synced() {
                pause = FIRST_PAUSE;
                tracing::warn!(%error, "istio-cni is away; the pods it named stay");
            } else {
                tracing::debug!(%error, "no snapshot of istio-cni's yet");
            }
            self.status.send_replace(Status::Away(error.to_string()));
            if draining
                .run_until_cancelled(tokio::time::sleep(pause))
                .await
                .is_none()
            {
                break;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        end.cancelled().await;
        self.work.close();
        self.work.wait().await;
    }

    /// One connection, until it is lost.
    async fn serve(&self, session: &mut Session) -> Result<std::convert::Infallible, ZdsError> {
        let connection = Connection::open(&self.path, self.any_user)?;
        connection.send(&protocol::hello()).await?;
        self.status.send_replace(Status::Listing);
        loop {
            let outcome = match connection.receive().await? {
                Ok(packet) => self.carry_out(session, packet).await,
                Err(error) => Err(error.to_string()),
            };
            if let Err(reason) = &outcome {
                tracing::warn!(%reason, "a message of istio-cni's was answered with an error");
            }
            let answer = protocol::answer(outcome.as_ref().copied().map_err(String::as_str));
            connection.send(&answer).await?;
            // Only now: what waits for readiness may count on istio-cni knowing, too.
            if session.is_synced() && *self.status.borrow() != Status::Synced {
                tracing::info!("istio-cni has named its pods");
                self.status.send_replace(Status::Synced);
            }
        }
    }

    /// The error is what istio-cni is told.
    async fn carry_out(&self, session: &mut Session, packet: Packet) -> Result<(), String> {
        let told = |error: ZdsError| error.to_string();
        let request = Request::decode(&packet.bytes, packet.descriptors.len()).map_err(told)?;
        let action = session.take(request).map_err(told)?;
        let host = Arc::clone(&self.host);
        let mut work = self.work.spawn(async move {
            match action {
                Action::Nothing => Ok(()),
                Action::Enrol(pod) => {
                    let spec = spec(pod, packet)?;
                    host.enrol(spec).await
                }
                Action::Release(uid) => host.release(&uid).await,
                Action::KeepOnly(named) => {
                    host.keep_only(&named).await;
                    Ok(())
                }
            }
        });
        match timeout(ANSWER_WITHIN, &mut work).await {
            Ok(Ok(done)) => done.map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(told(ZdsError::Slow)),
        }
    }
}

fn spec(pod: AddedPod, packet: Packet) -> Result<PodSpec, EnrolError> {
    let descriptor = packet.descriptors.into_iter().next();
    let descriptor = descriptor.ok_or(EnrolError::NoNetns)?;
    let netns = Netns::received(descriptor)?;
    Ok(PodSpec {
        uid: pod.uid,
        netns: NetnsPlace::Held(Arc::new(netns)),
        origin: Origin::Cni,
        namespace: pod.namespace,
        name: pod.name,
        service_account: pod.service_account,
    })
}
