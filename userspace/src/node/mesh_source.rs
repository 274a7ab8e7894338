//! Where this node's mesh comes from: the control plane, with an annotations file beside it if there is one, a local file, or the
//! configuration itself.
//!
//! Started by `node`, which follows the store; `readiness` and `culvert status` ask what is known of it.

use std::{
    fmt::Display,
    sync::Arc,
    time::{Duration, SystemTime},
};

use prost_types::{ListValue, Struct, Value, value::Kind};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::NodeError;
use crate::{
    config::{Config, Leniency, settings, show_duration},
    control_channel::ControlChannel,
    mesh::{MeshDefaults, Store},
    telemetry::{MeshFreshness, Telemetry},
    watched_file::FileStatus,
    wire::envoy::config::core::v3::Node,
    xds::{
        AnnotationsStatus, Demand, LocalFile, LocalFileStatus, ResourceType, Termination,
        XdsClient, XdsCounts, XdsStatus,
    },
};

/// The one source.
#[derive(Clone)]
pub enum MeshSource {
    File(watch::Receiver<LocalFileStatus>),
    ControlPlane(
        watch::Receiver<XdsStatus>,
        Option<watch::Receiver<AnnotationsStatus>>,
    ),
}

impl MeshSource {
    /// Starts to keep `store` at what the source says. Returns by whom it is to be asked, if it has to be.
    ///
    /// # Errors
    /// None is configured, or a file cannot be followed.
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
            let revision = given.put_in_effect(text, defaults, Arc::clone(store))?;
            let (sender, status) = watch::channel(LocalFileStatus {
                in_effect: Some(revision),
                contents: 1,
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
        if config.lenient.about(Leniency::UnreadableResources) {
            client.be_lenient();
        }
        let annotations = match &config.annotations_path {
            Some(path) => {
                let (watcher, status) = client.annotated_by(path)?;
                let control = control.clone();
                tasks.spawn(async move {
                    watcher.run(control).await;
                    "annotations file"
                });
                Some(status)
            }
            None => None,
        };
        tasks.spawn(async move {
            client.run(control).await;
            "xDS client"
        });
        Ok((Self::ControlPlane(status, annotations), demand))
    }

    /// Waits until there is a mesh, or a reason why there is none.
    pub async fn first_word(&self) {
        // An error means that the source has ended, which the supervisor notices.
        match self.clone() {
            Self::File(mut status) => {
                let _ = status
                    .wait_for(|status| status.in_effect.is_some() || status.error.is_some())
                    .await;
            }
            Self::ControlPlane(mut status, annotations) => {
                let mesh =
                    status.wait_for(|status| status.in_force.is_some() || status.error.is_some());
                tokio::select! {
                    _ = mesh => {}
                    // Without annotations there will be no mesh.
                    () = refused(annotations) => {}
                }
            }
        }
    }

    /// What of it is still missing; empty once there is a mesh.
    pub fn pending(&self) -> Vec<String> {
        match self {
            Self::File(status) => missing("mesh file", &status.borrow()).into_iter().collect(),
            Self::ControlPlane(status, annotations) => {
                let status = status.borrow();
                let reason = status.error.as_deref().unwrap_or("no answer yet");
                let unanswered = status.unanswered.iter();
                let unanswered = unanswered.map(|kind| format!("xDS: {}: {reason}", kind.url()));
                let annotations = annotations.iter();
                unanswered
                    .chain(
                        annotations.filter_map(|file| missing("annotations file", &file.borrow())),
                    )
                    .collect()
            }
        }
    }

    /// The source in a line.
    pub fn describe(&self, now: SystemTime) -> String {
        match self {
            Self::File(status) => {
                let status = status.borrow();
                match (&status.in_effect, &status.error) {
                    (Some(revision), None) => format!("local file, revision {}", revision.0),
                    (Some(revision), Some(error)) => format!(
                        "local file, revision {} still in force: {error}",
                        revision.0
                    ),
                    (None, Some(error)) => format!("local file: {error}"),
                    (None, None) => "local file, not read yet".to_owned(),
                }
            }
            Self::ControlPlane(status, _) => {
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

    /// The annotations file in a line, where there is one.
    pub fn annotations(&self, now: SystemTime) -> Option<String> {
        let Self::ControlPlane(_, Some(status)) = self else {
            return None;
        };
        let status = status.borrow();
        let read = status.in_effect.zip(status.loaded_at).map(|(said, at)| {
            format!(
                "file, revision {}, of {} namespaces and {} workloads, read {} ago",
                status.contents,
                said.namespaces,
                said.workloads,
                ago(now, at)
            )
        });
        Some(match (read, &status.error) {
            (Some(read), None) => read,
            (Some(read), Some(error)) => format!("{read}, still in force: {error}"),
            (None, Some(error)) => format!("file: {error}"),
            (None, None) => "file, not read yet".to_owned(),
        })
    }

    /// What an operator should know.
    pub fn warnings(&self, now: SystemTime) -> Vec<String> {
        match self {
            Self::File(status) => not_in_effect("mesh file", &status.borrow())
                .into_iter()
                .collect(),
            Self::ControlPlane(status, annotations) => {
                let status = status.borrow();
                let mut warnings = match (status.lost_at, &status.error) {
                    (Some(at), error) => vec![format!(
                        "the control plane has been gone for {}, and the mesh is as it was then: {}",
                        ago(now, at),
                        error.as_deref().unwrap_or("not reached yet")
                    )],
                    (None, Some(error)) => vec![error.clone()],
                    (None, None) => Vec::new(),
                };
                let file = annotations.as_ref();
                warnings.extend(
                    file.and_then(|file| not_in_effect("annotations file", &file.borrow())),
                );
                warnings
            }
        }
    }

    fn freshness(&self) -> MeshFreshness {
        match self {
            Self::File(status) => MeshFreshness {
                connected: None,
                changed_at: status.borrow().loaded_at,
            },
            Self::ControlPlane(status, _) => {
                let status = status.borrow();
                MeshFreshness {
                    connected: Some(status.lost_at.is_none()),
                    changed_at: status.in_force.map(|(_, at)| at),
                }
            }
        }
    }

    /// Counts what comes and what is refused, until `control`.
    pub async fn count(self, telemetry: Arc<Telemetry>, control: CancellationToken) {
        let metrics = &telemetry.metrics;
        let source = self.clone();
        metrics.set_freshness_source(move || source.freshness());
        match self {
            Self::File(status) => count_file(status, &telemetry, &control).await,
            Self::ControlPlane(mut status, annotations) => {
                let annotations = async {
                    if let Some(status) = annotations {
                        count_file(status, &telemetry, &control).await;
                    }
                };
                let mut before = XdsCounts::default();
                let pushes = async {
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
                };
                tokio::join!(pushes, annotations);
            }
        }
    }
}

/// Counts the contents of a file that came or were refused, until `control`.
async fn count_file<V, E>(
    mut status: watch::Receiver<FileStatus<V, E>>,
    telemetry: &Telemetry,
    control: &CancellationToken,
) {
    while let Some(Ok(())) = control.run_until_cancelled(status.changed()).await {
        let accepted = status.borrow_and_update().error.is_none();
        telemetry.metrics.mesh_update(accepted);
    }
}

/// What of a file is still missing, if it is.
fn missing<V, E: Display>(name: &str, status: &FileStatus<V, E>) -> Option<String> {
    match (&status.in_effect, &status.error) {
        (Some(_), _) => None,
        (None, Some(error)) => Some(format!("{name}: {error}")),
        (None, None) => Some(format!("{name}: not read yet")),
    }
}

/// What is wrong with a file, if anything is.
fn not_in_effect<V, E: Display>(name: &str, status: &FileStatus<V, E>) -> Option<String> {
    let error = status.error.as_ref()?;
    Some(format!("the {name} is not in effect: {error}"))
}

/// Waits until there is an error in an annotations file; for ever where there is no file.
async fn refused(annotations: Option<watch::Receiver<AnnotationsStatus>>) {
    if let Some(mut status) = annotations
        && status
            .wait_for(|status| status.error.is_some())
            .await
            .is_ok()
    {
        return;
    }
    std::future::pending().await
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
