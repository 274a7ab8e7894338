//! A development control plane for its own tests and those of the agent's clients.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{ControlPlaneError, Listening, Options, run};

const MESH: &str = "mesh.yaml";
const BEHAVIOUR: &str = "behaviour.yaml";
const PATIENCE: Duration = Duration::from_secs(20);

pub struct ControlPlane {
    directory: tempfile::TempDir,
    options: Options,
    listening: Listening,
    shutdown: CancellationToken,
    running: JoinHandle<Result<(), ControlPlaneError>>,
}

/// One that has ended, whose address and CA the next one takes.
pub struct Stopped {
    directory: tempfile::TempDir,
    options: Options,
}

impl ControlPlane {
    /// Serves this mesh file; with a token only to those who show it.
    pub async fn start(mesh: &str, token: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let token = token.map(|token| {
            std::fs::write(path("token"), token).unwrap();
            path("token")
        });
        let options = Options {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            mesh: path(MESH),
            dev_ca: path("ca"),
            trust_domain: "cluster.local".to_owned(),
            names: Vec::new(),
            token,
            behaviour: Some(path(BEHAVIOUR)),
        };
        Stopped { directory, options }.start(mesh).await
    }

    pub fn address(&self) -> String {
        self.listening.address.to_string()
    }

    /// The file with what vouches for it.
    pub fn root(&self) -> &Path {
        &self.listening.root
    }

    pub fn write(&self, mesh: &str) {
        write(self.directory.path(), MESH, mesh);
    }

    /// Has it do wrong what the text says.
    pub fn misbehave(&self, text: &str) {
        write(self.directory.path(), BEHAVIOUR, text);
    }

    /// Ends that.
    pub fn behave(&self) {
        std::fs::remove_file(self.directory.path().join(BEHAVIOUR)).unwrap();
    }

    pub async fn stop(self) -> Stopped {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.running).await;
        ended.unwrap().unwrap().unwrap();
        Stopped {
            directory: self.directory,
            options: Options {
                listen: self.listening.address,
                ..self.options
            },
        }
    }

    pub async fn end(self) {
        self.stop().await;
    }
}

impl Stopped {
    pub async fn start(self, mesh: &str) -> ControlPlane {
        let Self { directory, options } = self;
        write(directory.path(), MESH, mesh);
        let shutdown = CancellationToken::new();
        let (told, listening) = oneshot::channel();
        let announce = |listening| {
            let _ = told.send(listening);
        };
        let running = tokio::spawn({
            let (options, shutdown) = (options.clone(), shutdown.clone());
            async move { run(options, announce, shutdown).await }
        });
        ControlPlane {
            directory,
            options,
            listening: listening.await.unwrap(),
            shutdown,
            running,
        }
    }
}

fn write(directory: &Path, name: &str, text: &str) {
    let new = directory.join("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(&new, directory.join(name)).unwrap();
}
