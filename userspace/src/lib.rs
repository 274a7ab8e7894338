//! Culvert: the node agent of an ambient service mesh. `docs/ARCHITECTURE.md` is the map of this crate.

pub mod kernel;
