//! A file that is followed: a change is told a few milliseconds after it was written.
//!
//! A change counts when its writer has closed the file or renamed another over it. A slow check of the file's metadata
//! covers what is not notified: writers that never close, removal, links elsewhere, remote file systems, lost events. What
//! reads a file's content decides what becomes of it. Used for the mesh file and the revocation lists.

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use directories::{Directories, Event};

mod directories;

/// See [`FollowedFile::recheck`].
const RECHECK: Duration = Duration::from_secs(1);

/// Why a file's content is not known. Whoever reports it names the file.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{0}")]
    Read(Arc<io::Error>),
    /// It has more bytes than its reader takes.
    #[error("larger than {0} bytes")]
    TooLarge(u64),
    /// Changes of it cannot be noticed.
    #[error("cannot watch {} for changes: {errno}", directory.display())]
    Watch {
        /// Its directory.
        directory: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// Whoever read its content broke down over it.
    #[error("reading it ended unexpectedly: {0}")]
    Internal(String),
}

impl FileError {
    /// There is no such file.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Read(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

/// Who takes the content of a file.
pub trait Reader: Send + Sync + 'static {
    /// The largest file, in bytes.
    const MAX_BYTES: u64;

    /// The file is this now, or cannot be read. The same content is not told twice. May block.
    fn read(&self, content: Result<&[u8], FileError>);
}

/// Keeps a reader at what a file says.
#[derive(Debug)]
pub struct FollowedFile<R> {
    path: PathBuf,
    reader: Arc<R>,
    hasher: RandomState,
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

/// Reads a whole file of at most so many bytes. Blocks.
///
/// # Errors
/// It is not there, not a regular file, or larger.
pub fn read_bounded(path: &Path, most: u64) -> Result<Vec<u8>, FileError> {
    let failed = |error: io::Error| FileError::Read(Arc::new(error));
    // Asked before opening: opening a fifo would wait for a writer.
    let is_file = std::fs::metadata(path).map_err(failed)?.is_file();
    let irregular = || io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
    if !is_file {
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
        return Err(FileError::TooLarge(most));
    }
    Ok(bytes)
}

impl<R: Reader> FollowedFile<R> {
    /// Begins to notice changes. The file itself is read by [`FollowedFile::run`]; it need not exist yet, its directory
    /// must. To be called within a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// Its directory cannot be watched.
    pub fn new(path: PathBuf, reader: R) -> Result<Self, FileError> {
        let directories = Directories::of(&path)?;
        Ok(Self {
            path,
            reader: Arc::new(reader),
            hasher: RandomState::new(),
            directories,
            recheck: RECHECK,
            target: None,
            taken: None,
            rechecked: None,
            content: None,
        })
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
        let path = &self.path;
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
        let path = &self.path;
        self.target = path.canonicalize().ok();
        self.directories.follow(path, self.target.as_deref());
        let now = Stamp::of(path);
        let settled = std::mem::replace(&mut self.rechecked, now) == now;
        self.content.is_none() || (settled && now != self.taken)
    }

    /// Has the content read, unless it is what was read before.
    async fn take(&mut self) {
        let (path, before, hasher) = (self.path.clone(), self.content, self.hasher.clone());
        let reader = Arc::clone(&self.reader);
        // Reading a large file takes a while.
        let taken = tokio::task::spawn_blocking(move || {
            let stamp = Stamp::of(&path);
            let bytes = match read_bounded(&path, R::MAX_BYTES) {
                Ok(bytes) => bytes,
                Err(error) => {
                    reader.read(Err(error));
                    return (stamp, None);
                }
            };
            if Stamp::of(&path) != stamp {
                // Somebody writes to it right now. Half a file may well be a valid one, so it is not even tried; its end
                // is another event, or the next recheck finds that the stamp is not this one.
                return (stamp, before);
            }
            let content = Content(bytes.len(), hasher.hash_one(&bytes));
            if Some(content) != before {
                reader.read(Ok(&bytes));
            }
            (stamp, Some(content))
        });
        (self.taken, self.content) = match taken.await {
            Ok(taken) => taken,
            Err(ended) => {
                self.reader
                    .read(Err(FileError::Internal(ended.to_string())));
                // The same content would end the same way.
                (self.taken, before.or(Some(Content(0, 0))))
            }
        };
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
