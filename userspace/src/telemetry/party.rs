//! What telemetry says about a workload or service of the mesh.

use std::sync::Arc;

use super::{Party, ServiceName};
use crate::{
    mesh::{Service, Workload},
    policy::Identity,
};

impl Party {
    /// What is known of one end: its workload if the mesh has it, its identity if it was verified.
    pub fn of(workload: Option<&Workload>, identity: Option<&Identity>) -> Self {
        let known = |text: &Arc<str>| (!text.is_empty()).then(|| text.to_string());
        let Some(workload) = workload else {
            return Self {
                identity: identity.cloned(),
                ..Self::default()
            };
        };
        Self {
            name: known(&workload.name),
            workload_name: known(&workload.workload_name),
            namespace: known(&workload.namespace),
            identity: identity.cloned(),
            canonical_service: known(&workload.canonical_name),
            canonical_revision: known(&workload.canonical_revision),
            app: known(&workload.canonical_name),
            version: known(&workload.canonical_revision),
            cluster: known(&workload.cluster_id),
        }
    }
}

impl ServiceName {
    pub fn of(service: &Service) -> Self {
        Self {
            hostname: service.hostname().to_owned(),
            name: service.name.to_string(),
            namespace: service.namespace().to_owned(),
        }
    }
}
