//! Turns each mesh, and each behaviour, into what clients are told. A task, run by `dev_control_plane::run`.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::behaviour::Behaviour;
use super::distort;
use super::snapshot::Snapshot;
use crate::mesh::{Mesh, Revision, Store};

/// What clients of xDS are told, and how.
#[derive(Debug)]
pub struct View {
    /// The resources, with what is wrong in them.
    pub snapshot: Snapshot,
    /// What else is wrong.
    pub behaviour: Arc<Behaviour>,
}

/// The current view; none before there is a mesh.
pub type Published = watch::Receiver<Option<Arc<View>>>;

/// Publishes each mesh of `store`, until `shutdown`.
pub async fn run(
    store: Arc<Store>,
    mut behaviour: watch::Receiver<Arc<Behaviour>>,
    published: watch::Sender<Option<Arc<View>>>,
    shutdown: CancellationToken,
) {
    let mut meshes = store.subscribe();
    // There may be one already.
    meshes.mark_changed();
    loop {
        // An end of either means that its task has ended, which is noticed elsewhere.
        let changed = tokio::select! {
            () = shutdown.cancelled() => return,
            changed = meshes.changed() => changed,
            changed = behaviour.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        let revision = *meshes.borrow_and_update();
        if revision == Revision::default() {
            continue;
        }
        let (mesh, behaviour) = (store.load(), Arc::clone(&behaviour.borrow_and_update()));
        // Encoding a large mesh takes a while.
        match tokio::task::spawn_blocking(move || view(&mesh, revision, behaviour)).await {
            Ok(view) => {
                published.send_replace(Some(Arc::new(view)));
            }
            Err(error) => {
                tracing::error!(%error, "a mesh could not be encoded; clients keep the one before");
            }
        }
    }
}

fn view(mesh: &Mesh, revision: Revision, behaviour: Arc<Behaviour>) -> View {
    let mut snapshot = Snapshot::of(mesh, revision.0);
    for name in distort::snapshot(&mut snapshot, &behaviour.xds) {
        tracing::warn!(
            name,
            "there is no such resource, so nothing can be wrong with it"
        );
    }
    View {
        snapshot,
        behaviour,
    }
}
