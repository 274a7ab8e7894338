//! A file that is followed: a change is in effect a few milliseconds after it was written.
//!
//! A change counts when its writer has closed the file or renamed another over it. A slow check of the file's metadata
//! covers what is not notified: writers that never close, removal, links elsewhere, remote file systems, lost events. A file
//! that cannot be taken is reported once, and what was in effect before stays so. What a file means is its [`Subject`]'s business; `node` runs
//! the watchers as tasks.

mod directories;

use std::fmt;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use directories::{Directories, Event};

/// See [`FileWatcher::recheck`].
const RECHECK: Duration = Duration::from_secs(1);

/// What a file is to the agent.
pub trait Subject: fmt::Debug + Send + Sync + 'static {
    /// What is told of content that is in effect.
    type InEffect: fmt::Debug + Clone + Send + Sync + 'static;
    /// Why content is not in effect.
    type Error: std::error::Error + From<WatchedFileError> + Clone + Send + Sync + 'static;
    /// What messages call the file, such as `mesh file`.
    const NAME: &'static str;
    /// The largest file, in bytes.
    const MOST_BYTES: u64;
    /// What to do where the file is larger.
    const TOO_LARGE: &'static str;

    /// Puts content in effect, all of it or nothing. Blocks.
    ///
    /// # Errors
    /// It is not such content.
    fn put_in_effect(&self, path: &Path, bytes: &[u8]) -> Result<Self::InEffect, Self::Error>;

    /// The file is of no use, for another reason than before.
    fn refused(&self) {}
}

/// Why a file is not read, or not followed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WatchedFileError {
    /// The file cannot be read.
    #[error("cannot read the {name} {}: {source}; check that it exists and that the agent may read it", path.display())]
    Read {
        /// What the file is.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: Arc<io::Error>,
    },
    /// The file is too large.
    #[error("the {name} {} is larger than {most} bytes; {mend}", path.display())]
    TooLarge {
        /// What the file is.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// The limit.
        most: u64,
        /// What to do.
        mend: &'static str,
    },
    /// Changes of the file cannot be noticed.
    #[error(
        "cannot watch {} for changes: {errno}; check that the directory exists, and fs.inotify.max_user_instances and max_user_watches",
        directory.display()
    )]
    Watch {
        /// The directory of the file.
        directory: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// The reader itself failed.
    #[error("reading the {name} {} ended unexpectedly: {reason}; report this with the file", path.display())]
    Internal {
        /// What the file is.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
}

/// What is known about a file, for readiness and `culvert status`.
#[derive(Debug, Clone)]
pub struct FileStatus<V, E> {
    /// What of it is in effect; none before the first good content.
    pub in_effect: Option<V>,
    /// How many contents have been in effect.
    pub contents: u64,
    /// Since when this one is.
    pub loaded_at: Option<SystemTime>,
    /// Why the file as it is now is not in effect; none if it is.
    pub error: Option<E>,
}

/// What a subject's watcher tells.
pub type Told<S> = watch::Receiver<FileStatus<<S as Subject>::InEffect, <S as Subject>::Error>>;

impl<V, E> Default for FileStatus<V, E> {
    fn default() -> Self {
        Self {
            in_effect: None,
            contents: 0,
            loaded_at: None,
            error: None,
        }
    }
}

/// Keeps what a file says in effect.
#[derive(Debug)]
pub struct FileWatcher<S: Subject> {
    taker: Arc<Taker<S>>,
    status: watch::Sender<FileStatus<S::InEffect, S::Error>>,
    directories: Directories,
    /// How often the file is looked at without an event. Tests of events make it an hour.
    pub(crate) recheck: Duration,
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

impl<S: Subject> FileWatcher<S> {
    /// Begins to notice changes. The file itself is read by [`Self::run`]; it need not exist yet, its directory
    /// must. To be called within a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// Its directory cannot be watched.
    pub fn new(path: impl Into<PathBuf>, subject: S) -> Result<(Self, Told<S>), WatchedFileError> {
        let path = path.into();
        let directories = Directories::of(&path)?;
        let (status, receiver) = watch::channel(FileStatus::default());
        let watcher = Self {
            taker: Arc::new(Taker {
                path,
                subject,
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
        let path = &self.taker.path;
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
        let path = &self.taker.path;
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
                let error = WatchedFileError::Internal {
                    name: S::NAME,
                    path: self.taker.path.clone(),
                    reason: ended.to_string(),
                };
                let outcome = Outcome::Refused(error.into());
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
            Outcome::InEffect(told) => {
                self.status.send_modify(|status| {
                    *status = FileStatus {
                        in_effect: Some(told),
                        contents: status.contents.wrapping_add(1),
                        loaded_at: Some(SystemTime::now()),
                        error: None,
                    };
                });
            }
        }
    }

    fn report(&self, error: S::Error) {
        let text = error.to_string();
        self.status.send_if_modified(|status| {
            let known = status
                .error
                .as_ref()
                .is_some_and(|known| known.to_string() == text);
            if !known {
                tracing::error!(%error, "the {} is not in effect; what was in effect stays so", S::NAME);
                self.taker.subject.refused();
                status.error = Some(error);
            }
            !known
        });
    }
}

/// The part that blocks.
#[derive(Debug)]
struct Taker<S> {
    path: PathBuf,
    subject: S,
    hasher: RandomState,
}

struct Taken<S: Subject> {
    stamp: Option<Stamp>,
    content: Option<Content>,
    outcome: Outcome<S>,
}

enum Outcome<S: Subject> {
    /// As it was at the last attempt.
    Same,
    InEffect(S::InEffect),
    Refused(S::Error),
}

impl<S: Subject> Taker<S> {
    fn take(&self, before: Option<Content>) -> Taken<S> {
        let stamp = Stamp::of(&self.path);
        let bytes = match read(&self.path, S::NAME, S::MOST_BYTES, S::TOO_LARGE) {
            Ok(bytes) => bytes,
            Err(error) => {
                return Taken {
                    stamp,
                    content: None,
                    outcome: Outcome::Refused(error.into()),
                };
            }
        };
        if Stamp::of(&self.path) != stamp {
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
            self.subject
                .put_in_effect(&self.path, &bytes)
                .map_or_else(Outcome::Refused, Outcome::InEffect)
        };
        Taken {
            stamp,
            content: Some(content),
            outcome,
        }
    }
}

/// Reads a file whole, of `most` bytes at most. Blocks.
///
/// # Errors
/// It cannot be read, or is larger.
pub fn read(
    path: &Path,
    name: &'static str,
    most: u64,
    mend: &'static str,
) -> Result<Vec<u8>, WatchedFileError> {
    let failed = |source: io::Error| WatchedFileError::Read {
        name,
        path: path.to_owned(),
        source: Arc::new(source),
    };
    let irregular = || io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
    // A fifo or device would never end or never begin; to open a fifo is to wait for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(failed(irregular()));
    }
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(irregular()));
    }
    let mut bytes = Vec::new();
    file.take(most.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > most {
        return Err(WatchedFileError::TooLarge {
            name,
            path: path.to_owned(),
            most,
            mend,
        });
    }
    Ok(bytes)
}

impl WatchedFileError {
    /// There is no such file.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
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
