//! One client's stream of delta xDS without the stream: requests and snapshots go in, responses come out. Pure; driven by `xds`.
//!
//! Invariants: a client is sent a resource when its version is not the one it has, or it asks for the name again; it hears of the end of
//! everything it was sent; the first request for a type is always answered, if only to say that there is nothing; no response is much
//! larger than [`MOST_BYTES`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;

#[cfg(test)]
mod tests;

use super::snapshot::{Entry, Kind, Snapshot};
use crate::wire::envoy::service::discovery::v3::{
    Content, DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
};

/// How much of resources goes into one response, in bytes. gRPC's clients refuse messages over 4 MiB unless told otherwise.
pub const MOST_BYTES: usize = 1 << 20;
/// The most names that a client may subscribe to or say that it has, for each type.
const MOST_NAMES: usize = 200_000;
/// What a name costs in a response beside its letters.
const OVERHEAD: usize = 64;
const WILDCARD: &str = "*";

/// What one client has and wants.
#[derive(Debug, Default)]
pub struct Session {
    /// How many responses were made; their nonces count from 1.
    responses: u64,
    /// The last of them that the client accepted or refused.
    answered: u64,
    /// What is not yet in a response, the oldest first.
    waiting: VecDeque<Delta>,
    addresses: Subscription,
    authorizations: Subscription,
}

/// What became of an earlier response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Feedback {
    /// Accepted.
    Ack,
    /// Refused, for this reason.
    Nack(String),
    /// It names no response of this stream.
    Unknown,
}

/// Why a request is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// There are no such resources.
    #[error("there are no resources of type {0:?} here")]
    UnknownType(String),
    /// More than anybody needs.
    #[error("a client may name {MOST_NAMES} resources of a type; serve a larger mesh with istiod")]
    TooManyNames,
}

#[derive(Debug, Default)]
struct Subscription {
    begun: bool,
    /// Everything is wanted.
    wildcard: bool,
    /// What is wanted besides.
    names: BTreeSet<String>,
    /// What the client has, by name, in which version.
    has: BTreeMap<Arc<str>, String>,
}

/// What is to be told of one type.
#[derive(Debug)]
struct Delta {
    kind: Kind,
    revision: u64,
    resources: VecDeque<(Arc<str>, Arc<Entry>)>,
    removed: VecDeque<String>,
}

impl Session {
    /// Takes a request. Its answer, from `snapshot`, waits in [`Session::response`].
    ///
    /// # Errors
    /// It asks for what there is not, or for too much. Nothing was changed.
    pub fn request(
        &mut self,
        request: DeltaDiscoveryRequest,
        snapshot: &Snapshot,
    ) -> Result<Option<Feedback>, SessionError> {
        let kind = Kind::of(&request.type_url)
            .ok_or_else(|| SessionError::UnknownType(request.type_url.clone()))?;
        let feedback = self.feedback(&request);
        let subscription = self.subscription(kind);
        let first = !subscription.begun;
        let asked = subscription.request(request)?;
        let delta = subscription.difference(kind, snapshot, &asked);
        if first || !delta.is_empty() {
            self.waiting.push_back(delta);
        }
        Ok(feedback)
    }

    /// Takes a newer snapshot. What is new in it waits in [`Session::response`].
    pub fn change(&mut self, snapshot: &Snapshot) {
        // What policies forbid must not be open while they are on their way: they go first.
        for kind in [Kind::Authorization, Kind::Address] {
            let subscription = self.subscription(kind);
            if !subscription.begun {
                continue;
            }
            let delta = subscription.difference(kind, snapshot, &BTreeSet::new());
            if !delta.is_empty() {
                self.waiting.push_back(delta);
            }
        }
    }

    /// The next response, if there is one to send.
    pub fn response(&mut self) -> Option<DeltaDiscoveryResponse> {
        let delta = self.waiting.front_mut()?;
        let (kind, revision) = (delta.kind, delta.revision);
        let (resources, removed_resources) = delta.part();
        if delta.is_empty() {
            self.waiting.pop_front();
        }
        self.responses += 1;
        Some(DeltaDiscoveryResponse {
            system_version_info: revision.to_string(),
            resources,
            type_url: kind.type_url().to_owned(),
            nonce: self.responses.to_string(),
            removed_resources,
        })
    }

    /// Whether the client wants both types and has accepted or refused all that there is of them.
    pub fn is_settled(&self) -> bool {
        self.addresses.begun
            && self.authorizations.begun
            && self.waiting.is_empty()
            && self.answered == self.responses
    }

    fn subscription(&mut self, kind: Kind) -> &mut Subscription {
        match kind {
            Kind::Address => &mut self.addresses,
            Kind::Authorization => &mut self.authorizations,
        }
    }

    fn feedback(&mut self, request: &DeltaDiscoveryRequest) -> Option<Feedback> {
        if request.response_nonce.is_empty() {
            return None;
        }
        let nonce = request.response_nonce.parse().unwrap_or(0);
        let sent = (1..=self.responses).contains(&nonce);
        if sent {
            self.answered = self.answered.max(nonce);
        }
        Some(match &request.error_detail {
            _ if !sent => Feedback::Unknown,
            Some(status) => Feedback::Nack(status.message.clone()),
            None => Feedback::Ack,
        })
    }
}

impl Subscription {
    /// Returns the names that the client subscribes to with this request.
    fn request(
        &mut self,
        request: DeltaDiscoveryRequest,
    ) -> Result<BTreeSet<String>, SessionError> {
        let more = request.resource_names_subscribe.len() + request.initial_resource_versions.len();
        if self.names.len() + more > MOST_NAMES {
            return Err(SessionError::TooManyNames);
        }
        let leaves_all = request
            .resource_names_unsubscribe
            .iter()
            .any(|name| name == WILDCARD);
        if !self.begun {
            self.begun = true;
            self.has = request
                .initial_resource_versions
                .into_iter()
                .map(|(name, version)| (name.into(), version))
                .collect();
            // Who names nothing at first means everything: how it was before there was a sign for it.
            self.wildcard = request.resource_names_subscribe.is_empty() && !leaves_all;
        }
        if leaves_all {
            self.wildcard = false;
        }
        for name in &request.resource_names_unsubscribe {
            self.names.remove(name);
        }
        let mut asked: BTreeSet<_> = request.resource_names_subscribe.into_iter().collect();
        if asked.remove(WILDCARD) {
            self.wildcard = true;
        }
        self.names.extend(asked.iter().cloned());
        Ok(asked)
    }

    /// What the client does not have, and what it has and is no more. What it `asked` for just now it is told in any case.
    fn difference(&mut self, kind: Kind, snapshot: &Snapshot, asked: &BTreeSet<String>) -> Delta {
        let resources = snapshot.resources(kind);
        let mut delta = Delta {
            kind,
            revision: snapshot.revision,
            resources: VecDeque::new(),
            removed: VecDeque::new(),
        };
        let mut wanted = BTreeMap::new();
        if self.wildcard {
            wanted.extend(resources.iter());
        }
        wanted.extend(self.names.iter().flat_map(|name| resources.meant(name)));
        let mut again = BTreeSet::new();
        for name in asked {
            let mut meant = resources.meant(name).map(|(name, _)| name).peekable();
            if meant.peek().is_none() {
                delta.removed.push_back(name.clone());
                self.has.remove(name.as_str());
            }
            again.extend(meant);
        }
        for (name, entry) in &wanted {
            if again.contains(*name) || self.has.get(*name) != Some(&entry.version) {
                let sent = (Arc::clone(name), Arc::clone(entry));
                delta.resources.push_back(sent);
                self.has.insert(Arc::clone(name), entry.version.clone());
            }
        }
        self.has.retain(|name, _| {
            if resources.entry(name).is_none() {
                delta.removed.push_back(name.to_string());
            }
            wanted.contains_key(name)
        });
        delta
    }
}

impl Delta {
    fn is_empty(&self) -> bool {
        self.resources.is_empty() && self.removed.is_empty()
    }

    /// Takes as much as one response may hold, and one item at least. What is gone first: its address may be another's by now.
    fn part(&mut self) -> (Vec<Bytes>, Vec<String>) {
        let mut room = MOST_BYTES;
        let mut fits = |bytes: usize| {
            let first = room == MOST_BYTES;
            let left = room.checked_sub(bytes + OVERHEAD);
            room = left.unwrap_or_default();
            first || left.is_some()
        };
        let mut removed = Vec::new();
        while let Some(name) = self.removed.pop_front_if(|name| fits(name.len())) {
            removed.push(name);
        }
        let mut resources = Vec::new();
        while self.removed.is_empty()
            && let Some((name, entry)) = self
                .resources
                .pop_front_if(|(name, entry)| fits(entry.value.len() + name.len()))
        {
            resources.push(resource(&name, &entry));
        }
        (resources, removed)
    }
}

fn resource(name: &str, entry: &Entry) -> Bytes {
    let resource = Resource {
        version: entry.version.clone(),
        resource: Some(Content {
            type_url: entry.type_url.clone(),
            value: entry.value.clone(),
        }),
        name: name.to_owned(),
        aliases: entry.aliases.clone(),
    };
    resource.encode_to_vec().into()
}
