//! Whether the agent is ready, and what is still missing.

use tokio::sync::watch;

use crate::xds::LocalFileStatus;

/// Watches what readiness depends on.
pub struct Readiness {
    mesh: watch::Receiver<LocalFileStatus>,
}

impl Readiness {
    pub fn new(mesh: watch::Receiver<LocalFileStatus>) -> Self {
        Self { mesh }
    }

    /// What is still missing; empty when ready.
    pub fn pending(&self) -> Vec<String> {
        let status = self.mesh.borrow();
        match (status.revision, &status.error) {
            (Some(_), _) => Vec::new(),
            (None, Some(error)) => vec![format!("mesh file: {error}")],
            (None, None) => vec!["mesh file: not read yet".to_owned()],
        }
    }

    /// The mesh source in a line.
    pub fn mesh(&self) -> String {
        let status = self.mesh.borrow();
        match (&status.revision, &status.error) {
            (Some(revision), None) => format!("local file, revision {}", revision.0),
            (Some(revision), Some(error)) => format!(
                "local file, revision {} still in force: {error}",
                revision.0
            ),
            (None, Some(error)) => format!("local file: {error}"),
            (None, None) => "local file, not read yet".to_owned(),
        }
    }

    /// What an operator should know.
    pub fn warnings(&self) -> Vec<String> {
        self.mesh
            .borrow()
            .error
            .iter()
            .map(|error| format!("the mesh file is not in effect: {error}"))
            .collect()
    }
}
