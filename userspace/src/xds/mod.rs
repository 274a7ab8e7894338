//! Where the mesh comes from. A source turns what it reads into `mesh::MeshResources` and puts the mesh built of them into
//! the `mesh::Store`; what it cannot read it reports, and the mesh stays as it was.

mod annotations;
mod annotations_file;
mod backoff;
mod client;
mod decode;
mod demand;
mod feed;
pub mod local_file;
mod scalars;
mod session;
mod yaml;

pub use annotations_file::{AnnotationsError, AnnotationsInEffect, AnnotationsStatus};
pub use client::{Termination, XdsClient, XdsCounts, XdsStatus};
pub use demand::{Demand, DemandError};
pub use local_file::{LocalFile, LocalFileError, LocalFileStatus};
pub use session::ResourceType;
