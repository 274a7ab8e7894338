//! The watcher over real files: what is written arrives, what is broken is reported and changes nothing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::mesh::{MeshDefaults, Revision, Store};

/// Far more than anything here takes.
const DEADLINE: Duration = Duration::from_secs(20);

struct Watched {
    store: Arc<Store>,
    status: watch::Receiver<LocalFileStatus>,
    task: JoinHandle<()>,
    shutdown: DropGuard,
}

/// Hears of changes by events alone.
fn watched(path: impl AsRef<Path>) -> Watched {
    started(path, Duration::from_secs(3600))
}

/// Also looks for itself now and then.
fn rechecked(path: impl AsRef<Path>) -> Watched {
    started(path, Duration::from_millis(100))
}

fn started(path: impl AsRef<Path>, recheck: Duration) -> Watched {
    let store = Arc::new(Store::new());
    let (mut watcher, status) = LocalFile::new(path.as_ref())
        .watch(MeshDefaults::default(), store.clone())
        .unwrap();
    watcher.recheck = recheck;
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(watcher.run(shutdown.clone()));
    Watched {
        store,
        status,
        task,
        shutdown: shutdown.drop_guard(),
    }
}

impl Watched {
    async fn status(&mut self, wanted: impl FnMut(&LocalFileStatus) -> bool) -> LocalFileStatus {
        tokio::time::timeout(DEADLINE, self.status.wait_for(wanted))
            .await
            .expect("no such status")
            .unwrap()
            .clone()
    }

    /// Waits until the mesh has exactly the workload `uid`.
    async fn has(&mut self, uid: &str) {
        let store = self.store.clone();
        let only = |status: &LocalFileStatus| {
            let mesh = store.load();
            status.error.is_none()
                && mesh.workloads().len() == 1
                && mesh.workload_by_uid(uid).is_some()
        };
        self.status(only).await;
    }

    async fn error(&mut self) -> String {
        self.status(|status| status.error.is_some())
            .await
            .error
            .unwrap()
            .to_string()
    }
}

fn mesh(uid: &str) -> String {
    format!("workloads:\n- uid: {uid}\n  name: n\n  namespace: ns\n")
}

fn directory() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mesh.yaml");
    (directory, path)
}

#[tokio::test]
async fn the_file_is_in_effect_from_the_start() {
    let (_directory, path) = directory();
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = watched(&path);
    watched.has("a").await;
    let status = watched.status.borrow().clone();
    assert_eq!(status.in_effect, Some(Revision(1)));
    assert!(status.loaded_at.is_some());
}

#[tokio::test]
async fn a_file_that_comes_later_is_in_effect_then() {
    let (_directory, path) = directory();
    let mut watched = watched(&path);
    assert!(watched.error().await.contains("cannot read the mesh file"));
    fs::write(&path, mesh("a")).unwrap();
    watched.has("a").await;
}

#[tokio::test]
async fn a_file_written_in_place_is_in_effect() {
    let (_directory, path) = directory();
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = watched(&path);
    watched.has("a").await;
    for uid in ["b", "c", "d"] {
        fs::write(&path, mesh(uid)).unwrap();
        watched.has(uid).await;
    }
}

#[tokio::test]
async fn a_file_renamed_over_it_is_in_effect() {
    let (directory, path) = directory();
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = watched(&path);
    watched.has("a").await;
    for uid in ["b", "c"] {
        let new = directory.path().join(".mesh.yaml.new");
        fs::write(&new, mesh(uid)).unwrap();
        fs::rename(&new, &path).unwrap();
        watched.has(uid).await;
    }
}

/// `mesh.yaml -> ..data/mesh.yaml`, `..data -> ..1`: the links of a Kubernetes volume, of which the second is replaced.
#[tokio::test]
async fn a_volume_whose_data_link_moves_is_in_effect() {
    let (directory, path) = directory();
    let version = |name: &str, uid: &str| {
        let data = directory.path().join(name);
        fs::create_dir(&data).unwrap();
        fs::write(data.join("mesh.yaml"), mesh(uid)).unwrap();
        symlink(name, directory.path().join("..data_tmp")).unwrap();
        fs::rename(
            directory.path().join("..data_tmp"),
            directory.path().join("..data"),
        )
        .unwrap();
    };
    version("..1", "a");
    symlink("..data/mesh.yaml", &path).unwrap();
    let mut watched = watched(&path);
    watched.has("a").await;
    version("..2", "b");
    watched.has("b").await;
    fs::remove_dir_all(directory.path().join("..1")).unwrap();
    version("..3", "c");
    watched.has("c").await;
}

#[tokio::test]
async fn the_file_behind_a_link_is_watched_too() {
    let (directory, path) = directory();
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("other.yaml");
    fs::write(&target, mesh("a")).unwrap();
    symlink(&target, &path).unwrap();
    let mut watched = watched(&path);
    watched.has("a").await;
    fs::write(&target, mesh("b")).unwrap();
    watched.has("b").await;
    drop(directory);
}

#[tokio::test]
async fn a_broken_file_is_reported_and_the_mesh_stays() {
    let (_directory, path) = directory();
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = watched(&path);
    watched.has("a").await;

    fs::write(&path, "workloads:\n- uid: b\n  nme: n\n").unwrap();
    let error = watched.error().await;
    assert!(error.contains("mesh.yaml:3:3: "), "{error}");
    assert!(watched.store.load().workload_by_uid("a").is_some());
    assert_eq!(watched.store.revision(), Revision(1));

    fs::write(&path, mesh("b")).unwrap();
    watched.has("b").await;
}

#[tokio::test]
async fn an_ambiguous_mesh_is_reported_and_the_mesh_stays() {
    let (_directory, path) = directory();
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = watched(&path);
    watched.has("a").await;
    fs::write(&path, mesh("b") + "- uid: b\n  name: m\n  namespace: ns\n").unwrap();
    assert!(
        watched
            .error()
            .await
            .contains("two workloads have the uid b")
    );
    assert!(watched.store.load().workload_by_uid("a").is_some());
}

#[tokio::test]
async fn an_emptied_or_removed_file_leaves_the_mesh() {
    let (_directory, path) = directory();
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = rechecked(&path);
    watched.has("a").await;
    fs::write(&path, "").unwrap();
    assert!(watched.error().await.contains("says nothing"));
    fs::remove_file(&path).unwrap();
    watched
        .status(|status| {
            matches!(
                status.error,
                Some(LocalFileError::File(WatchedFileError::Read { .. }))
            )
        })
        .await;
    assert_eq!(watched.store.revision(), Revision(1));
    assert!(watched.store.load().workload_by_uid("a").is_some());
}

/// A file cut between two resources is a valid file, only a wrong one.
#[tokio::test]
async fn half_a_file_is_not_taken_while_its_writer_has_it_open() {
    let (directory, path) = directory();
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = watched(&path);
    watched.has("a").await;

    let mut writer = fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut writer, mesh("half").as_bytes()).unwrap();
    // Other files of the directory do not make it look.
    fs::write(directory.path().join("other"), "").unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(watched.store.revision(), Revision(1));
    drop(writer);
    watched.has("half").await;
}

#[tokio::test]
async fn a_new_file_is_not_taken_while_its_writer_has_it_open() {
    let (_directory, path) = directory();
    let mut watched = watched(&path);
    watched.error().await;
    let mut writer = fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut writer, mesh("half").as_bytes()).unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(watched.store.revision(), Revision(0));
    std::io::Write::write_all(&mut writer, b"  node: n\n").unwrap();
    drop(writer);
    watched.has("half").await;
}

#[tokio::test]
async fn a_writer_that_never_closes_is_heard_all_the_same() {
    let (_directory, path) = directory();
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = rechecked(&path);
    watched.has("a").await;
    let mut writer = fs::File::create(&path).unwrap();
    std::io::Write::write_all(&mut writer, mesh("b").as_bytes()).unwrap();
    watched.has("b").await;
    drop(writer);
}

#[tokio::test]
async fn a_file_written_again_with_the_same_content_changes_nothing() {
    let (_directory, path) = directory();
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = watched(&path);
    watched.has("a").await;
    fs::write(&path, mesh("a")).unwrap();
    fs::write(&path, mesh("a")).unwrap();
    fs::write(&path, mesh("b")).unwrap();
    watched.has("b").await;
    assert_eq!(watched.store.revision(), Revision(2));
}

#[tokio::test]
async fn a_directory_that_is_replaced_is_watched_anew() {
    let (directory, _) = directory();
    let inner = directory.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let path = inner.join("mesh.yaml");
    fs::write(&path, mesh("a")).unwrap();
    let mut watched = rechecked(&path);
    watched.has("a").await;
    fs::remove_dir_all(&inner).unwrap();
    watched.error().await;
    fs::create_dir(&inner).unwrap();
    fs::write(&path, mesh("b")).unwrap();
    watched.has("b").await;
    fs::write(&path, mesh("c")).unwrap();
    watched.has("c").await;
}

#[tokio::test]
async fn a_missing_directory_is_refused_at_once() {
    let (directory, _) = directory();
    let path = directory.path().join("missing/mesh.yaml");
    let error = LocalFile::new(path)
        .watch(MeshDefaults::default(), Arc::new(Store::new()))
        .unwrap_err();
    assert!(
        matches!(error, LocalFileError::File(WatchedFileError::Watch { .. })),
        "{error}"
    );
}

#[tokio::test]
async fn shutdown_ends_the_task() {
    let (_directory, path) = directory();
    let watched = watched(&path);
    drop(watched.shutdown);
    tokio::time::timeout(DEADLINE, watched.task)
        .await
        .expect("still running")
        .unwrap();
}
