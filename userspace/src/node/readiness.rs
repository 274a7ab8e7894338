//! Whether the agent is ready, and what is still missing.

use std::time::SystemTime;

use tokio::sync::watch;

use super::mesh_source::MeshSource;
use crate::enrol::zds;

/// Watches what readiness depends on.
pub struct Readiness {
    mesh: MeshSource,
    /// None where istio-cni has no say.
    cni: Option<watch::Receiver<zds::Status>>,
}

impl Readiness {
    pub fn new(mesh: MeshSource, cni: Option<watch::Receiver<zds::Status>>) -> Self {
        Self { mesh, cni }
    }

    /// What is still missing; empty when ready.
    pub fn pending(&self) -> Vec<String> {
        let mut pending = self.mesh.pending();
        pending.extend(self.cni_pending());
        pending
    }

    fn cni_pending(&self) -> Option<String> {
        match &*self.cni.as_ref()?.borrow() {
            zds::Status::Away(reason) => Some(format!("istio-cni: {reason}")),
            zds::Status::Listing => Some("istio-cni: has not named all of its pods yet".to_owned()),
            zds::Status::Synced => None,
        }
    }

    /// The mesh source in a line.
    pub fn mesh(&self) -> String {
        self.mesh.describe(SystemTime::now())
    }

    /// The annotations file in a line, where there is one.
    pub fn annotations(&self) -> Option<String> {
        self.mesh.annotations(SystemTime::now())
    }

    /// What an operator should know.
    pub fn warnings(&self) -> Vec<String> {
        self.mesh.warnings(SystemTime::now())
    }
}
