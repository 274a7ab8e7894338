//! Where this node's mesh comes from: the control plane, a local file, or the configuration itself.
//!
//! Started by `node`, which follows the store; `readiness` and `culvert status` ask what is known of it.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use prost_types::{ListValue, Struct, Value, value::Kind};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::NodeError;
use crate::{
    config::{Config, settings, show_duration},
    control_channel::ControlChannel,
    mesh::{MeshDefaults, Store},
    telemetry::Telemetry,
    wire::envoy::config::core::v3::Node,
    xds::{
        Demand, LocalFile, LocalFileStatus, ResourceType, Termination, XdsClient, XdsCounts,
        XdsStatus,
    },
};

/// The one source.
#[derive(Clone)]
pub enum MeshSource {
    File(watch::Receiver<LocalFileStatus>),
    ControlPlane(watch::Receiver<XdsStatus>),
}

impl MeshSource {
    /// Starts to keep `store` at what the source says. Returns by whom it is to be asked, if it has to be.
    ///
    /// # Errors
    /// None is configured, or the file cannot be followed.
    pub fn start(
        config: &Config,
        defaults: MeshDefaults,
        store: &Arc<Store>,
        control: &CancellationToken,
        tasks: &mut JoinSet<&'static str>,
    ) -> Result<(Self, Option<Demand>), NodeError> {
        let control = control.clone();
        if let Some(path) = &config.local_xds_path {
            let (watcher, status) = LocalFile::new(path).watch(defaults, Arc::clone(store))?;
            tasks.spawn(async move {
                watcher.run(control).await;
                "mesh file"
            });
            return Ok((Self::File(status), None));
        }
        if let Some(text) = &config.local_xds {
            let given = LocalFile::new(settings::LOCAL_XDS.variable);
            let revision = given.put_in_effect(text.as_bytes(), &defaults, store)?;
            let (sender, status) = watch::channel(LocalFileStatus::default());
            sender.send_replace(LocalFileStatus {
                revision: Some(revision),
                loaded_at: Some(SystemTime::now()),
                error: None,
            });
            tasks.spawn(async move {
                control.cancelled().await;
                // Not earlier: the end of what is told is the end of the source.
                drop(sender);
                "mesh text"
            });
            return Ok((Self::File(status), None));
        }
        let channel = control_plane(config).ok_or(NodeError::NoMesh)?;
        let (demand, demanded) = match config.xds_on_demand {
            true => Some(Demand::new(Arc::clone(store))).unzip(),
            false => (None, None),
        };
        let store = Arc::clone(store);
        let (client, status) = XdsClient::new(channel, node(config), defaults, store, demanded);
        tasks.spawn(async move {
            client.run(control).await;
            "xDS client"
        });
        Ok((Self::ControlPlane(status), demand))
    }

    /// Waits until there is a mesh, or a reason why there is none.
    pub async fn first_word(&self) {
        // An error means that the source has ended, which the supervisor notices.
        match self.clone() {
            Self::File(mut status) => {
                let _ = status
                    .wait_for(|status| status.revision.is_some() || status.error.is_some())
                    .await;
            }
            Self::ControlPlane(mut status) => {
                let _ = status
                    .wait_for(|status| status.in_force.is_some() || status.error.is_some())
                    .await;
            }
        }
    }

    /// What of it is still missing; empty once there is a mesh.
    pub fn pending(&self) -> Vec<String> {
        match self {
            Self::File(status) => {
                let status = status.borrow();
                match (status.revision, &status.error) {
                    (Some(_), _) => Vec::new(),
                    (None, Some(error)) => vec![format!("mesh file: {error}")],
                    (None, None) => vec!["mesh file: not read yet".to_owned()],
                }
            }
            Self::ControlPlane(status) => {
                let status = status.borrow();
                let reason = status.error.as_deref().unwrap_or("no answer yet");
                let unanswered = status.unanswered.iter();
                unanswered
                    .map(|kind| format!("xDS: {}: {reason}", kind.url()))
                    .collect()
            }
        }
    }

    /// The source in a line.
    pub fn describe(&self, now: SystemTime) -> String {
        match self {
            Self::File(status) => {
                let status = status.borrow();
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
            Self::ControlPlane(status) => {
                let status = status.borrow();
                let mesh = match &status.in_force {
                    Some((revision, at)) => {
                        format!("revision {}, changed {} ago", revision.0, ago(now, *at))
                    }
                    None => "no mesh yet".to_owned(),
                };
                match status.lost_at {
                    None => format!("control plane, connected, {mesh}"),
                    Some(at) => format!("control plane, lost for {}, {mesh}", ago(now, at)),
                }
            }
        }
    }

    /// What an operator should know.
    pub fn warnings(&self, now: SystemTime) -> Vec<String> {
        match self {
            Self::File(status) => {
                let status = status.borrow();
                let error = status.error.iter();
                error
                    .map(|error| format!("the mesh file is not in effect: {error}"))
                    .collect()
            }
            Self::ControlPlane(status) => {
                let status = status.borrow();
                match (status.lost_at, &status.error) {
                    (Some(at), error) => vec![format!(
                        "the control plane has been gone for {}, and the mesh is as it was then: {}",
                        ago(now, at),
                        error.as_deref().unwrap_or("not reached yet")
                    )],
                    (None, Some(error)) => vec![error.clone()],
                    (None, None) => Vec::new(),
                }
            }
        }
    }

    /// Counts what comes and what is refused, until `control`.
    pub async fn count(self, telemetry: Arc<Telemetry>, control: CancellationToken) {
        let metrics = &telemetry.metrics;
        match self {
            Self::File(mut status) => {
                while let Some(Ok(())) = control.run_until_cancelled(status.changed()).await {
                    let accepted = status.borrow_and_update().error.is_none();
                    metrics.mesh_update(accepted);
                }
            }
            Self::ControlPlane(mut status) => {
                let mut before = XdsCounts::default();
                while let Some(Ok(())) = control.run_until_cancelled(status.changed()).await {
                    let counts = status.borrow_and_update().counts;
                    for (kind, (new, old)) in ResourceType::ALL
                        .into_iter()
                        .zip(counts.messages.into_iter().zip(before.messages))
                    {
                        metrics.xds_messages(kind.url(), new.saturating_sub(old));
                    }
                    for (kind, (new, old)) in ResourceType::ALL
                        .into_iter()
                        .zip(counts.bytes.into_iter().zip(before.bytes))
                    {
                        metrics.xds_bytes(kind.url(), new.saturating_sub(old));
                    }
                    for (end, (new, old)) in Termination::ALL
                        .into_iter()
                        .zip(counts.terminations.into_iter().zip(before.terminations))
                    {
                        metrics.xds_terminated(end.name(), new.saturating_sub(old));
                    }
                    let messages = |counts: &XdsCounts| counts.messages.iter().sum::<u64>();
                    if messages(&counts) > messages(&before) {
                        metrics.mesh_update(counts.refused == before.refused);
                    }
                    before = counts;
                }
            }
        }
    }
}

/// The way to the control plane that tells the mesh.
fn control_plane(config: &Config) -> Option<ControlChannel> {
    Some(ControlChannel {
        address: config.xds_address.clone()?,
        server_name: config.alt_xds_hostname.clone(),
        roots: config.xds_root_ca.clone(),
        token: Arc::new(config.auth_token.clone()),
        cluster_id: config.cluster_id.clone(),
        headers: config.xds_headers.clone(),
    })
}

/// The way to the certificate authority.
pub fn authority(config: &Config) -> Option<ControlChannel> {
    Some(ControlChannel {
        address: config.ca_address.clone()?,
        server_name: config.alt_ca_hostname.clone(),
        roots: config.ca_root_ca.clone(),
        token: Arc::new(config.auth_token.clone()),
        cluster_id: config.cluster_id.clone(),
        headers: config.ca_headers.clone(),
    })
}

/// Who the agent is to Istio's control plane, which looks at the id's form.
fn node(config: &Config) -> Node {
    let ip = config
        .instance_ip
        .map_or_else(|| "127.0.0.1".to_owned(), |ip| ip.to_string());
    let (pod, namespace) = (&config.pod_name, &config.pod_namespace);
    let text = |text: &str| Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    };
    let ips = Value {
        kind: Some(Kind::ListValue(ListValue {
            values: vec![text(&ip)],
        })),
    };
    let mut fields: std::collections::BTreeMap<String, Value> = config
        .node_metadata
        .iter()
        .map(|(name, value)| (name.clone(), text(value)))
        .collect();
    fields.extend([
        ("NAME".to_owned(), text(pod)),
        ("NAMESPACE".to_owned(), text(namespace)),
        ("INSTANCE_IPS".to_owned(), ips),
        ("NODE_NAME".to_owned(), text(&config.node_name)),
        ("CLUSTER_ID".to_owned(), text(&config.cluster_id)),
    ]);
    Node {
        id: format!(
            "ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.{}",
            config.cluster_domain
        ),
        cluster: String::new(),
        metadata: Some(Struct { fields }),
    }
}

/// To the second.
fn ago(now: SystemTime, then: SystemTime) -> String {
    let passed = now.duration_since(then).unwrap_or_default();
    show_duration(&Duration::from_secs(passed.as_secs()))
}
