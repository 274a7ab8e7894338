//! Turns each mesh into the snapshot that clients are told of. A task, run by `dev_control_plane::run`.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::snapshot::Snapshot;
use crate::mesh::Store;

/// What is published now; nothing before there is a mesh.
pub type Published = watch::Receiver<Option<Arc<Snapshot>>>;

/// Publishes each mesh of `store`, until `shutdown`.
pub async fn run(
    store: Arc<Store>,
    published: watch::Sender<Option<Arc<Snapshot>>>,
    shutdown: CancellationToken,
) {
    let mut news = store.subscribe();
    while let Some(Ok(())) = shutdown.run_until_cancelled(news.changed()).await {
        let revision = news.borrow_and_update().0;
        let mesh = store.load();
        // Encoding a large mesh takes a while.
        let encoded = tokio::task::spawn_blocking(move || Snapshot::of(&mesh, revision)).await;
        match encoded {
            Ok(snapshot) => {
                published.send_replace(Some(Arc::new(snapshot)));
            }
            Err(error) => {
                tracing::error!(%error, "a mesh could not be encoded; clients keep the one before")
            }
        }
    }
}
