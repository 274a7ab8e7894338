//! What is said of namespaces, and in their name of pods: annotations that no resource carries itself.
//!
//! Read by `draft`, for each workload that it puts in; made by the sources in `xds`.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Annotations, MeshDefaults, ShortCircuit};

/// By their names.
pub type Namespaces = HashMap<Arc<str>, NamespaceAnnotations>;

/// What is said of one namespace and of what is in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NamespaceAnnotations {
    /// For all of its pods.
    pub general: Annotations,
    /// For the pods of a deployment or the like, by its name.
    pub deployments: HashMap<Arc<str>, Annotations>,
    /// For a pod, by its name.
    pub pods: HashMap<Arc<str>, Annotations>,
}

/// What annotations make of a workload.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Annotated {
    pub direct: bool,
    pub short_circuit: ShortCircuit,
}

/// Whom annotations are looked up for.
pub(super) struct Named<'a> {
    pub namespace: &'a str,
    pub deployment: &'a str,
    pub pod: &'a str,
}

impl Annotated {
    /// The more specific word counts more: the pod's `own`, that for its name, that for its deployment, that for its namespace, the agent's.
    pub fn of(
        named: &Named<'_>,
        own: &Annotations,
        namespaces: &Namespaces,
        defaults: &MeshDefaults,
    ) -> Self {
        let said = namespaces.get(named.namespace);
        let words = [
            said.map(|said| &said.general),
            said.and_then(|said| said.deployments.get(named.deployment)),
            said.and_then(|said| said.pods.get(named.pod)),
            Some(own),
        ];
        let mut direct = true;
        let mut short_circuit = ShortCircuit::from(defaults.short_circuit);
        for word in words.into_iter().flatten() {
            direct = word.direct.unwrap_or(direct);
            if let Some(annotation) = &word.short_circuit {
                short_circuit = short_circuit.overridden_by(annotation);
            }
        }
        Self {
            direct,
            short_circuit: short_circuit.with_auto(defaults.auto_short_circuit),
        }
    }
}
