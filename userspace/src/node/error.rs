//! Why the agent did not start, or ended before it was asked to.

use std::io;

use crate::{
    admin::{http::BindError, socket::SocketError},
    identity::{CrlFileError, DevCaError},
    kernel::KernelError,
    watched_file::WatchedFileError,
    xds::LocalFileError,
};

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(
        "no source of certificates: set CA_ADDRESS to a certificate authority such as istiod, or give --dev-ca DIR for a development CA"
    )]
    NoCa,
    #[error(
        "no source of the mesh: set XDS_ADDRESS to a control plane such as istiod, LOCAL_XDS_PATH to a mesh file, or LOCAL_XDS to the mesh itself"
    )]
    NoMesh,
    #[error("CULVERT_TEST_KNOBS: unknown knob `{0}`")]
    UnknownKnob(String),
    #[error("cannot start the data threads: {0}")]
    Threads(io::Error),
    #[error("cannot wait for signals: {0}")]
    Signals(io::Error),
    #[error("the agent cannot go on: this part of it ended: {0}")]
    Ended(String),
    #[error(transparent)]
    Admin(#[from] SocketError),
    #[error(transparent)]
    Http(#[from] BindError),
    #[error(transparent)]
    Ca(#[from] DevCaError),
    #[error(transparent)]
    Mesh(#[from] LocalFileError),
    #[error(transparent)]
    Crl(#[from] CrlFileError),
    #[error(transparent)]
    File(#[from] WatchedFileError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
}
