//! Where the mesh comes from. A source turns what it reads into `mesh::MeshResources` and puts the mesh built of them into
//! the `mesh::Store`; what it cannot read it reports, and the mesh stays as it was.

pub mod local_file;

pub use local_file::{LocalFile, LocalFileError, LocalFileStatus, LocalFileWatcher};
