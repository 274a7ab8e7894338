//! The current snapshot and the news that it changed.
//!
//! Invariant: who sees revision n finds a snapshot at least that new. Written by a source in `xds`, read by everyone.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::Mesh;

/// How often the mesh was replaced. Grows only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(pub u64);

/// Holds the current mesh. Begins empty, at revision 0.
#[derive(Debug)]
pub struct Store {
    mesh: ArcSwap<Mesh>,
    revision: watch::Sender<Revision>,
}

impl Store {
    /// An empty mesh.
    pub fn new() -> Self {
        Self {
            mesh: ArcSwap::from_pointee(Mesh::default()),
            revision: watch::Sender::new(Revision(0)),
        }
    }

    /// The current mesh. Does not wait for writers.
    pub fn load(&self) -> Arc<Mesh> {
        self.mesh.load_full()
    }

    /// Puts a new mesh in place and tells the subscribers.
    pub fn replace(&self, mesh: Mesh) -> Revision {
        let mesh = Arc::new(mesh);
        let mut replaced = None;
        let mut new = Revision(0);
        // Within the sender's lock, so that two writers cannot leave the older mesh under the newer number. The old mesh is
        // dropped after it: freeing a large one takes a while.
        self.revision.send_modify(|revision| {
            replaced = Some(self.mesh.swap(mesh));
            revision.0 = revision.0.wrapping_add(1);
            new = *revision;
        });
        drop(replaced);
        new
    }

    /// The current revision.
    pub fn revision(&self) -> Revision {
        *self.revision.borrow()
    }

    /// Learns of each later change; several in a row may be seen as one.
    pub fn subscribe(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}
