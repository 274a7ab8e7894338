//! What can be wrong with a message of istio-cni's, or with the connection to it.

use std::{io, path::PathBuf};

/// The text goes back to istio-cni where a message was wrong, and into the log where the connection was.
#[derive(Debug, thiserror::Error)]
pub enum ZdsError {
    #[error("cannot connect to {}: {source}; is istio-cni running, and its socket where INPOD_UDS says?", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("{} is served by user {uid}, not by root: whoever that is must not say which pods are in the mesh", path.display())]
    NotRoot { path: PathBuf, uid: u32 },
    #[error("the connection to istio-cni: {0}")]
    Io(#[from] io::Error),
    #[error("istio-cni has closed the connection")]
    Closed,
    #[error("the message is longer than {0} bytes")]
    TooLong(usize),
    #[error("the message cannot be read: {0}")]
    Unreadable(#[from] prost::DecodeError),
    #[error("the message says nothing that this version knows")]
    Unknown,
    #[error("the uid is not one: 1 to 253 characters without control characters or spaces")]
    Uid,
    #[error("{what} comes with {expected} descriptors, this one came with {found}")]
    Descriptors {
        what: &'static str,
        expected: usize,
        found: usize,
    },
    #[error(
        "not all descriptors of the message arrived: the agent has too many open files, or there were too many"
    )]
    DescriptorsLost,
    #[error("the snapshot names more than {0} pods")]
    TooManyPods(usize),
    #[error("it takes longer than istio-cni waits; it goes on, and is tried again if it fails")]
    Slow,
}
