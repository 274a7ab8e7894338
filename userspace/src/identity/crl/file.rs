//! The file of revocation lists (`CRL_PATH`): read at the start, followed after that.
//!
//! Invariants: what is wrong at the start keeps the agent from starting, but for a file that is not there yet; what goes wrong later leaves
//! the last good lists in force. A file that is emptied is taken for one that is being written.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tokio::sync::watch;

use super::{MalformedCrl, RevocationLists, Revocations};
use crate::followed_file::{FileError, FollowedFile, Reader, read_bounded};

/// The largest file, in bytes: some 400,000 certificates. A ConfigMap holds 1 MiB.
const MAX_BYTES: u64 = 16 << 20;

/// Why the lists of the file are not in force.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CrlFileError {
    #[error(
        "CRL_PATH: cannot read {}: {error}; check that it exists and that the agent may read it", path.display()
    )]
    File { path: PathBuf, error: FileError },
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
#[derive(Debug, Clone, Default)]
pub struct CrlFileStatus {
    /// When the lists in force were read; none before the first good file.
    pub read_at: Option<SystemTime>,
    /// Why the file as it is now is not in force; none if it is.
    pub error: Option<CrlFileError>,
}

/// Keeps [`Revocations`] at what the file says.
#[derive(Debug)]
pub struct CrlFile {
    path: PathBuf,
    revocations: Revocations,
    status: watch::Sender<CrlFileStatus>,
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
    ) -> Result<(FollowedFile<Self>, watch::Receiver<CrlFileStatus>), CrlFileError> {
        let file = Self {
            path: path.to_owned(),
            revocations,
            status: watch::Sender::default(),
        };
        match read_bounded(path, MAX_BYTES) {
            Ok(content) => file.put_in_force(&content)?,
            // As a volume that is optional, whose content may come later.
            Err(error) if error.is_missing() => file.report(file.unread(error)),
            Err(error) => return Err(file.unread(error)),
        }
        let status = file.status.subscribe();
        let followed = FollowedFile::new(path.to_owned(), file).map_err(|error| {
            let path = path.to_owned();
            CrlFileError::File { path, error }
        })?;
        Ok((followed, status))
    }

    fn unread(&self, error: FileError) -> CrlFileError {
        let path = self.path.clone();
        CrlFileError::File { path, error }
    }

    fn put_in_force(&self, content: &[u8]) -> Result<(), CrlFileError> {
        let lists = RevocationLists::parse(content).map_err(|error| CrlFileError::Content {
            path: self.path.clone(),
            error,
        })?;
        if lists.is_empty() && !self.revocations.current().is_empty() {
            let path = self.path.clone();
            return Err(CrlFileError::Emptied { path });
        }
        let (count, certificates) = (lists.count(), lists.certificates());
        let file = self.path.display();
        tracing::info!(%file, lists = count, certificates, "the revocation lists are in force");
        for issuer in lists.overdue(SystemTime::now()) {
            tracing::warn!(
                issuer,
                "a revocation list is past its next update; what was revoked since is not known"
            );
        }
        self.revocations.replace(lists);
        self.status.send_replace(CrlFileStatus {
            read_at: Some(SystemTime::now()),
            error: None,
        });
        Ok(())
    }

    fn report(&self, error: CrlFileError) {
        let text = error.to_string();
        self.status.send_if_modified(|status| {
            let known = status.error.as_ref().map(ToString::to_string);
            let news = known.as_ref() != Some(&text);
            if news {
                tracing::error!(%error, "the file of revocation lists is not in force; the lists stay as they were");
                status.error = Some(error);
            }
            news
        });
    }
}

impl Reader for CrlFile {
    const MAX_BYTES: u64 = MAX_BYTES;

    fn read(&self, content: Result<&[u8], FileError>) {
        let taken = content
            .map_err(|error| self.unread(error))
            .and_then(|content| self.put_in_force(content));
        match taken {
            Ok(()) => self.revocations.count(|counts| counts.accepted += 1),
            Err(error) => {
                self.revocations.count(|counts| counts.rejected += 1);
                self.report(error);
            }
        }
    }
}
