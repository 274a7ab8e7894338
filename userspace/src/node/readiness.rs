//! Whether the agent is ready, and what is still missing.

use std::time::SystemTime;

use super::mesh_source::MeshSource;

/// Watches what readiness depends on.
pub struct Readiness {
    mesh: MeshSource,
}

impl Readiness {
    pub fn new(mesh: MeshSource) -> Self {
        Self { mesh }
    }

    /// What is still missing; empty when ready.
    pub fn pending(&self) -> Vec<String> {
        self.mesh.pending()
    }

    /// The mesh source in a line.
    pub fn mesh(&self) -> String {
        self.mesh.describe(SystemTime::now())
    }

    /// What an operator should know.
    pub fn warnings(&self) -> Vec<String> {
        self.mesh.warnings(SystemTime::now())
    }
}
