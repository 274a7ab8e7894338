//! Mesh files in the documented YAML format: what a mesh contains, and writing it so that a reader sees the old file or the new
//! one, never half of either.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use crate::pod::Pod;
use crate::yaml;

/// Everything an agent is told.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Mesh {
    /// Pods.
    pub workloads: Vec<Workload>,
    /// Services.
    pub services: Vec<Service>,
    /// Authorization policies.
    pub policies: Vec<Policy>,
    /// Namespaces with annotations.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<Namespace>,
}

impl Mesh {
    /// The file's text.
    pub fn to_yaml(&self) -> Result<String> {
        Ok(yaml::document(
            &serde_json::to_value(self).context("writing a mesh as YAML")?,
        ))
    }

    /// Replaces the file at `path`, or makes it, and before it the annotations file beside it, for agents of a control plane.
    pub fn write(&self, path: &Path) -> Result<()> {
        replace_file(&Self::annotations_file(path), &self.annotations_to_yaml()?)?;
        replace_file(path, &self.to_yaml()?)
    }

    /// The annotations file beside a mesh file.
    pub fn annotations_file(mesh_file: &Path) -> PathBuf {
        mesh_file.with_extension("annotations.yaml")
    }

    /// The annotations file's text: what a control plane does not tell.
    pub fn annotations_to_yaml(&self) -> Result<String> {
        let annotated = self
            .workloads
            .iter()
            .filter(|one| !one.annotations.is_empty())
            .map(|one| {
                json!({"namespace": one.namespace, "name": one.name, "annotations": one.annotations})
            });
        let workloads: Vec<_> = annotated.collect();
        let namespaces = serde_json::to_value(&self.namespaces).context("writing annotations")?;
        Ok(yaml::document(
            &json!({"namespaces": namespaces, "workloads": workloads}),
        ))
    }

    /// The workload called `name`, to change it.
    pub fn workload(&mut self, name: &str) -> Option<&mut Workload> {
        self.workloads
            .iter_mut()
            .find(|workload| workload.name == name)
    }
}

/// Replaces a file's contents at once, by a rename in its directory. For files that must be broken, too.
pub fn replace_file(path: &Path, text: &str) -> Result<()> {
    let mut name = path
        .file_name()
        .with_context(|| format!("{} names no file", path.display()))?
        .to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    std::fs::write(&new, text).with_context(|| format!("writing {}", new.display()))?;
    std::fs::rename(&new, path).with_context(|| format!("replacing {}", path.display()))
}

/// One workload. `extra` takes the fields of the format that have no member here.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub trust_domain: String,
    pub workload_ips: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub network: String,
    pub protocol: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// `ns/host` to service port to target port.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<String, BTreeMap<u16, u16>>,
    /// `ns/name` of policies with a selector that chose this workload.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub authorization_policies: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

/// One namespace.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Namespace {
    pub name: String,
    pub annotations: BTreeMap<String, String>,
}

impl Namespace {
    /// With one annotation.
    pub fn annotated(name: &str, key: &str, value: &str) -> Self {
        Self {
            name: name.to_owned(),
            annotations: [(key.to_owned(), value.to_owned())].into(),
        }
    }
}

impl Workload {
    /// The workload a pod is: named like it, in the mesh (HBONE), with the uid [`Workload::uid_of`].
    pub fn of_pod(pod: &Pod, namespace: &str, service_account: &str) -> Self {
        let addresses = pod.addresses();
        Self {
            uid: Self::uid_of(pod),
            name: pod.name().to_owned(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            workload_ips: addresses.iter().map(ToString::to_string).collect(),
            protocol: "HBONE".to_owned(),
            node: pod.node().name().to_owned(),
            ..Self::default()
        }
    }

    /// The uid used for a pod, unique in its fabric.
    pub fn uid_of(pod: &Pod) -> String {
        format!("{}-{}", pod.node().name(), pod.name())
    }

    /// Outside the mesh: reached in plain TCP.
    pub fn plain(mut self) -> Self {
        self.protocol = "TCP".to_owned();
        self
    }

    /// With an annotation.
    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// An endpoint of a service.
    pub fn serves(mut self, service: &Service, service_port: u16, target_port: u16) -> Self {
        let key = format!("{}/{}", service.namespace, service.hostname);
        self.services
            .entry(key)
            .or_default()
            .insert(service_port, target_port);
        self
    }

    /// Chosen by a policy with a selector.
    pub fn selected_by(mut self, policy: &Policy) -> Self {
        self.authorization_policies
            .push(format!("{}/{}", policy.namespace, policy.name));
        self
    }
}

/// One service.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub name: String,
    pub namespace: String,
    pub hostname: String,
    /// `net/ip`; the network before the slash may be empty.
    pub vips: Vec<String>,
    pub ports: BTreeMap<u16, u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subject_alt_names: Vec<String>,
    #[serde(flatten)]
    pub extra: BTreeMap<String, Value>,
}

impl Service {
    /// A service at one address of the default network.
    pub fn new(namespace: &str, name: &str, vip: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            hostname: format!("{name}.{namespace}.svc.cluster.local"),
            vips: vec![format!("/{vip}")],
            ..Self::default()
        }
    }

    /// With a port.
    pub fn port(mut self, service_port: u16, target_port: u16) -> Self {
        self.ports.insert(service_port, target_port);
        self
    }
}

/// One authorization policy: rules of clauses of matches.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    pub name: String,
    pub namespace: String,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: String,
    /// `Allow` or `Deny`.
    pub action: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    pub rules: Vec<Vec<Vec<Match>>>,
}

impl Policy {
    /// Allows what its rules match, for its whole namespace.
    pub fn allow(namespace: &str, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            scope: "Namespace".to_owned(),
            action: "Allow".to_owned(),
            ..Self::default()
        }
    }

    /// Refuses what its rules match, for its whole namespace.
    pub fn deny(namespace: &str, name: &str) -> Self {
        Self {
            action: "Deny".to_owned(),
            ..Self::allow(namespace, name)
        }
    }

    /// For all namespaces.
    pub fn global(mut self) -> Self {
        self.scope = "Global".to_owned();
        self
    }

    /// Only for workloads that list it ([`Workload::selected_by`]).
    pub fn selector(mut self) -> Self {
        self.scope = "WorkloadSelector".to_owned();
        self
    }

    /// Only logs what it would do.
    pub fn dry_run(mut self) -> Self {
        self.dry_run = true;
        self
    }

    /// Adds a rule: every clause must match, a clause by any of its matches.
    pub fn rule(mut self, clauses: Vec<Vec<Match>>) -> Self {
        self.rules.push(clauses);
        self
    }

    /// Adds a rule of one clause with one match.
    pub fn when(self, only: Match) -> Self {
        self.rule(vec![vec![only]])
    }
}

/// One match: all of its fields must match, each by any of its values; of the `not_` fields none may.
/// A string is `foo`, `foo*`, `*foo` or `*`, or a map as the format has them.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Match {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_service_accounts: Vec<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_source_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ports: Vec<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ports: Vec<u16>,
}

impl Match {
    /// Peers with this identity, written without `spiffe://`.
    pub fn principal(principal: &str) -> Self {
        Self {
            principals: vec![principal.into()],
            ..Self::default()
        }
    }

    /// Peers without an identity, or with one other than this.
    pub fn not_principal(principal: &str) -> Self {
        Self {
            not_principals: vec![principal.into()],
            ..Self::default()
        }
    }

    /// Peers from this namespace.
    pub fn namespace(namespace: &str) -> Self {
        Self {
            namespaces: vec![namespace.into()],
            ..Self::default()
        }
    }

    /// Connections to this port of the workload.
    pub fn port(port: u16) -> Self {
        Self {
            destination_ports: vec![port],
            ..Self::default()
        }
    }

    /// Connections from these addresses, written as CIDR.
    pub fn source(cidr: &str) -> Self {
        Self {
            source_ips: vec![cidr.to_owned()],
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_is_written_in_the_documented_format() {
        let policy = Policy::allow("demo", "callers")
            .selector()
            .when(Match::principal("cluster.local/ns/demo/sa/client"));
        let service = Service::new("demo", "web", "10.96.0.1").port(80, 8080);
        let workload = Workload {
            name: "a".into(),
            uid: "u".into(),
            ..Workload::default()
        };
        let mesh = Mesh {
            workloads: vec![workload.serves(&service, 80, 8080).selected_by(&policy)],
            services: vec![service],
            policies: vec![policy],
            ..Mesh::default()
        };
        let text = mesh.to_yaml().unwrap();
        for line in [
            "      \"demo/web.demo.svc.cluster.local\":\n        80: 8080\n",
            "      - \"demo/callers\"\n",
            "      - \"/10.96.0.1\"\n",
            "    scope: \"WorkloadSelector\"\n",
            "            principals:\n              - \"cluster.local/ns/demo/sa/client\"\n",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
    }
}
