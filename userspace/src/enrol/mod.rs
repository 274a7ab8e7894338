//! Which pods are ours: joining and leaving the mesh on this node.
//!
//! Invariant: a pod is enrolled completely or not at all; a step that fails undoes those before it. Called by `node` for the
//! admin socket's requests (and later by istio-cni's protocol).

mod addresses;
mod error;
mod memory;
mod pod;
mod registry;
mod setup;

pub use addresses::belongs_to_another;
pub use error::EnrolError;
pub use memory::{KnownPod, Memory};
pub use pod::{LocalPod, PodSpec, PodUid};
pub use registry::Registry;
pub use setup::Enrolment;
