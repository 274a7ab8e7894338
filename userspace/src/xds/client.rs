//! Delta xDS from the control plane: connects, asks, puts in force, answers, and connects again.
//!
//! Invariants: the mesh stays as it is while nobody answers, and [`XdsStatus`] says since when; one push is put in force at a time and
//! answered before the next is read, so that a slow agent slows its control plane and grows no queue. Run by `node` as a task.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, Streaming};

use super::annotations_file::InFeed;
use super::backoff::Backoff;
use super::demand::Demanded;
use super::feed::Feed;
use super::session::{ProtocolError, Push, ResourceType, Session, Taken};
use crate::control_channel::{ChannelError, ControlChannel};
use crate::kernel::sys;
use crate::mesh::{MeshDefaults, Revision, Store};
use crate::watched_file::{FileWatcher, Told, WatchedFileError};
use crate::wire::envoy::config::core::v3::Node;
use crate::wire::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::wire::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

#[cfg(test)]
mod tests;

/// The largest response, in bytes.
const MOST_BYTES: usize = 200 << 20;
/// A control plane that restarts with a large mesh may take a minute.
const FIRST_ANSWER: Duration = Duration::from_secs(120);
/// Requests that may be under way.
const REQUESTS: usize = 16;
/// Pushes of more resources are put in force on a thread where that stops nobody else.
const FEW: usize = 64;
/// After pushes of more than that, what was freed is worth giving back.
const MANY: usize = 1000;

/// Refused resources that are remembered by name, of each type.
const MOST_REFUSED: usize = 1000;

/// What is known about the connection, for readiness, `culvert status` and metrics.
#[derive(Debug, Clone, Default)]
pub struct XdsStatus {
    /// What is in force came last from there, at this revision and time; none before every type was answered.
    pub in_force: InForce,
    /// Types that were never answered.
    pub unanswered: Vec<ResourceType>,
    /// Since when there has been no connection; none while there is one.
    pub lost_at: Option<SystemTime>,
    /// Why there is none, or what stays refused. None when all is well.
    pub error: Option<String>,
    /// What was refused and neither came again nor went since, of each type: names, and why.
    refused: [BTreeMap<String, String>; ResourceType::ALL.len()],
    /// Since the start.
    pub counts: XdsCounts,
}

/// A revision of the store, and since when; none before there is one.
type InForce = Option<(Revision, SystemTime)>;

impl XdsStatus {
    /// Pushes and annotations may be told of in another order than they came into force.
    pub(super) fn now_in_force(&mut self, in_force: InForce) {
        self.in_force = self.in_force.max(in_force);
    }

    /// A push may be about others than those that an earlier one had wrong.
    fn remember_refused(&mut self, taken: &Taken) {
        let Some(known) = self.refused.get_mut(taken.kind as usize) else {
            return;
        };
        if !known.is_empty() {
            let removed = taken.removed.iter().map(String::as_str);
            let accepted = taken.accepted.iter().map(|(name, _)| &**name);
            for name in removed.chain(accepted) {
                known.remove(&remembered(name));
            }
        }
        for refused in &taken.refused {
            let name = remembered(&refused.name);
            if known.len() < MOST_REFUSED || known.contains_key(&name) {
                known.insert(name, remembered(&refused.reason));
            }
        }
    }

    /// All that is refused, in a line.
    fn complaint(&self) -> Option<String> {
        let mut all = self.refused.iter().flatten();
        let (name, reason) = all.next()?;
        let count = all.count().saturating_add(1);
        Some(format!(
            "{count} resources were refused, such as {name}: it {reason}"
        ))
    }
}

/// Grow only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct XdsCounts {
    /// Responses about workloads and services, and about policies.
    pub messages: [u64; ResourceType::ALL.len()],
    /// Their bytes, likewise.
    pub bytes: [u64; ResourceType::ALL.len()],
    /// Resources that were refused.
    pub refused: u64,
    /// Connections that ended, by [`Termination`].
    pub terminations: [u64; Termination::ALL.len()],
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Termination {
    /// There was none.
    ConnectionError,
    /// The control plane said so, with an error.
    Error,
    /// The control plane ended it in good order, as it does every half hour.
    Complete,
    /// The other end just went.
    Reconnect,
}

impl Termination {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 4] = [
        Self::ConnectionError,
        Self::Error,
        Self::Complete,
        Self::Reconnect,
    ];

    /// How metrics name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Complete => "Complete",
            Self::Reconnect => "Reconnect",
        }
    }
}

/// Why a connection ended that had begun.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the control plane ended the stream: {}", told(.0))]
    Status(Status),
    #[error("the control plane sent a response that this agent does not take: {}", told(.0))]
    TooLarge(Status),
    #[error("the control plane closed the stream")]
    Closed,
    #[error("the control plane took the connection and said nothing for {} s", FIRST_ANSWER.as_secs())]
    Silent,
    #[error("the control plane does not speak delta xDS: {0}")]
    Protocol(#[from] ProtocolError),
    #[error("putting a push in force ended unexpectedly: {0}")]
    Internal(String),
}

impl Ended {
    /// What the client itself says of a response goes by a status as well.
    fn in_stream(status: Status) -> Self {
        match status.code() {
            tonic::Code::OutOfRange => Self::TooLarge(status),
            _ => Self::Status(status),
        }
    }

    fn termination(&self) -> Termination {
        match self {
            Self::Channel(_) => Termination::ConnectionError,
            Self::Status(status) if status.code() == tonic::Code::Unavailable => {
                Termination::Reconnect
            }
            Self::Status(_)
            | Self::TooLarge(_)
            | Self::Silent
            | Self::Protocol(_)
            | Self::Internal(_) => Termination::Error,
            Self::Closed => Termination::Complete,
        }
    }
}

/// Bounded, on one line: it comes from outside.
fn told(status: &Status) -> String {
    let text = format!("{:?}: {}", status.code(), status.message());
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(512)
        .collect()
}

/// The client.
pub struct XdsClient {
    channel: ControlChannel,
    session: Session,
    /// Shared with who follows the annotations file.
    feed: Arc<Mutex<Feed>>,
    /// Where only what is asked for is sent.
    demanded: Option<Demanded>,
    status: watch::Sender<XdsStatus>,
}

impl XdsClient {
    /// Asks as `node` for everything, or only for what is `demanded`. Nothing happens before [`Self::run`].
    pub fn new(
        channel: ControlChannel,
        node: Node,
        defaults: MeshDefaults,
        store: Arc<Store>,
        demanded: Option<Demanded>,
    ) -> (Self, watch::Receiver<XdsStatus>) {
        let (status, receiver) = watch::channel(XdsStatus {
            unanswered: ResourceType::ALL.to_vec(),
            lost_at: Some(SystemTime::now()),
            ..XdsStatus::default()
        });
        let client = Self {
            channel,
            session: Session::new(node, demanded.is_some()),
            feed: Arc::new(Mutex::new(Feed::new(store, defaults))),
            demanded,
            status,
        };
        (client, receiver)
    }

    /// Has resources read as ztunnel reads them: what cannot be read of one is no reason to refuse all of it.
    pub fn be_lenient(&self) {
        // Who had it and did not finish ends the client, in `run`.
        if let Ok(mut feed) = self.feed.lock() {
            feed.be_lenient();
        }
    }

    /// Has what a file says of annotations hold for the mesh, once the watcher runs: before it was read nothing is in force. See
    /// [`FileWatcher::new`].
    ///
    /// # Errors
    /// Its directory cannot be watched.
    pub fn annotated_by(
        &self,
        path: &Path,
    ) -> Result<(FileWatcher<InFeed>, Told<InFeed>), WatchedFileError> {
        let subject = InFeed::new(Arc::clone(&self.feed), self.status.clone());
        FileWatcher::new(path, subject)
    }

    /// Keeps the store at what the control plane says, until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut backoff = Backoff::new();
        loop {
            let began = tokio::time::Instant::now();
            let Some(ended) = shutdown.run_until_cancelled(self.connection()).await else {
                return;
            };
            let wait = backoff.after(began.elapsed());
            self.lost(&ended);
            if self.feed.is_poisoned() {
                // Who had it did not finish; whoever runs this sees it end.
                return;
            }
            if shutdown
                .run_until_cancelled(tokio::time::sleep(wait))
                .await
                .is_none()
            {
                return;
            }
        }
    }

    /// One connection, from its beginning to its end.
    async fn connection(&mut self) -> Ended {
        match self.talk().await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn talk(&mut self) -> Result<std::convert::Infallible, Ended> {
        let channel = self.channel.connect().await?;
        let mut service =
            AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MOST_BYTES);
        let (requests, stream) = mpsc::channel(REQUESTS);
        for request in self.session.opening() {
            send(&requests, request).await?;
        }
        let mut request = Request::new(ReceiverStream::new(stream));
        *request.metadata_mut() = self.channel.metadata().await?;
        // Some control planes say nothing at all before the first answer.
        let call = service.delta_aggregated_resources(request);
        let response = tokio::time::timeout(FIRST_ANSWER, call).await;
        let response = response.map_err(|_| Ended::Silent)?;
        let mut responses = response.map_err(Ended::Status)?.into_inner();
        self.found();
        loop {
            // Later there may be nothing to say for hours.
            let patience = match self.session.is_answered() {
                true => Duration::MAX,
                false => FIRST_ANSWER,
            };
            let response = tokio::select! {
                response = tokio::time::timeout(patience, responses.message()) => response,
                Some(name) = asked(&mut self.demanded) => {
                    if let Some(request) = self.session.subscribe(&name) {
                        send(&requests, request).await?;
                    }
                    continue;
                }
            };
            let response = response.map_err(|_| Ended::Silent)?;
            let response = response.map_err(Ended::in_stream)?.ok_or(Ended::Closed)?;
            let bytes = prost::Message::encoded_len(&response);
            let push = self.session.receive(response)?;
            let (taken, in_force) = self.put_in_force(push).await?;
            self.report(&taken, in_force, bytes);
            if let Some(demanded) = &self.demanded {
                demanded.answers.hear(&taken);
            }
            let many = taken.accepted.len() > MANY;
            let answer = self.session.answer(taken);
            if send(&requests, answer).await.is_err() {
                return Err(last_word(&mut responses).await);
            }
            if many {
                // It takes a while, and nothing waits for it.
                let _ = tokio::task::spawn_blocking(sys::give_back_memory).await;
            }
        }
    }

    async fn put_in_force(&self, push: Push) -> Result<(Taken, InForce), Ended> {
        // Who has it otherwise, for annotations, may take a while.
        if push.resources.len() <= FEW
            && let Ok(mut feed) = self.feed.try_lock()
        {
            let taken = feed.take(push)?;
            return Ok((taken, feed.in_force()));
        }
        let feed = Arc::clone(&self.feed);
        let work = tokio::task::spawn_blocking(move || {
            let mut feed = feed.lock().ok()?;
            let taken = feed.take(push);
            Some(taken.map(|taken| (taken, feed.in_force())))
        });
        let done = work
            .await
            .map_err(|error| Ended::Internal(error.to_string()))?;
        let taken = done.ok_or_else(|| Ended::Internal("the mesh is not there".to_owned()))?;
        Ok(taken?)
    }

    fn found(&self) {
        let address = &self.channel.address;
        self.status.send_modify(|status| {
            tracing::info!(%address, "connected to the control plane");
            status.lost_at = None;
            status.error = None;
            // Whatever is still wrong comes again.
            status.refused = Default::default();
        });
    }

    fn lost(&self, ended: &Ended) {
        let termination = ended.termination();
        let text = ended.to_string();
        self.status.send_modify(|status| {
            if let Some(count) = status.counts.terminations.get_mut(termination as usize) {
                *count += 1;
            }
            // Once for each reason: attempts go on all the time.
            if status.error.as_deref() != Some(&text) {
                match ended {
                    Ended::Closed => tracing::info!("{text}; connecting again"),
                    _ => {
                        tracing::warn!("{text}; the mesh stays as it is, and the agent tries again")
                    }
                }
            }
            status.error = Some(text);
            status.lost_at.get_or_insert_with(SystemTime::now);
        });
    }

    fn report(&self, taken: &Taken, in_force: InForce, bytes: usize) {
        for refused in taken.refused.iter().take(10) {
            tracing::warn!(name = %refused.name, reason = %refused.reason, "a resource of the control plane was refused; it stays as it was");
        }
        tracing::debug!(
            kind = taken.kind.url(),
            accepted = taken.accepted.len(),
            refused = taken.refused.len(),
            removed = taken.removed.len(),
            "push"
        );
        self.status.send_modify(|status| {
            let place = taken.kind as usize;
            if let Some(count) = status.counts.messages.get_mut(place) {
                *count += 1;
            }
            if let Some(count) = status.counts.bytes.get_mut(place) {
                *count += bytes as u64;
            }
            status.counts.refused += taken.refused.len() as u64;
            status.now_in_force(in_force);
            status.unanswered.retain(|kind| *kind != taken.kind);
            status.remember_refused(taken);
            status.error = status.complaint();
        });
    }
}

/// What is kept of a text from outside.
fn remembered(text: &str) -> String {
    text.chars().take(512).collect()
}

/// Why a stream ended that takes no more requests. What still comes is not answered, and so comes again.
async fn last_word(responses: &mut Streaming<DeltaDiscoveryResponse>) -> Ended {
    const PATIENCE: Duration = Duration::from_secs(1);
    let end = async {
        loop {
            match responses.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Ended::Closed,
                Err(status) => return Ended::in_stream(status),
            }
        }
    };
    tokio::time::timeout(PATIENCE, end)
        .await
        .unwrap_or(Ended::Closed)
}

/// The next name that is asked for; never where everything is sent.
async fn asked(demanded: &mut Option<Demanded>) -> Option<String> {
    match demanded {
        Some(demanded) => demanded.asks.recv().await,
        None => std::future::pending().await,
    }
}

async fn send(
    requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    request: DeltaDiscoveryRequest,
) -> Result<(), Ended> {
    // The other end of this queue lives as long as the stream.
    requests.send(request).await.map_err(|_| Ended::Closed)
}
