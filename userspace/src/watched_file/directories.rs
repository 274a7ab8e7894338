//! Notification of changes in the directories that hold a watched file: that of its path, and that of the file behind it
//! where the path is a link.
//!
//! Directories are watched, not the file, so that renaming over it is seen (editors; the `..data` link of a Kubernetes
//! volume). Used by the watcher above.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::WatchedFileError;

/// A change of a directory.
#[derive(Debug)]
pub struct Event {
    /// The entry that changed.
    pub name: Option<OsString>,
    /// It is new, and if it is a file, empty. Otherwise it was written to its end, or something was renamed to it.
    pub created: bool,
    /// Events were lost: anything may have changed.
    pub lost: bool,
}

/// The watched directories.
#[derive(Debug)]
pub struct Directories {
    notifier: AsyncFd<Notifier>,
    watched: HashSet<WatchDescriptor>,
}

#[derive(Debug)]
struct Notifier(Inotify);

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Directories {
    /// Watches the directory of this path.
    pub fn of(path: &Path) -> Result<Self, WatchedFileError> {
        let failed = |errno| WatchedFileError::Watch {
            directory: directory_of(path).to_owned(),
            errno,
        };
        let inotify =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(failed)?;
        let first = watch(&inotify, path).map_err(failed)?;
        #[expect(
            deprecated,
            reason = "its successor is an unsafe fn; what it asks for holds, a Notifier owns its descriptor"
        )]
        let notifier = AsyncFd::with_interest(Notifier(inotify), Interest::READABLE)
            .map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(0))))?;
        Ok(Self {
            notifier,
            watched: HashSet::from([first]),
        })
    }

    /// Watches the directories of path and target, and no others. A directory that was replaced is watched anew; one that
    /// is missing will be with the next call after it is back.
    pub fn follow(&mut self, path: &Path, target: Option<&Path>) {
        let inotify = &self.notifier.get_ref().0;
        let wanted: HashSet<_> = [Some(path), target]
            .into_iter()
            .flatten()
            .filter_map(|file| watch(inotify, file).ok())
            .collect();
        for left in self.watched.difference(&wanted) {
            // Fails where the directory is gone, and the kernel has forgotten it already.
            let _ = inotify.rm_watch(*left);
        }
        self.watched = wanted;
    }

    /// Waits for changes and returns all there are. Loses none if it is dropped while waiting.
    pub async fn changed(&self) -> Vec<Event> {
        loop {
            let Ok(mut ready) = self.notifier.readable().await else {
                return std::future::pending().await;
            };
            match ready
                .try_io(|notifier| notifier.get_ref().0.read_events().map_err(io::Error::from))
            {
                Ok(Ok(events)) => return events.into_iter().map(Event::from).collect(),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "changes of a watched file are no longer notified; it is looked at each second");
                    return std::future::pending().await;
                }
                Err(_would_block) => {}
            }
        }
    }
}

fn watch(inotify: &Inotify, file: &Path) -> nix::Result<WatchDescriptor> {
    let flags =
        AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE;
    inotify.add_watch(directory_of(file), flags | AddWatchFlags::IN_ONLYDIR)
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    }
}

impl From<InotifyEvent> for Event {
    fn from(event: InotifyEvent) -> Self {
        Self {
            created: event.mask.contains(AddWatchFlags::IN_CREATE),
            lost: event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW),
            name: event.name,
        }
    }
}
