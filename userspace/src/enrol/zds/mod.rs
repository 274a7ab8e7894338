//! ZDS: istio-cni tells which pods of this node are in the mesh, over a unix socket, and hands over their network namespaces.
//!
//! Invariants: one message at a time, and exactly one answer to each; a descriptor that came is used or closed; a pod stays when the
//! connection is lost, until a whole snapshot has not named it. `protocol` and `session` decide without any I/O, `connection` carries,
//! `client` joins them. Run by `node`.

mod client;
mod connection;
mod error;
mod protocol;
mod session;

pub use client::{Client, PodHost, Status};
pub use error::ZdsError;
