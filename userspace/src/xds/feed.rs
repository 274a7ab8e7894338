//! Puts what the control plane sends into force.
//!
//! Invariants: of one push everything that is good is in force at once or, before every type was answered for the first time, once
//! that has happened: workloads without their policies would be open to everybody, and without annotations that somebody wrote for them
//! they might talk in clear. What is not good is refused by its name and leaves the resource as it was. Called by `client`, for each push,
//! and by `annotations_file`, for each change of that.

use std::sync::Arc;
use std::time::SystemTime;

use prost::Message;

use super::decode::{self, ResourceError, Shared};
use super::session::{ProtocolError, Push, Refused, ResourceType, Taken};
use crate::mesh::{Draft, Mesh, MeshDefaults, Namespaces, Revision, SharedTraits, Store};
use crate::policy::PolicyName;
use crate::wire::envoy::service::discovery::v3::Resource;
use crate::wire::istio::{security, workload, workload::address::Type};

/// Where pushes go.
#[derive(Debug)]
pub struct Feed {
    store: Arc<Store>,
    defaults: MeshDefaults,
    namespaces: Namespaces,
    /// What namespaces say is still to come.
    awaits_annotations: bool,
    /// Of a resource, what cannot be read is changed or left out, as ztunnel does.
    is_lenient: bool,
    shared: Shared,
    traits: SharedTraits,
    /// What is known but not in force.
    held_back: Option<Mesh>,
    answered: [bool; ResourceType::ALL.len()],
    in_force: Option<(Revision, SystemTime)>,
}

impl Feed {
    /// `store` is written by nobody else.
    pub fn new(store: Arc<Store>, defaults: MeshDefaults) -> Self {
        Self {
            store,
            defaults,
            namespaces: Namespaces::new(),
            awaits_annotations: false,
            is_lenient: false,
            shared: Shared::default(),
            traits: SharedTraits::default(),
            held_back: Some(Mesh::default()),
            answered: [false; ResourceType::ALL.len()],
            in_force: None,
        }
    }

    /// From here on nothing is in force before [`Self::annotate`].
    pub fn await_annotations(&mut self) {
        self.awaits_annotations = true;
    }

    /// From here on resources are read as ztunnel reads them: see [`decode::lenient`].
    pub fn be_lenient(&mut self) {
        self.is_lenient = true;
    }

    /// What is in force, and since when; none before every type was answered.
    pub fn in_force(&self) -> Option<(Revision, SystemTime)> {
        self.in_force
    }

    /// Takes a push; the answer is to be sent. Takes some microseconds for each resource.
    ///
    /// # Errors
    /// A resource cannot even be decoded. Nothing of the push is in force then.
    pub fn take(&mut self, push: Push) -> Result<Taken, ProtocolError> {
        let Push {
            kind,
            resources,
            removed,
            nonce,
        } = push;
        let mesh = self.newest();
        let mut draft = Draft::of(&mesh, &self.defaults, &self.namespaces, &mut self.traits);
        // First what goes: an address may be given to another in the same push.
        for name in &removed {
            remove(&mut draft, kind, name);
        }
        let (mut accepted, mut refused) = (Vec::with_capacity(resources.len()), Vec::new());
        let mut adapted = Vec::new();
        for resource in resources {
            let resource = Resource::decode(resource)
                .map_err(|error| ProtocolError::Resource(kind.url(), error))?;
            let name = resource.name.clone();
            let version = self.shared.text(&resource.version);
            match put(
                &mut draft,
                &mut self.shared,
                kind,
                resource,
                self.is_lenient,
            ) {
                Ok((name, is_adapted)) => {
                    adapted.extend(is_adapted.then(|| Arc::clone(&name)));
                    accepted.push((name, version));
                }
                Err(error) => refused.push(Refused {
                    name,
                    reason: error.to_string(),
                }),
            }
        }
        if let Some(example) = adapted.first() {
            tracing::warn!(resources = adapted.len(), such_as = %example, "resources were taken although not all of them can be read");
        }
        let mesh = draft.finish();
        for (known, answered) in ResourceType::ALL.iter().zip(&mut self.answered) {
            *answered |= *known == kind;
        }
        // A control plane that is found again says of each type that there is nothing new.
        let is_news = !(accepted.is_empty() && removed.is_empty());
        if is_news || self.in_force.is_none() {
            self.put_in_force(mesh);
        }
        Ok(Taken {
            kind,
            nonce,
            removed,
            accepted,
            refused,
        })
    }

    /// Takes what annotations are said of namespaces and pods, in the place of those before, also for what comes later. Returns how many
    /// workloads it changes.
    pub fn annotate(&mut self, namespaces: Namespaces) -> usize {
        self.namespaces = namespaces;
        let awaited = std::mem::take(&mut self.awaits_annotations);
        let mesh = self.newest();
        let mut draft = Draft::of(&mesh, &self.defaults, &self.namespaces, &mut self.traits);
        let changed = draft.annotate();
        let mesh = draft.finish();
        if changed > 0 || awaited || self.in_force.is_none() {
            self.put_in_force(mesh);
        }
        changed
    }

    /// With what is held back. What is not changed is shared.
    fn newest(&self) -> Mesh {
        match &self.held_back {
            Some(mesh) => mesh.clone(),
            None => Mesh::clone(&self.store.load()),
        }
    }

    fn put_in_force(&mut self, mesh: Mesh) {
        if !self.awaits_annotations && self.answered.iter().all(|answered| *answered) {
            self.in_force = Some((self.store.replace(mesh), SystemTime::now()));
            self.held_back = None;
        } else {
            self.held_back = Some(mesh);
        }
    }
}

fn remove(draft: &mut Draft<'_>, kind: ResourceType, name: &str) {
    match kind {
        // What is gone is not said to be a workload or a service.
        ResourceType::Address => {
            if !draft.remove_workload(name) {
                draft.remove_service(name);
            }
        }
        ResourceType::Authorization => {
            if let Ok(name) = name.parse::<PolicyName>() {
                draft.remove_policy(&name);
            }
        }
    }
}

/// Returns the name, as the mesh holds it, and whether not all of the resource could be read.
fn put(
    draft: &mut Draft<'_>,
    shared: &mut Shared,
    kind: ResourceType,
    resource: Resource,
    is_lenient: bool,
) -> Result<(Arc<str>, bool), ResourceError> {
    let mut changes = 0;
    let content = resource.resource.ok_or(ResourceError::Missing("content"))?;
    if content.type_url != kind.url() {
        return Err(ResourceError::OtherType {
            expected: kind.url(),
            found: content.type_url,
        });
    }
    let name = match kind {
        ResourceType::Address => {
            let address: workload::Address = message("workload or service", &content.value)?;
            match address.r#type {
                Some(Type::Workload(mut message)) => {
                    if is_lenient {
                        changes = decode::lenient::workload(&mut message);
                    }
                    check_name(&resource.name, &message.uid)?;
                    let spec = decode::workload(message, shared)?;
                    Arc::clone(&draft.put_workload(spec)?.uid)
                }
                Some(Type::Service(mut message)) => {
                    if is_lenient {
                        changes = decode::lenient::service(&mut message);
                    }
                    let service = decode::service(message, shared)?;
                    check_name(&resource.name, service.id.as_str())?;
                    draft.put_service(service);
                    shared.text(&resource.name)
                }
                None => return Err(ResourceError::Missing("workload or service")),
            }
        }
        ResourceType::Authorization => {
            let mut message: security::Authorization = message("policy", &content.value)?;
            if is_lenient {
                changes = decode::lenient::policy(&mut message);
            }
            let policy = decode::policy(message)?;
            check_name(&resource.name, policy.name.as_str())?;
            draft.put_policy(policy);
            shared.text(&resource.name)
        }
    };
    Ok((name, changes > 0))
}

fn message<M: Message + Default>(expected: &'static str, bytes: &[u8]) -> Result<M, ResourceError> {
    M::decode(bytes).map_err(|error| ResourceError::Malformed {
        expected,
        reason: error.to_string(),
    })
}

/// What goes by another name could never be taken away.
fn check_name(name: &str, content: &str) -> Result<(), ResourceError> {
    if name == content {
        Ok(())
    } else {
        Err(ResourceError::OtherName {
            content: content.chars().take(256).collect(),
        })
    }
}

#[cfg(test)]
mod tests;
