//! The development CA's file: read without a lock, made once under one, published by a rename.
//!
//! Called by `DevCa::open` only. What is on disk is either nothing or a complete root.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::DevCaError;

const FILE: &str = "dev-ca.pem";
const LOCK: &str = "dev-ca.lock";
const NEW: &str = "dev-ca.pem.new";
/// A root and its key take less than 2 KiB.
const MAX_FILE_BYTES: u64 = 64 * 1024;
const LOCK_DEADLINE: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(20);

pub(super) struct Store {
    directory: PathBuf,
    file: PathBuf,
}

impl Store {
    pub(super) fn open(directory: &Path) -> Result<Self, DevCaError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory);
        made.map_err(io_error("create the directory", directory))?;
        let metadata = fs::metadata(directory).map_err(io_error("look at", directory))?;
        // Who may write here may replace the root.
        if metadata.mode() & 0o022 != 0 {
            return Err(DevCaError::Permissions {
                path: directory.to_owned(),
                mode: metadata.mode() & 0o777,
                want: 0o700,
            });
        }
        Ok(Self {
            directory: directory.to_owned(),
            file: directory.join(FILE),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.file
    }

    pub(super) fn read_or_create(
        &self,
        make: impl FnOnce() -> Result<String, DevCaError>,
    ) -> Result<String, DevCaError> {
        if let Some(pem) = self.read()? {
            return Ok(pem);
        }
        let _lock = self.lock()?;
        // Another process may have made it while this one waited.
        if let Some(pem) = self.read()? {
            return Ok(pem);
        }
        let pem = make()?;
        self.publish(&pem)?;
        Ok(pem)
    }

    fn read(&self) -> Result<Option<String>, DevCaError> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let file = match options.open(&self.file) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("open", &self.file)(error)),
        };
        let metadata = file.metadata().map_err(io_error("look at", &self.file))?;
        if !metadata.is_file() {
            return Err(self.malformed("it is not a regular file"));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(DevCaError::Permissions {
                path: self.file.clone(),
                mode: metadata.mode() & 0o777,
                want: 0o600,
            });
        }
        let mut bytes = Vec::new();
        let read = file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes);
        let length = read.map_err(io_error("read", &self.file))?;
        if u64::try_from(length).is_ok_and(|length| length > MAX_FILE_BYTES) {
            return Err(self.malformed("it is too large"));
        }
        String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| self.malformed("it is not text"))
    }

    fn lock(&self) -> Result<Flock<File>, DevCaError> {
        let path = self.directory.join(LOCK);
        let mut options = OpenOptions::new();
        options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(&path).map_err(io_error("open", &path))?;
        let started = Instant::now();
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => file,
                Err((_, error)) => return Err(io_error("lock", &path)(error.into())),
            };
            if started.elapsed() >= LOCK_DEADLINE {
                return Err(DevCaError::Locked {
                    path,
                    waited: LOCK_DEADLINE,
                });
            }
            thread::sleep(LOCK_RETRY);
        }
    }

    /// Only under the lock.
    fn publish(&self, pem: &str) -> Result<(), DevCaError> {
        let new = self.directory.join(NEW);
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &new)(error));
            }
            _ => {}
        }
        let written = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(pem.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &self.file)?;
            File::open(&self.directory)?.sync_all()
        };
        written().map_err(io_error("write", &self.file))
    }

    fn malformed(&self, reason: &str) -> DevCaError {
        DevCaError::Malformed {
            path: self.file.clone(),
            reason: reason.to_owned(),
        }
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DevCaError {
    let path = path.to_owned();
    move |error| DevCaError::Io {
        action,
        path,
        error,
    }
}
