//! Culvert: the node agent of an ambient service mesh. `docs/ARCHITECTURE.md` is the map of this crate.

pub mod admin;
pub mod cli;
pub mod config;
pub mod control_channel;
pub mod dev_control_plane;
pub mod enrol;
pub mod identity;
pub mod kernel;
pub mod mesh;
pub mod node;
pub mod policy;
pub mod proxy;
pub mod telemetry;
pub mod watched_file;
pub mod wire;
pub mod xds;
