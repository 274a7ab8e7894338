//! What delta xDS asks and answers, without the connection: which resources are known in which version, and what to say next.
//!
//! Invariants: a response is answered exactly once, with its nonce; a resource that was refused keeps the version that is in force;
//! what is known outlives a connection. Driven by `client`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bytes::Bytes;

use crate::wire::envoy::config::core::v3::Node;
use crate::wire::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::wire::google::rpc::Status;

/// The status code of gRPC for what was sent but cannot be used.
const INVALID_ARGUMENT: i32 = 3;
/// Bytes of a refusal's text; the control plane logs it.
const MOST_TEXT: usize = 4096;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResourceType {
    /// Workloads and services.
    Address,
    /// Policies.
    Authorization,
}

impl ResourceType {
    /// All of them, in the order in which they are asked for.
    pub const ALL: [Self; 2] = [Self::Address, Self::Authorization];

    /// How it is named on the wire.
    pub fn url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
        }
    }

    fn of(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.url() == url)
    }
}

/// A response, to be put in force and then answered.
#[derive(Debug)]
pub struct Push {
    /// What it is about.
    pub kind: ResourceType,
    /// What is new or different, encoded.
    pub resources: Vec<Bytes>,
    /// The names of what is gone.
    pub removed: Vec<String>,
    /// What the answer names.
    pub nonce: String,
}

/// A resource that was refused, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// What a control plane sent that is not delta xDS as we asked for it. The connection is of no use then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Nobody asked for that.
    #[error("it sent resources of the type {0:?}, which were not asked for")]
    Type(String),
    /// It cannot be answered.
    #[error("it sent a response of the type {0:?} without a nonce")]
    Nonce(&'static str),
    /// It is not even known what is refused.
    #[error("it sent a resource of the type {0:?} that cannot be decoded: {1}")]
    Resource(&'static str, prost::DecodeError),
}

/// What is known, over all connections.
#[derive(Debug)]
pub struct Session {
    node: Node,
    known: HashMap<ResourceType, Known>,
    /// The addresses that are asked for by name; none asks for everything.
    on_demand: Option<BTreeSet<String>>,
}

/// Of one type.
#[derive(Debug, Default)]
struct Known {
    /// By name. Control planes that do not number versions leave them empty.
    versions: HashMap<Arc<str>, Arc<str>>,
    /// A response was accepted, whole or in part.
    answered: bool,
}

impl Session {
    /// Nothing is known yet. With `on_demand`, addresses are only asked for by [`Self::subscribe`].
    pub fn new(node: Node, on_demand: bool) -> Self {
        Self {
            node,
            known: HashMap::new(),
            on_demand: on_demand.then(BTreeSet::new),
        }
    }

    /// The first requests of a connection.
    pub fn opening(&self) -> Vec<DeltaDiscoveryRequest> {
        let requests = ResourceType::ALL.into_iter().map(|kind| {
            let names = match kind {
                ResourceType::Address => self.on_demand.as_ref(),
                ResourceType::Authorization => None,
            };
            let versions = self.known.get(&kind).map(|known| &known.versions);
            DeltaDiscoveryRequest {
                node: Some(self.node.clone()),
                type_url: kind.url().to_owned(),
                // A first request without names asks for everything, unless it says that it does not.
                resource_names_subscribe: names.into_iter().flatten().cloned().collect(),
                resource_names_unsubscribe: names.map(|_| "*".to_owned()).into_iter().collect(),
                initial_resource_versions: versions
                    .into_iter()
                    .flatten()
                    .map(|(name, version)| (name.to_string(), version.to_string()))
                    .collect(),
                ..DeltaDiscoveryRequest::default()
            }
        });
        requests.collect()
    }

    /// Asks for an address by name; nothing is to be sent where it is asked for already, or everything is.
    pub fn subscribe(&mut self, name: &str) -> Option<DeltaDiscoveryRequest> {
        let names = self.on_demand.as_mut()?;
        names
            .insert(name.to_owned())
            .then(|| DeltaDiscoveryRequest {
                type_url: ResourceType::Address.url().to_owned(),
                resource_names_subscribe: vec![name.to_owned()],
                ..DeltaDiscoveryRequest::default()
            })
    }

    /// Reads a response.
    ///
    /// # Errors
    /// It is none that can be answered.
    pub fn receive(&self, response: DeltaDiscoveryResponse) -> Result<Push, ProtocolError> {
        let kind = ResourceType::of(&response.type_url)
            .ok_or_else(|| ProtocolError::Type(shortened(&response.type_url, 128)))?;
        if response.nonce.is_empty() {
            return Err(ProtocolError::Nonce(kind.url()));
        }
        Ok(Push {
            kind,
            resources: response.resources,
            removed: response.removed_resources,
            nonce: response.nonce,
        })
    }

    /// Notes what came of a push, and answers it.
    pub fn answer(&mut self, push: Taken) -> DeltaDiscoveryRequest {
        let known = self.known.entry(push.kind).or_default();
        known.answered = true;
        for name in &push.removed {
            known.versions.remove(name.as_str());
        }
        known.versions.extend(push.accepted);
        DeltaDiscoveryRequest {
            type_url: push.kind.url().to_owned(),
            response_nonce: push.nonce,
            error_detail: (!push.refused.is_empty()).then(|| Status {
                code: INVALID_ARGUMENT,
                message: told(&push.refused),
            }),
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// Whether every type was answered at least once.
    pub fn is_answered(&self) -> bool {
        let answered = |kind| self.known.get(kind).is_some_and(|it| it.answered);
        ResourceType::ALL.iter().all(answered)
    }
}

/// A push that was looked at.
#[derive(Debug)]
pub struct Taken {
    /// What it was about.
    pub kind: ResourceType,
    /// What the answer names.
    pub nonce: String,
    /// The names of what is gone.
    pub removed: Vec<String>,
    /// The names of what is in force, with versions.
    pub accepted: Vec<(Arc<str>, Arc<str>)>,
    /// What is not.
    pub refused: Vec<Refused>,
}

/// All names, and reasons as long as there is room.
fn told(refused: &[Refused]) -> String {
    let mut text = format!("{} refused", refused.len());
    for Refused { name, reason } in refused {
        let line = format!("; {} {}", shortened(name, 256), shortened(reason, 512));
        if text.len() + line.len() > MOST_TEXT {
            text.push_str("; …");
            break;
        }
        text.push_str(&line);
    }
    text
}

/// At most so many characters.
fn shortened(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
}

#[cfg(test)]
mod tests;
