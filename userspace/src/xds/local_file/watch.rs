//! Follows the mesh file, and keeps the store at what it says: a file that cannot be taken is reported once and leaves the
//! mesh as it was. Run by `node` as a task.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use super::{LocalFile, LocalFileError, MAX_BYTES};
use crate::followed_file::{FileError, FollowedFile, Reader};
use crate::mesh::{Mesh, MeshDefaults, Revision, Store};

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
pub type LocalFileWatcher = FollowedFile<Taker>;

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
        let (status, receiver) = watch::channel(LocalFileStatus::default());
        let path = self.path.clone();
        let taker = Taker {
            file: self.clone(),
            defaults,
            store,
            status,
        };
        let watcher = FollowedFile::new(path, taker).map_err(|error| self.refused(error))?;
        Ok((watcher, receiver))
    }

    /// Puts `bytes` in effect as this file's content.
    ///
    /// # Errors
    /// They are not a mesh.
    pub fn put_in_effect(
        &self,
        bytes: &[u8],
        defaults: &MeshDefaults,
        store: &Store,
    ) -> Result<Revision, LocalFileError> {
        let resources = self.parse(bytes)?;
        let mesh = Mesh::build(resources, defaults).map_err(|source| LocalFileError::Mesh {
            path: self.path.clone(),
            source,
        })?;
        let (workloads, services, policies) = (
            mesh.workloads().len(),
            mesh.services().len(),
            mesh.policies().len(),
        );
        let revision = store.replace(mesh);
        let file = self.path.display();
        tracing::info!(%file, workloads, services, policies, revision = revision.0, "the mesh file is in effect");
        Ok(revision)
    }
}

/// Puts the file in effect, or says why not.
#[derive(Debug)]
pub struct Taker {
    file: LocalFile,
    defaults: MeshDefaults,
    store: Arc<Store>,
    status: watch::Sender<LocalFileStatus>,
}

impl Reader for Taker {
    const MAX_BYTES: u64 = MAX_BYTES;

    fn read(&self, content: Result<&[u8], FileError>) {
        let taken = content
            .map_err(|error| self.file.refused(error))
            .and_then(|bytes| self.file.put_in_effect(bytes, &self.defaults, &self.store));
        match taken {
            Err(error) => self.report(error),
            Ok(revision) => {
                self.status.send_replace(LocalFileStatus {
                    revision: Some(revision),
                    loaded_at: Some(SystemTime::now()),
                    error: None,
                });
            }
        }
    }
}

impl Taker {
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
