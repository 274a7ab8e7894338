//! Which pods are ours: joining and leaving the mesh on this node.
//!
//! Invariant: a pod is enrolled completely or not at all; a step that fails undoes those before it. Called by `node` for the
//! admin socket's requests, and through `zds` for istio-cni's.

mod addresses;
mod error;
mod memory;
mod place;
mod pod;
mod registry;
mod setup;
pub mod zds;

pub use addresses::belongs_to_another;
pub use error::EnrolError;
pub use memory::{KnownPod, Memory};
pub use place::NetnsPlace;
pub use pod::{LocalPod, Origin, PodSpec, PodUid};
pub use registry::Registry;
pub use setup::Enrolment;
