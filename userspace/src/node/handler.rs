//! What the admin socket and the HTTP endpoints ask of the node.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use tokio_util::sync::CancellationToken;

use super::{
    crl::Crl,
    pods::{Pods, WaitingPod},
    readiness::Readiness,
};
use crate::{
    admin::{
        AdminError, AdminHandler, ErrorKind, FlowsQuery, HttpState, PodAdd, PodInfo, PodRemove,
        PodState, ShortCircuitStatus, Status,
    },
    config::Config,
    enrol::{EnrolError, LocalPod, NetnsPlace, Origin, PodSpec, PodUid},
    identity::Certificates,
    kernel::{KernelError, ShortCircuit, Tables},
    mesh::Store,
    telemetry::{Follower, LevelError, LogLevels, Telemetry},
};

/// What a [`Handler`] shows.
pub struct HandlerParts {
    pub config: Config,
    pub started: Instant,
    pub pods: Arc<Pods>,
    pub store: Arc<Store>,
    pub certificates: Certificates,
    pub telemetry: Arc<Telemetry>,
    pub log_levels: LogLevels,
    pub readiness: Arc<Readiness>,
    pub crl: Crl,
    pub tables: Arc<Tables>,
    /// What short-circuits flows, or why nothing on this kernel does.
    pub short: Result<Arc<ShortCircuit>, String>,
    /// It does so also where the mode is `auto`.
    pub auto_short_circuits: bool,
    pub shutdown: CancellationToken,
}

pub struct Handler {
    parts: HandlerParts,
}

impl Handler {
    pub fn new(parts: HandlerParts) -> Self {
        Self { parts }
    }

    fn list(&self) -> Vec<PodInfo> {
        let served = self.parts.pods.all();
        served
            .iter()
            .map(|pod| info(pod))
            .chain(self.parts.pods.waiting().into_iter().map(waits))
            .collect()
    }

    fn pending_parts(&self) -> Vec<String> {
        let pods = self.parts.pods.waiting();
        let pods = pods
            .into_iter()
            .map(|pod| format!("pod {}: {}", pod.spec.uid, pod.reason));
        self.parts
            .readiness
            .pending()
            .into_iter()
            .chain(pods)
            .collect()
    }

    fn short_circuit(&self) -> ShortCircuitStatus {
        let HandlerParts { tables, short, .. } = &self.parts;
        let is_unfit = |pod: &&Arc<LocalPod>| {
            short
                .as_ref()
                .is_ok_and(|short| short.is_unfit(pod.cookie()))
        };
        ShortCircuitStatus {
            on: short.is_ok(),
            auto: short.is_ok() && self.parts.auto_short_circuits,
            reason: short.as_ref().err().cloned(),
            flows: tables.short().read().open,
            direct_flows: tables.open_flows(),
            unfit_pods: self.parts.pods.all().iter().filter(is_unfit).count(),
        }
    }

    fn held(&self) -> Vec<String> {
        let now = SystemTime::now();
        let mut held: Vec<_> = self
            .parts
            .certificates
            .held()
            .into_iter()
            .map(|(identity, certificate)| match certificate {
                Some(certificate) if certificate.validity().expired(now) => {
                    format!("{identity}: expired")
                }
                Some(certificate) => {
                    let left = certificate
                        .validity()
                        .not_after
                        .duration_since(now)
                        .unwrap_or_default();
                    format!("{identity}: valid for {} s", left.as_secs())
                }
                None => format!("{identity}: not issued yet"),
            })
            .collect();
        held.sort();
        held
    }
}

impl AdminHandler for Handler {
    async fn pod_add(&self, pod: PodAdd) -> Result<PodInfo, AdminError> {
        let spec = PodSpec {
            uid: PodUid::new(&pod.uid).map_err(|error| refuse(&error))?,
            netns: NetnsPlace::Path(pod.netns),
            origin: Origin::Operator,
            namespace: pod.namespace,
            name: pod.name,
            service_account: pod.service_account,
        };
        self.parts
            .pods
            .add(spec)
            .await
            .map(|pod| info(&pod))
            .map_err(|error| refuse(&error))
    }

    async fn pod_remove(&self, pod: PodRemove) -> Result<(), AdminError> {
        let uid = PodUid::new(&pod.uid).map_err(|error| refuse(&error))?;
        self.parts
            .pods
            .remove(&uid)
            .await
            .map_err(|error| refuse(&error))
    }

    async fn pod_list(&self) -> Vec<PodInfo> {
        self.list()
    }

    async fn status(&self) -> Status {
        let mesh = self.parts.store.load();
        let mut warnings = self.parts.readiness.warnings();
        warnings.extend(self.parts.crl.warnings(SystemTime::now()));
        warnings.extend(self.parts.certificates.revoked().into_iter().map(|identity| {
            format!(
                "the certificate of {identity} is revoked by a list in CRL_PATH: peers that have the list refuse its pods until another one is issued, which is being asked for"
            )
        }));
        let failures = self.parts.certificates.failures();
        warnings.extend(failures.first().map(|reason| {
            format!(
                "{} identities got no certificate when they last asked, and ask again; one that they have is in use until it expires: {reason}",
                failures.len()
            )
        }));
        warnings.extend(self.parts.config.lenient.warnings());
        if self.parts.config.dev_ca.is_some() {
            let warning = "certificates come from a development CA: not for production";
            warnings.push(warning.to_owned());
        }
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            node: self.parts.config.node_name.clone(),
            uptime_seconds: self.parts.started.elapsed().as_secs(),
            pending: self.pending_parts(),
            pods: self.parts.pods.all().len(),
            workloads: mesh.workloads().len(),
            services: mesh.services().len(),
            policies: mesh.policies().len(),
            mesh: self.parts.readiness.mesh(),
            annotations: self.parts.readiness.annotations(),
            certificates: self.held(),
            revocation_lists: self.parts.crl.describe(),
            short_circuit: Some(self.short_circuit()),
            warnings,
        }
    }

    fn flows(&self, query: FlowsQuery) -> Follower {
        self.parts.telemetry.feed.follow(query.recent)
    }
}

impl HttpState for Handler {
    fn metrics(&self) -> String {
        self.parts.telemetry.metrics.render()
    }

    fn pending(&self) -> Vec<String> {
        self.pending_parts()
    }

    fn config_dump(&self) -> serde_json::Value {
        serde_json::json!({ "config": self.parts.config, "pods": self.list(), "certificates": self.held() })
    }

    fn log_levels(&self) -> String {
        self.parts.log_levels.current()
    }

    fn change_log_levels(&self, levels: &str, reset: bool) -> Result<String, LevelError> {
        let now = self.parts.log_levels.change(levels, reset)?;
        tracing::info!(levels = %now, "what is logged was changed through /logging");
        Ok(now)
    }

    fn quit(&self) {
        self.parts.shutdown.cancel();
    }
}

fn info(pod: &LocalPod) -> PodInfo {
    PodInfo {
        uid: pod.uid().to_string(),
        namespace: pod.identity.namespace().to_owned(),
        name: pod.spec.name.clone().unwrap_or_default(),
        identity: Some(pod.identity.to_string()),
        addresses: pod.addresses(),
        netns_cookie: pod.cookie().0,
        state: PodState::Active,
        reason: None,
    }
}

/// A pod that cannot be served yet.
fn waits(pod: WaitingPod) -> PodInfo {
    PodInfo {
        uid: pod.spec.uid.to_string(),
        namespace: pod.spec.namespace.unwrap_or_default(),
        name: pod.spec.name.unwrap_or_default(),
        identity: None,
        addresses: pod.ips,
        netns_cookie: pod.cookie.map_or(0, |cookie| cookie.0),
        state: PodState::Pending,
        reason: Some(pod.reason),
    }
}

fn refuse(error: &EnrolError) -> AdminError {
    let kind = match error {
        EnrolError::Unknown(_) => ErrorKind::NotFound,
        EnrolError::OtherNetns { .. }
        | EnrolError::NetnsTaken { .. }
        | EnrolError::AddressTaken { .. }
        | EnrolError::IdentityConflict { .. } => ErrorKind::Conflict,
        EnrolError::HostNetwork(_)
        | EnrolError::NoAddress { .. }
        | EnrolError::OtherAddress { .. }
        | EnrolError::ForeignAddress { .. }
        | EnrolError::NoIdentity(_)
        | EnrolError::Identity { .. }
        | EnrolError::BadUid
        | EnrolError::NoNetns
        | EnrolError::Kernel(
            KernelError::NotNetns { .. } | KernelError::NotReceivedNetns | KernelError::File { .. },
        ) => ErrorKind::BadRequest,
        EnrolError::Stopping
        | EnrolError::TooMany(_)
        | EnrolError::Unanswered { .. }
        | EnrolError::Kernel(_) => ErrorKind::Failed,
    };
    AdminError::new(kind, error.to_string())
}
