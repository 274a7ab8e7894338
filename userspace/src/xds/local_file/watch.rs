//! Follows the mesh file: a change is in the store a few milliseconds after it was written.
//!
//! A change counts when its writer has closed the file or renamed another over it. A slow check of the file's metadata
//! covers what is not notified: writers that never close, removal, links elsewhere, remote file systems, lost events. A file
//! that cannot be taken is reported once and leaves the mesh as it was. Run by `node` as a task.

use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::directories::{Directories, Event};
use super::{LocalFile, LocalFileError};
use crate::mesh::{Mesh, MeshDefaults, Revision, Store};

/// See [`LocalFileWatcher::recheck`].
const RECHECK: Duration = Duration::from_secs(1);

/// What is known about the mesh file, for readiness and `culvert status`.
#[derive(Debug, Clone, Default)]
pub struct LocalFileStatus {
    /// The revision of the store that came from the file last; none before the first good file.
    pub revision: Option<Revision>,
    /// When that was.
    pub loaded_at: Option<SystemTime>,
    /// Why the file as it is now is not in effect; none if it is.
    pub error: Option<LocalFileError>,
}

/// Keeps a store at what the file says.
#[derive(Debug)]
pub struct LocalFileWatcher {
    taker: Arc<Taker>,
    status: watch::Sender<LocalFileStatus>,
    directories: Directories,
    /// How often the file is looked at without an event. Tests of events make it an hour.
    pub(super) recheck: Duration,
    /// Where the path led, links resolved, when it was looked at last.
    target: Option<PathBuf>,
    /// The file when it was read last.
    taken: Option<Stamp>,
    /// The file at the last recheck.
    rechecked: Option<Stamp>,
    /// The content that was read last. None asks for another attempt whatever the stamp says.
    content: Option<Content>,
}

/// What changes when a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Length and keyed hash: nobody can aim for a collision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Content(usize, u64);

impl LocalFile {
    /// Begins to notice changes. The file itself is read by [`LocalFileWatcher::run`]; it need not exist yet, its directory
    /// must. To be called within a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// Its directory cannot be watched.
    pub fn watch(
        self,
        defaults: MeshDefaults,
        store: Arc<Store>,
    ) -> Result<(LocalFileWatcher, watch::Receiver<LocalFileStatus>), LocalFileError> {
        let directories = Directories::of(&self.path)?;
        let (status, receiver) = watch::channel(LocalFileStatus::default());
        let watcher = LocalFileWatcher {
            taker: Arc::new(Taker {
                file: self,
                defaults,
                store,
                hasher: RandomState::new(),
            }),
            status,
            directories,
            recheck: RECHECK,
            target: None,
            taken: None,
            rechecked: None,
            content: None,
        };
        Ok((watcher, receiver))
    }
}

impl LocalFileWatcher {
    /// Reads the file, then again after each change, until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut recheck = tokio::time::interval(self.recheck);
        recheck.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // The first tick comes at once and reads the file for the first time.
            let due = tokio::select! {
                () = shutdown.cancelled() => return,
                events = self.directories.changed() => self.is_written(&events),
                _ = recheck.tick() => self.is_overdue(),
            };
            if due {
                self.take().await;
            }
        }
    }

    /// True if the events say that the file is complete and may be another one.
    fn is_written(&mut self, events: &[Event]) -> bool {
        let path = &self.taker.file.path;
        let target = path.canonicalize().ok();
        let moved = std::mem::replace(&mut self.target, target.clone()) != target;
        self.directories.follow(path, target.as_deref());
        let named = |event: &Event| {
            let name = event.name.as_deref();
            name.is_some()
                && (name == path.file_name() || name == target.as_deref().and_then(Path::file_name))
        };
        // What is only just created is about to be written, and its end will be another event.
        let begun = events.iter().any(|event| event.created && named(event));
        let ended = events
            .iter()
            .any(|event| event.lost || (!event.created && named(event)));
        ended || (moved && target.is_some() && !begun)
    }

    /// True if the file was changed a while ago and nobody told, or could not be read.
    fn is_overdue(&mut self) -> bool {
        let path = &self.taker.file.path;
        self.target = path.canonicalize().ok();
        self.directories.follow(path, self.target.as_deref());
        let now = Stamp::of(path);
        let settled = std::mem::replace(&mut self.rechecked, now) == now;
        self.content.is_none() || (settled && now != self.taken)
    }

    /// Reads the file and puts it in effect, or says why not.
    async fn take(&mut self) {
        let (taker, before) = (self.taker.clone(), self.content);
        // Parsing a large mesh takes a while.
        let taken = tokio::task::spawn_blocking(move || taker.take(before))
            .await
            .unwrap_or_else(|ended| {
                let path = self.taker.file.path.clone();
                let outcome = Outcome::Refused(LocalFileError::Internal {
                    path,
                    reason: ended.to_string(),
                });
                // The same content would end the same way.
                Taken {
                    stamp: self.taken,
                    content: before.or(Some(Content(0, 0))),
                    outcome,
                }
            });
        self.taken = taken.stamp;
        self.content = taken.content;
        match taken.outcome {
            Outcome::Same => {}
            Outcome::Refused(error) => self.report(error),
            Outcome::InEffect(revision) => {
                self.status.send_replace(LocalFileStatus {
                    revision: Some(revision),
                    loaded_at: Some(SystemTime::now()),
                    error: None,
                });
            }
        }
    }

    fn report(&self, error: LocalFileError) {
        let text = error.to_string();
        self.status.send_if_modified(|status| {
            let known = status
                .error
                .as_ref()
                .is_some_and(|known| known.to_string() == text);
            if !known {
                tracing::error!(%error, "the mesh file is not in effect; the mesh stays as it was");
                status.error = Some(error);
            }
            !known
        });
    }
}

/// The part that blocks.
#[derive(Debug)]
struct Taker {
    file: LocalFile,
    defaults: MeshDefaults,
    store: Arc<Store>,
    hasher: RandomState,
}

struct Taken {
    stamp: Option<Stamp>,
    content: Option<Content>,
    outcome: Outcome,
}

enum Outcome {
    /// As it was at the last attempt.
    Same,
    InEffect(Revision),
    Refused(LocalFileError),
}

impl Taker {
    fn take(&self, before: Option<Content>) -> Taken {
        let stamp = Stamp::of(&self.file.path);
        let bytes = match self.file.read() {
            Ok(bytes) => bytes,
            Err(error) => {
                return Taken {
                    stamp,
                    content: None,
                    outcome: Outcome::Refused(error),
                };
            }
        };
        if Stamp::of(&self.file.path) != stamp {
            // Somebody writes to it right now. Half a file may well be a valid one, so it is not even tried; its end is
            // another event, or the next recheck finds that the stamp is not this one.
            return Taken {
                stamp,
                content: before,
                outcome: Outcome::Same,
            };
        }
        let content = Content(bytes.len(), self.hasher.hash_one(&bytes));
        let outcome = if Some(content) == before {
            Outcome::Same
        } else {
            self.put_in_effect(&bytes)
                .map_or_else(Outcome::Refused, Outcome::InEffect)
        };
        Taken {
            stamp,
            content: Some(content),
            outcome,
        }
    }

    fn put_in_effect(&self, bytes: &[u8]) -> Result<Revision, LocalFileError> {
        let resources = self.file.parse(bytes)?;
        let mesh =
            Mesh::build(resources, &self.defaults).map_err(|source| LocalFileError::Mesh {
                path: self.file.path.clone(),
                source,
            })?;
        let (workloads, services, policies) = (
            mesh.workloads().len(),
            mesh.services().len(),
            mesh.policies().len(),
        );
        let revision = self.store.replace(mesh);
        let file = self.file.path.display();
        tracing::info!(%file, workloads, services, policies, revision = revision.0, "the mesh file is in effect");
        Ok(revision)
    }
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}
