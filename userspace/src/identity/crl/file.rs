//! The file of revocation lists (`CRL_PATH`): read at the start, followed after that.
//!
//! Invariants: what is wrong at the start keeps the agent from starting, but for a file that is not there yet; what goes wrong later leaves
//! the last good lists in force. A file that is emptied is taken for one that is being written.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{MalformedCrl, RevocationLists, Revocations};
use crate::watched_file::{self, FileStatus, FileWatcher, Subject, Told, WatchedFileError};

/// The largest file, in bytes: some 400,000 certificates. A ConfigMap holds 1 MiB.
const MAX_BYTES: u64 = 16 << 20;

/// Why the lists of the file are not in force.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CrlFileError {
    #[error("CRL_PATH: {0}")]
    File(#[from] WatchedFileError),
    #[error(
        "CRL_PATH: {}: {error}; put revocation lists of the mesh's authorities there, or unset CRL_PATH", path.display()
    )]
    Content { path: PathBuf, error: MalformedCrl },
    #[error(
        "CRL_PATH: {} is empty; to revoke nothing put lists there that name no certificate, or start the agent again", path.display()
    )]
    Emptied { path: PathBuf },
}

/// What is known about the file.
pub type CrlFileStatus = FileStatus<(), CrlFileError>;

/// Keeps [`Revocations`] at what the file says.
#[derive(Debug)]
pub struct CrlFile {
    revocations: Revocations,
}

impl CrlFile {
    /// Reads the file for the first time, and begins to notice changes. Blocks shortly. To be called within a tokio runtime with I/O
    /// and time.
    ///
    /// # Errors
    /// It is there but of no use, or its directory cannot be watched.
    pub fn open(
        path: &Path,
        revocations: Revocations,
    ) -> Result<(FileWatcher<Self>, Told<Self>), CrlFileError> {
        let file = Self { revocations };
        match watched_file::read(path, Self::NAME, Self::MOST_BYTES, Self::TOO_LARGE) {
            Ok(content) => file.put_in_force(path, &content)?,
            // As a volume that is optional, whose content may come later. The watcher says so.
            Err(error) if error.is_missing() => {}
            Err(error) => return Err(error.into()),
        }
        Ok(FileWatcher::new(path, file)?)
    }

    fn put_in_force(&self, path: &Path, content: &[u8]) -> Result<(), CrlFileError> {
        let lists = RevocationLists::parse(content).map_err(|error| CrlFileError::Content {
            path: path.to_owned(),
            error,
        })?;
        if lists.is_empty() && !self.revocations.current().is_empty() {
            let path = path.to_owned();
            return Err(CrlFileError::Emptied { path });
        }
        let (count, certificates) = (lists.count(), lists.certificates());
        let file = path.display();
        tracing::info!(%file, lists = count, certificates, "the revocation lists are in force");
        for issuer in lists.overdue(SystemTime::now()) {
            tracing::warn!(
                issuer,
                "a revocation list is past its next update; what was revoked since is not known"
            );
        }
        self.revocations.replace(lists);
        Ok(())
    }
}

impl Subject for CrlFile {
    type InEffect = ();
    type Error = CrlFileError;
    const NAME: &'static str = "file of revocation lists";
    const MOST_BYTES: u64 = MAX_BYTES;
    const TOO_LARGE: &'static str = "leave out lists of certificates that have expired";

    fn put_in_effect(&self, path: &Path, bytes: &[u8]) -> Result<(), CrlFileError> {
        self.put_in_force(path, bytes)?;
        self.revocations.count(|counts| counts.accepted += 1);
        Ok(())
    }

    fn refused(&self) {
        self.revocations.count(|counts| counts.rejected += 1);
    }
}
