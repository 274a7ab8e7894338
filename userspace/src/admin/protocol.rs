//! What is said on the admin socket: one JSON object per line each way. Requests `{"pod_add":{…}}`, `{"pod_remove":{…}}`,
//! `{"pod_list":{}}`, `{"flows":{…}}`, `{"status":{}}`; replies `{"ok":…}` or `{"error":{"kind":…,"message":…}}`, and for
//! flows a stream of `{"flow":…}` and `{"lost":n}`. Unknown names are refused.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::telemetry::FlowEvent;

/// The longest request, with its newline.
pub const MAX_REQUEST: usize = 64 * 1024;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Enrol a pod.
    PodAdd(PodAdd),
    /// Release a pod.
    PodRemove(PodRemove),
    /// Show the pods.
    PodList {},
    /// Follow flows until the client hangs up.
    Flows(FlowsQuery),
    /// Show how the agent is.
    Status {},
}

/// A pod to enrol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodAdd {
    /// The pod's network namespace, an absolute path such as `/run/netns/a` or `/proc/1/ns/net`.
    pub netns: PathBuf,
    /// The pod's uid, which joins it to its workload.
    pub uid: String,
    /// Its namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its service account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<String>,
}

impl PodAdd {
    /// What is wrong with it, if anything: names are short and printable, the path is absolute.
    pub fn problem(&self) -> Option<String> {
        let names = [
            ("namespace", self.namespace.as_deref()),
            ("name", self.name.as_deref()),
            ("service_account", self.service_account.as_deref()),
            ("uid", Some(self.uid.as_str())),
        ];
        if !self.netns.is_absolute() {
            return Some("netns must be an absolute path".to_owned());
        }
        names
            .into_iter()
            .find(|(_, value)| value.is_some_and(|value| !is_name(value)))
            .map(|(field, _)| {
                format!("{field} must be 1 to 253 printable ASCII characters without spaces")
            })
    }
}

fn is_name(text: &str) -> bool {
    (1..=253).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A pod to release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodRemove {
    /// Its uid.
    pub uid: String,
}

/// Which flows to follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlowsQuery {
    /// How many of the latest to begin with.
    pub recent: usize,
}

/// How far a pod's enrolment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// Not complete.
    Pending,
    /// Served.
    Active,
    /// Being released.
    Draining,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInfo {
    /// Uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// SPIFFE id, once known.
    pub identity: Option<String>,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// The netns cookie, by which the kernel part knows it.
    pub netns_cookie: u64,
    /// State.
    pub state: PodState,
    /// Why it is not active, if it is not.
    pub reason: Option<String>,
}

/// How the agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Node.
    pub node: String,
    /// Seconds since it started.
    pub uptime_seconds: u64,
    /// What it is not ready for; empty if ready.
    pub pending: Vec<String>,
    /// Pods served.
    pub pods: usize,
    /// Workloads known.
    pub workloads: usize,
    /// Services known.
    pub services: usize,
    /// Policies known.
    pub policies: usize,
    /// Where the mesh comes from, and its last error.
    pub mesh: String,
    /// The annotations file, where there is one, and its last error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<String>,
    /// Identities with a certificate, and until when it is valid.
    pub certificates: Vec<String>,
    /// The revocation lists in force, if there is a file of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revocation_lists: Option<String>,
    /// The short-circuit; an agent of an earlier version does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_circuit: Option<ShortCircuitStatus>,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

/// What is short-circuited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShortCircuitStatus {
    /// Flows are, on this kernel, where both pods have it `on`.
    pub on: bool,
    /// They are also where the pods leave it to the agent.
    pub auto: bool,
    /// Why not even where it is `on`.
    pub reason: Option<String>,
    /// Open direct flows that have been entered.
    pub flows: u64,
    /// All open direct flows.
    pub direct_flows: u64,
    /// Pods that were seen reading in a way that does not see redirected bytes.
    pub unfit_pods: usize,
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// It cannot be understood.
    BadRequest,
    /// It names something that is not there.
    NotFound,
    /// It contradicts the present state.
    Conflict,
    /// The client is not root.
    Forbidden,
    /// Too many clients, or not in time.
    Busy,
    /// The agent could not do it.
    Failed,
}

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AdminError {
    /// Which sort.
    pub kind: ErrorKind,
    /// What happened, to what, and what to do.
    pub message: String,
}

impl AdminError {
    /// Makes one.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { kind, message }
    }
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply<T> {
    /// The answer.
    Ok(T),
    /// The refusal.
    Error(AdminError),
    /// An event of the stream.
    Flow(Box<FlowEvent>),
    /// So many events were lost before the next.
    Lost(u64),
}
