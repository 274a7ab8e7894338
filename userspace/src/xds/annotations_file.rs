//! Annotations beside a control plane, which sends none: a YAML file, typically of a ConfigMap, that says them for namespaces, deployments and
//! pods.
//!
//! Invariants: taken whole or not at all; what it does not mean for us is refused, as nobody else reads it; it is in force at once,
//! without a push, and for all that comes later. Called by `client`, which has the mesh that it applies to.

use std::collections::hash_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use tokio::sync::watch;

use super::annotations::OnlyOurs;
use super::client::XdsStatus;
use super::feed::Feed;
use super::scalars::{Name, Text};
use super::yaml::{self, YamlError};
use crate::kernel::sys;
use crate::mesh::{NamespaceAnnotations, Namespaces};
use crate::watched_file::{FileStatus, Subject, WatchedFileError};

#[cfg(test)]
mod tests;

/// After changes of more workloads than that, what was freed is worth giving back.
const MANY: usize = 1000;

/// Why an annotations file is not in effect.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AnnotationsError {
    /// It cannot be read or followed.
    #[error(transparent)]
    File(#[from] WatchedFileError),
    /// The text is not one.
    #[error(transparent)]
    Text(#[from] YamlError),
    /// There is nothing in it, as in a file that is just being written.
    #[error("the annotations file {} says nothing; for no annotations write `namespaces: []`", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Something occurs twice.
    #[error("{}: {what} occurs twice; put its annotations into one entry", path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The namespace, deployment or pod.
        what: String,
    },
    /// An entry that names nobody, or whom is not clear.
    #[error(
        "{}: an entry of workloads, of the namespace {namespace}, has {has}; give it either the `name` of a pod or the `workloadName` of a deployment", path.display()
    )]
    Whom {
        /// The file.
        path: PathBuf,
        /// The entry's.
        namespace: String,
        /// What it has.
        has: &'static str,
    },
    /// The mesh that it applies to is not there any more.
    #[error("the annotations file {} has no mesh to apply to; the agent is ending", path.display())]
    NoMesh {
        /// The file.
        path: PathBuf,
    },
}

/// What an annotations file in effect says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AnnotationsInEffect {
    /// Entries for namespaces.
    pub namespaces: usize,
    /// Entries for pods and deployments.
    pub workloads: usize,
}

/// What is known about the annotations file.
pub type AnnotationsStatus = FileStatus<AnnotationsInEffect, AnnotationsError>;

/// The annotations of a file, in the mesh of a feed.
#[derive(Debug)]
pub struct InFeed {
    feed: Arc<Mutex<Feed>>,
    status: watch::Sender<XdsStatus>,
}

impl InFeed {
    /// Nothing of the feed is in force from here on before a first file was read.
    pub fn new(feed: Arc<Mutex<Feed>>, status: watch::Sender<XdsStatus>) -> Self {
        feed.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .await_annotations();
        Self { feed, status }
    }
}

impl Subject for InFeed {
    type InEffect = AnnotationsInEffect;
    type Error = AnnotationsError;
    const NAME: &'static str = "annotations file";
    const MOST_BYTES: u64 = 64 << 20;
    const TOO_LARGE: &'static str = "say it for namespaces and deployments in place of pods";

    fn put_in_effect(
        &self,
        path: &Path,
        bytes: &[u8],
    ) -> Result<AnnotationsInEffect, AnnotationsError> {
        let (namespaces, in_effect) = parse(path, bytes)?;
        let changed = {
            let gone = |_| AnnotationsError::NoMesh {
                path: path.to_owned(),
            };
            let mut feed = self.feed.lock().map_err(gone)?;
            let changed = feed.annotate(namespaces);
            let in_force = feed.in_force();
            self.status
                .send_modify(|status| status.now_in_force(in_force));
            changed
        };
        let file = path.display();
        tracing::info!(%file, changed, "the annotations file is in effect");
        if changed > MANY {
            sys::give_back_memory();
        }
        Ok(in_effect)
    }
}

/// The layout.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    namespaces: Option<Vec<OfNamespace>>,
    workloads: Option<Vec<OfWorkload>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct OfNamespace {
    name: Text<Name>,
    annotations: OnlyOurs,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct OfWorkload {
    namespace: Text<Name>,
    /// A pod's.
    name: Option<Text<Name>>,
    /// A deployment's, or the like.
    workload_name: Option<Text<Name>>,
    annotations: OnlyOurs,
}

fn parse(path: &Path, bytes: &[u8]) -> Result<(Namespaces, AnnotationsInEffect), AnnotationsError> {
    let document: Document = yaml::parse(path, bytes)?;
    if document.namespaces.is_none() && document.workloads.is_none() {
        return Err(AnnotationsError::Empty {
            path: path.to_owned(),
        });
    }
    let in_effect = AnnotationsInEffect {
        namespaces: document.namespaces.as_ref().map_or(0, Vec::len),
        workloads: document.workloads.as_ref().map_or(0, Vec::len),
    };
    let twice = |what: String| AnnotationsError::Twice {
        path: path.to_owned(),
        what,
    };
    let mut namespaces = Namespaces::new();
    for OfNamespace { name, annotations } in document.namespaces.into_iter().flatten() {
        let Text(Name(name)) = name;
        match namespaces.entry(name.into()) {
            Entry::Occupied(known) => return Err(twice(format!("the namespace {}", known.key()))),
            Entry::Vacant(new) => {
                new.insert(NamespaceAnnotations::default()).general = annotations.0
            }
        }
    }
    for entry in document.workloads.into_iter().flatten() {
        let Text(Name(namespace)) = entry.namespace;
        let whom = |has| AnnotationsError::Whom {
            path: path.to_owned(),
            namespace: namespace.clone(),
            has,
        };
        let said = namespaces.entry(namespace.as_str().into()).or_default();
        let (kind, name, entries) = match (entry.name, entry.workload_name) {
            (Some(Text(Name(pod))), None) => ("pod", pod, &mut said.pods),
            (None, Some(Text(Name(name)))) => ("deployment", name, &mut said.deployments),
            (None, None) => return Err(whom("no name")),
            (Some(_), Some(_)) => return Err(whom("both names")),
        };
        match entries.entry(name.into()) {
            Entry::Occupied(known) => {
                return Err(twice(format!("the {kind} {namespace}/{}", known.key())));
            }
            Entry::Vacant(new) => drop(new.insert(entry.annotations.0)),
        }
    }
    Ok((namespaces, in_effect))
}
