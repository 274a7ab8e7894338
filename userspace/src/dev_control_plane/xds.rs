//! The xDS service: hands what clients send to their `session`, and sends them what that wants sent.
//!
//! Invariant: a stream is driven by whoever reads its responses, so that a client that does not read costs what it was sent last and no
//! more. Served by `dev_control_plane::run`.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::Stream;
use futures_util::stream::unfold;
use prost_types::{Value, value::Kind};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::distort;
use super::gate::{self, Gate};
use super::publish::{Published, View};
use super::session::{Feedback, Session, SessionError};
use crate::wire::envoy::config::core::v3::Node;
use crate::wire::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryService;
use crate::wire::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// How much of a client's text is logged, in characters.
const MOST_LOGGED: usize = 1000;

/// The service.
#[derive(Debug)]
pub struct Discovery {
    published: Published,
    gate: Gate,
    shutdown: CancellationToken,
}

impl Discovery {
    /// Tells clients of what is published, until `shutdown`.
    pub fn new(published: Published, gate: Gate, shutdown: CancellationToken) -> Self {
        Self {
            published,
            gate,
            shutdown,
        }
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        self.gate.admit(request.metadata()).await?;
        let headers = shortened(&gate::shown(request.metadata()));
        tracing::debug!(headers, "the mesh is asked for");
        let client = Client {
            requests: request.into_inner(),
            published: self.published.clone(),
            session: Session::default(),
            view: None,
            node: String::new(),
            name: String::new(),
            settled: None,
            sent: 0,
            shutdown: self.shutdown.clone(),
        };
        let responses = unfold(Some(client), |client| async {
            let mut client = client?;
            match client.next().await {
                Ok(response) => Some((Ok(response), Some(client))),
                Err(End::ByClient) => None,
                Err(End::ByServer(status)) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(Box::pin(responses)))
    }
}

/// One client's stream.
struct Client {
    requests: Streaming<DeltaDiscoveryRequest>,
    published: Published,
    session: Session,
    /// What the client is told.
    view: Option<Arc<View>>,
    /// What it calls itself.
    node: String,
    /// The node it serves, if it says so.
    name: String,
    /// The newest snapshot of which it has all.
    settled: Option<u64>,
    /// How many responses it got.
    sent: u32,
    shutdown: CancellationToken,
}

/// How a stream ends.
enum End {
    ByClient,
    ByServer(Status),
}

impl Client {
    /// Waits for the next response.
    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, End> {
        let shutdown = self.shutdown.clone();
        loop {
            let stalls = self
                .view
                .as_ref()
                .is_none_or(|view| view.behaviour.stalls());
            if !stalls && let Some(response) = self.session.response() {
                return self.send(response).await;
            }
            self.note_settled();
            tokio::select! {
                () = shutdown.cancelled() => return Err(ending()),
                changed = self.published.changed() => {
                    changed.map_err(|_| ending())?;
                    self.view.clone_from(&self.published.borrow_and_update());
                    if let Some(view) = &self.view {
                        self.session.change(&view.snapshot);
                    }
                }
                request = self.requests.message(), if !stalls => match request {
                    Ok(Some(request)) => self.hear(request)?,
                    Ok(None) => return Err(End::ByClient),
                    Err(status) => {
                        tracing::debug!(node = self.node, %status, "a client's stream broke off");
                        return Err(End::ByClient);
                    }
                },
            }
        }
    }

    /// Lets a response go, unless the behaviour has something against it.
    async fn send(
        &mut self,
        mut response: DeltaDiscoveryResponse,
    ) -> Result<DeltaDiscoveryResponse, End> {
        let behaviour = self
            .view
            .as_ref()
            .map(|view| Arc::clone(&view.behaviour))
            .unwrap_or_default();
        if behaviour
            .reset_after()
            .is_some_and(|most| self.sent >= most)
        {
            return Err(End::ByServer(Status::unavailable("told to break off")));
        }
        if let Some(delay) = behaviour.xds_delay() {
            let late = self.shutdown.run_until_cancelled(tokio::time::sleep(delay));
            late.await.ok_or_else(ending)?;
        }
        distort::response(&mut response, &behaviour.xds);
        self.sent = self.sent.saturating_add(1);
        let (type_url, nonce) = (&response.type_url, &response.nonce);
        let (resources, removed) = (response.resources.len(), response.removed_resources.len());
        tracing::debug!(
            node = self.node,
            type_url,
            nonce,
            resources,
            removed,
            "sent"
        );
        Ok(response)
    }

    /// Tells when the client has all that it is to have: who changes the mesh may wait for it.
    fn note_settled(&mut self) {
        let revision = self.view.as_ref().map(|view| view.snapshot.revision);
        if revision > self.settled && self.session.is_settled() {
            self.settled = revision;
            let (node, name) = (&self.node, &self.name);
            tracing::debug!(node, name, revision, "a client has all of the mesh");
        }
    }

    fn hear(&mut self, request: DeltaDiscoveryRequest) -> Result<(), End> {
        let Some(view) = &self.view else {
            return Ok(());
        };
        if let Some(node) = &request.node
            && self.node.is_empty()
        {
            self.node = shortened(&node.id);
            self.name = shortened(node_name(node).unwrap_or_default());
            tracing::info!(node = self.node, "a client of xDS");
            let metadata = shortened(&metadata(node));
            tracing::debug!(node = self.node, metadata, "what it says of itself");
        }
        let (type_url, nonce) = (
            shortened(&request.type_url),
            shortened(&request.response_nonce),
        );
        match self.session.request(request, &view.snapshot) {
            Ok(None) => {}
            Ok(Some(Feedback::Ack)) => {
                tracing::debug!(node = self.node, type_url, nonce, "accepted");
            }
            Ok(Some(Feedback::Nack(reason))) => {
                let reason = shortened(&reason);
                tracing::warn!(
                    node = self.node,
                    type_url,
                    nonce,
                    reason,
                    "a client refuses what it was sent"
                );
            }
            Ok(Some(Feedback::Unknown)) => {
                tracing::warn!(
                    node = self.node,
                    type_url,
                    nonce,
                    "a client answers what it was not sent"
                );
            }
            // As istiod does: a client may know of more types than the server.
            Err(error @ SessionError::UnknownType(_)) => {
                tracing::warn!(node = self.node, %error, "a request is not answered");
            }
            Err(error @ SessionError::TooManyNames) => {
                return Err(End::ByServer(Status::resource_exhausted(error.to_string())));
            }
        }
        Ok(())
    }
}

/// What a client says of itself in a line, sorted by name.
fn metadata(node: &Node) -> String {
    let fields = node.metadata.iter().flat_map(|metadata| &metadata.fields);
    let shown: Vec<String> = fields
        .filter_map(|(name, value)| Some(format!("{name}={}", text(value)?)))
        .collect();
    shown.join(" ")
}

/// A text, or texts.
fn text(value: &Value) -> Option<String> {
    match value.kind.as_ref()? {
        Kind::StringValue(text) => Some(text.clone()),
        Kind::ListValue(list) => {
            let texts: Option<Vec<String>> = list.values.iter().map(text).collect();
            Some(texts?.join(","))
        }
        _ => None,
    }
}

fn node_name(node: &Node) -> Option<&str> {
    match node
        .metadata
        .as_ref()?
        .fields
        .get("NODE_NAME")?
        .kind
        .as_ref()?
    {
        Kind::StringValue(name) => Some(name),
        _ => None,
    }
}

fn ending() -> End {
    End::ByServer(Status::unavailable("the control plane stops"))
}

fn shortened(text: &str) -> String {
    text.chars().take(MOST_LOGGED).collect()
}
