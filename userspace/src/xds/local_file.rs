//! The mesh from a YAML file, for development and tests: laid out in `format`, followed by a `FileWatcher`.
//!
//! Invariants: a file is taken whole or not at all; size, nesting and aliases are bounded; an error says where in the file.
//! Called by `node`, which runs the watcher, and by the development control plane.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::yaml::{self, YamlError};
use crate::mesh::{Mesh, MeshDefaults, MeshError, MeshResources, Revision, Store};
use crate::watched_file::{self, FileStatus, FileWatcher, Subject, Told, WatchedFileError};

mod format;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod watch_tests;

/// The largest file, in bytes. A workload takes some 600.
const MAX_BYTES: u64 = 64 << 20;

/// What messages call it.
const NAME: &str = "mesh file";
/// What to do where it is larger.
const TOO_LARGE: &str = "serve a mesh of that size over xDS";

/// A mesh file.
#[derive(Debug, Clone)]
pub struct LocalFile {
    path: PathBuf,
}

/// Why a mesh file is not in effect.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LocalFileError {
    /// It cannot be read or followed.
    #[error(transparent)]
    File(#[from] WatchedFileError),
    /// The text is not a mesh.
    #[error(transparent)]
    Text(#[from] YamlError),
    /// There is nothing in it, as in a file that is just being written.
    #[error("the mesh file {} says nothing; for a mesh without workloads write `workloads: []`", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The resources contradict each other.
    #[error("{}: {source}", path.display())]
    Mesh {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        source: MeshError,
    },
}

/// What is known about the mesh file: the revision of the store that came from it last.
pub type LocalFileStatus = FileStatus<Revision, LocalFileError>;

/// The mesh that a mesh file describes, in a store.
#[derive(Debug)]
pub struct InStore {
    defaults: MeshDefaults,
    store: Arc<Store>,
}

impl LocalFile {
    /// Nothing is read yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps `store` at what the file says, once the watcher runs. See [`FileWatcher::new`].
    ///
    /// # Errors
    /// Its directory cannot be watched.
    pub fn watch(
        self,
        defaults: MeshDefaults,
        store: Arc<Store>,
    ) -> Result<(FileWatcher<InStore>, Told<InStore>), LocalFileError> {
        let subject = InStore { defaults, store };
        Ok(FileWatcher::new(self.path, subject)?)
    }

    /// Puts text in effect as if it were the file's; it goes by the file's path in errors.
    ///
    /// # Errors
    /// It is not a mesh.
    pub fn put_in_effect(
        self,
        text: &str,
        defaults: MeshDefaults,
        store: Arc<Store>,
    ) -> Result<Revision, LocalFileError> {
        InStore { defaults, store }.put_in_effect(&self.path, text.as_bytes())
    }

    /// Reads the file. Blocks.
    ///
    /// # Errors
    /// It cannot be read, or is not a mesh in the documented format.
    pub fn load(&self) -> Result<MeshResources, LocalFileError> {
        let bytes = watched_file::read(&self.path, NAME, MAX_BYTES, TOO_LARGE)?;
        parse(&self.path, &bytes)
    }
}

impl Subject for InStore {
    type InEffect = Revision;
    type Error = LocalFileError;
    const NAME: &'static str = NAME;
    const MOST_BYTES: u64 = MAX_BYTES;
    const TOO_LARGE: &'static str = TOO_LARGE;

    fn put_in_effect(&self, path: &Path, bytes: &[u8]) -> Result<Revision, LocalFileError> {
        let resources = parse(path, bytes)?;
        let mesh =
            Mesh::build(resources, &self.defaults).map_err(|source| LocalFileError::Mesh {
                path: path.to_owned(),
                source,
            })?;
        let (workloads, services, policies) = (
            mesh.workloads().len(),
            mesh.services().len(),
            mesh.policies().len(),
        );
        let revision = self.store.replace(mesh);
        let file = path.display();
        tracing::info!(%file, workloads, services, policies, revision = revision.0, "the mesh file is in effect");
        Ok(revision)
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<MeshResources, LocalFileError> {
    let document: format::Document = yaml::parse(path, bytes)?;
    document
        .into_resources()
        .ok_or_else(|| LocalFileError::Empty {
            path: path.to_owned(),
        })
}
