//! One pin directory, one owner: the process whose id and start time the CONFIG map names.
//!
//! Locks on the directory keep this true; the kernel gives them back when a process ends, however it ends:
//! - on `v<layout>`, alone, while an agent starts and while `culvert unload` takes everything away;
//! - on `pods`, shared by all agents that live with the directory, also by one that is no longer the owner and only ends its
//!   connections; `culvert unload` needs it alone;
//! - on `maps`, alone, for the moment in which CONFIG is read, found to name this process, and written.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use culvert_abi::Config;

use super::{
    KernelError,
    pins::{self, Pins},
};

/// How long another agent may take to start with the same directory.
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(20);

/// A process, told from a later one with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pub pid: u32,
    /// `/proc/PID/stat`, field 22.
    pub started: u64,
}

impl Owner {
    pub fn this_process() -> Result<Self, KernelError> {
        let pid = std::process::id();
        match start_time(pid) {
            Some(started) => Ok(Self { pid, started }),
            None => Err(KernelError::File {
                doing: "read the agent's own start time from",
                path: format!("/proc/{pid}/stat").into(),
                source: io::Error::other("there is none: is /proc mounted?"),
            }),
        }
    }

    /// The owner that a configuration names.
    pub fn of(config: &Config) -> Option<Self> {
        (config.owner_pid != 0).then_some(Self {
            pid: config.owner_pid,
            started: config.owner_started,
        })
    }

    /// Whether the process still runs, as far as it can be seen from here: another process namespace has other numbers.
    pub fn lives(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }
}

fn start_time(pid: u32) -> Option<u64> {
    parse_start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The program's name, field 2, may hold spaces and parentheses: fields are counted from the last one.
fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// A lock on a pin directory, given back when this is dropped.
#[derive(Debug)]
pub struct Held {
    _file: File,
}

/// Waits a while for the right to set the kernel part up or take it away. The directory is made if need be.
pub fn starting(pins: &Pins) -> Result<Held, KernelError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Whoever has the right may take the directory away with it.
        pins.create()?;
        if let Some(held) = try_starting(pins)? {
            return Ok(held);
        }
        if Instant::now() >= deadline {
            return Err(KernelError::Busy {
                pin_dir: pins.directory().to_owned(),
            });
        }
        thread::sleep(PAUSE);
    }
}

/// The right to set the kernel part up or take it away, unless somebody has it or the directory is not there.
pub fn try_starting(pins: &Pins) -> Result<Option<Held>, KernelError> {
    lock(pins.root(), File::try_lock)
}

/// Says that an agent lives with the directory, until the result is dropped. To be called with the right to start.
pub fn live(pins: &Pins) -> Result<Held, KernelError> {
    lock(&pins.living(), File::try_lock_shared)?.ok_or_else(|| KernelError::Busy {
        pin_dir: pins.directory().to_owned(),
    })
}

/// Makes sure that no agent lives with the directory, until the result is dropped; `None` when one does.
pub fn alone(pins: &Pins) -> Result<Option<Held>, KernelError> {
    lock(&pins.living(), File::try_lock)
}

/// A lock on a directory that is still there under its path once the lock is held.
fn lock(
    path: &Path,
    how: impl FnOnce(&File) -> Result<(), TryLockError>,
) -> Result<Option<Held>, KernelError> {
    let failed = |source| KernelError::File {
        doing: "lock",
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    match how(&file) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    let inode = file.metadata().map_err(failed)?.ino();
    let now = fs::metadata(path).map(|metadata| metadata.ino());
    Ok(now
        .is_ok_and(|now| now == inode)
        .then_some(Held { _file: file }))
}

/// Keeps two agents from writing CONFIG at once, each over what the other wrote.
#[derive(Debug)]
pub struct Pen {
    maps: File,
}

impl Pen {
    pub fn of(pins: &Pins) -> Result<Self, KernelError> {
        let path = pins.maps();
        let maps = File::open(&path).map_err(pins::failed("open", &path))?;
        Ok(Self { maps })
    }

    /// Runs `write` while nobody else writes. To be called by one thread at a time; nobody takes longer than a system call.
    pub fn hold<T>(&self, write: impl FnOnce() -> T) -> io::Result<T> {
        self.maps.lock()?;
        let written = write();
        self.maps.unlock()?;
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_a_later_one_with_its_id() {
        let own = Owner::this_process().unwrap();
        assert!(own.lives());
        let earlier = Owner {
            started: own.started - 1,
            ..own
        };
        assert!(!earlier.lives());
        let nobody = Owner {
            pid: u32::MAX,
            started: 0,
        };
        assert!(!nobody.lives());
    }

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9";
        assert_eq!(parse_start_time(stat), Some(4242));
        for malformed in [
            "",
            "7 (a",
            "7 (a) S 1",
            "7 (a) S 1 7 7 0 -1 4 1 2 3 4 5 6 7 8 20 0 1 0 x",
        ] {
            assert_eq!(parse_start_time(malformed), None, "{malformed}");
        }
    }

    #[test]
    fn only_one_may_start_and_a_directory_that_has_gone_gives_no_lock() {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::of(directory.path());
        assert!(try_starting(&pins).unwrap().is_none());
        fs::create_dir_all(pins.living()).unwrap();
        let held = try_starting(&pins).unwrap().unwrap();
        assert!(try_starting(&pins).unwrap().is_none());
        drop(held);
        assert!(try_starting(&pins).unwrap().is_some());
    }

    #[test]
    fn nobody_is_alone_while_an_agent_lives() {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::of(directory.path());
        fs::create_dir_all(pins.living()).unwrap();
        let (first, second) = (live(&pins).unwrap(), live(&pins).unwrap());
        drop(first);
        assert!(alone(&pins).unwrap().is_none());
        drop(second);
        let alone = alone(&pins).unwrap().unwrap();
        assert!(live(&pins).is_err());
        drop(alone);
        assert!(live(&pins).is_ok());
    }
}
