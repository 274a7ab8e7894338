//! An agent on a node, started as an operator or a DaemonSet would: `culvert node` or `culvert proxy ztunnel` as a process of its own,
//! told what it needs by environment and flags, and spoken to through its admin socket and HTTP ports.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::http::{self, Response};
use crate::log::{Log, Mark};
use crate::mesh::Workload;
use crate::node::Node;
use crate::pod::Pod;
use crate::process::{Finished, Proc, culvert_binary};
use crate::wait::wait_until;

const READY_PORT: u16 = 15021;
const METRICS_PORT: u16 = 15020;
const ADMIN_PORT: u16 = 15000;
const STEP: Duration = Duration::from_secs(5);
const COMMAND: Duration = Duration::from_secs(20);
const READY: Duration = Duration::from_secs(30);

/// As what an agent is started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Subcommand {
    /// `culvert node`.
    #[default]
    Node,
    /// `culvert proxy ztunnel`: it is told by `env` and `directory` where mesh and certificates are, and nothing by flags.
    ProxyZtunnel,
}

/// How to start an agent. The default is what most tests want.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// The program; by default [`culvert_binary`].
    pub binary: Option<PathBuf>,
    /// As what it is started.
    pub subcommand: Subcommand,
    /// Its working directory, where Istio's files are looked for; by default the caller's.
    pub directory: Option<PathBuf>,
    /// The mesh file. Without it, and without `dev_ca`, the agent gets mesh and certificates from the fabric's control plane, if there is
    /// one ([`ControlPlane::of_fabric`](crate::ControlPlane::of_fabric)), else from [`Agent::default_mesh_file`], which all share.
    pub mesh_file: Option<PathBuf>,
    /// The development CA's directory; by default one for the whole fabric.
    pub dev_ca: Option<PathBuf>,
    /// The pin directory; by default the node's.
    pub pin_dir: Option<PathBuf>,
    /// The cgroup the agent attaches to; by default the node's.
    pub cgroup_root: Option<PathBuf>,
    /// More environment, or other values for what the harness sets.
    pub env: BTreeMap<String, String>,
    /// More arguments, after those of the harness.
    pub args: Vec<String>,
}

/// A running agent. Dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    node: Node,
    binary: PathBuf,
    admin_socket: PathBuf,
    process: Proc,
}

impl Agent {
    pub(crate) fn start(node: &Node, options: AgentOptions) -> Result<Self> {
        let binary = options.binary.map_or_else(culvert_binary, Ok)?;
        let pin_dir = options
            .pin_dir
            .unwrap_or_else(|| node.pin_directory().to_owned());
        let cgroup_root = options
            .cgroup_root
            .unwrap_or_else(|| node.cgroup().path().to_owned());
        let admin_socket = node.directory().join("admin.sock");
        if let Some(parent) = pin_dir.parent() {
            // The agent makes its own directory; the one above it belongs to the run.
            std::fs::create_dir_all(parent)
                .with_context(|| format!("making {}", parent.display()))?;
        }
        let own_files = options.mesh_file.is_some() || options.dev_ca.is_some();
        let mut command = node.agent_command(&binary);
        if let Some(directory) = &options.directory {
            command = command.directory(directory);
        }
        command = match (options.subcommand, node.inner.control_plane.get()) {
            (Subcommand::ProxyZtunnel, _) => command.args(["proxy", "ztunnel"]),
            (Subcommand::Node, Some(told)) if !own_files => command.arg("node").envs(told.clone()),
            (Subcommand::Node, _) => {
                let mesh_file = options.mesh_file;
                let dev_ca = options.dev_ca;
                command
                    .arg("node")
                    .arg("--dev-ca")
                    .arg(dev_ca.unwrap_or_else(|| Self::default_dev_ca(node)))
                    .env(
                        "LOCAL_XDS_PATH",
                        mesh_file.unwrap_or_else(|| Self::default_mesh_file(node)),
                    )
            }
        };
        let process = command
            .args(options.args)
            .env("NODE_NAME", node.name())
            .env("CULVERT_CGROUP_ROOT", cgroup_root)
            .env("CULVERT_PIN_DIR", pin_dir)
            .env("CULVERT_ADMIN_SOCKET", &admin_socket)
            .env("CULVERT_HOST_NETNS", node.netns().path())
            .env("CULVERT_PODS_CGROUP", node.pods_cgroup().path())
            .envs(options.env)
            .spawn()?;
        Ok(Self {
            node: node.clone(),
            binary,
            admin_socket,
            process,
        })
    }

    /// The mesh file agents read when the options name none.
    pub fn default_mesh_file(node: &Node) -> PathBuf {
        node.shared_directory().join("mesh.yaml")
    }

    /// The development CA that all agents of the fabric share when the options name none.
    pub fn default_dev_ca(node: &Node) -> PathBuf {
        node.shared_directory().join("dev-ca")
    }

    /// Waits until `/healthz/ready` answers 200. Fails at once if the agent ends.
    pub fn ready(&self) -> Result<()> {
        let mut last = String::from("no answer yet");
        let waited = wait_until(READY, "the agent to be ready", || {
            if let Some(status) = self.process.status() {
                bail!("the agent ended ({status})");
            }
            match self.get(READY_PORT, "/healthz/ready") {
                Ok(Response { status: 200, .. }) => return Ok(Some(())),
                Ok(response) => last = format!("{}: {}", response.status, response.body.trim()),
                Err(error) => last = format!("{error:#}"),
            }
            Ok(None)
        });
        waited.with_context(|| {
            format!(
                "agent of {}: {last}; its log's end:\n{}",
                self.node.name(),
                self.log().tail()
            )
        })
    }

    /// Enrols a pod: `culvert pod add`.
    pub fn enrol(
        &self,
        pod: &Pod,
        uid: &str,
        namespace: &str,
        name: &str,
        service_account: &str,
    ) -> Result<()> {
        let netns = pod.netns().path().to_string_lossy();
        let identity = [
            "--namespace",
            namespace,
            "--name",
            name,
            "--service-account",
            service_account,
        ];
        let arguments = ["pod", "add", "--netns", netns.as_ref(), "--uid", uid]
            .into_iter()
            .chain(identity);
        self.cli(arguments)?.success().map(drop)
    }

    /// Enrols a pod as the workload the mesh file has for it.
    pub fn enrol_as(&self, pod: &Pod, workload: &Workload) -> Result<()> {
        self.enrol(
            pod,
            &workload.uid,
            &workload.namespace,
            &workload.name,
            &workload.service_account,
        )
    }

    /// Takes a pod out of the mesh: `culvert pod remove`.
    pub fn unenrol(&self, uid: &str) -> Result<()> {
        self.cli(["pod", "remove", uid])?.success().map(drop)
    }

    /// Runs a command of `culvert` against this agent, from its node.
    pub fn cli<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Finished> {
        let launch = self
            .node
            .command(&self.binary)
            .args(arguments)
            .arg("--admin-socket")
            .arg(&self.admin_socket);
        launch.run(COMMAND)
    }

    /// GET from inside the node, at the node's loopback address.
    pub fn get(&self, port: u16, path: &str) -> Result<Response> {
        self.request("GET", port, path)
    }

    /// A request without a body from inside the node, at the node's loopback address.
    pub fn request(&self, method: &str, port: u16, path: &str) -> Result<Response> {
        http::request(
            self.node.netns(),
            method,
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            path,
            STEP,
        )
    }

    /// The text of `/metrics`.
    pub fn metrics(&self) -> Result<String> {
        let response = self.get(METRICS_PORT, "/metrics")?;
        ensure!(
            response.status == 200,
            "/metrics answered {}: {}",
            response.status,
            response.body.trim()
        );
        Ok(response.body)
    }

    /// The sum of the samples called `name` whose line contains every one of `labels` (`reporter="source"`).
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(sum_samples(&self.metrics()?, name, labels))
    }

    /// Changes what is logged, through the admin port's `/logging`.
    pub fn set_logging(&self, query: &str) -> Result<Response> {
        self.request("POST", ADMIN_PORT, &format!("/logging?{query}"))
    }

    /// The text of the admin port's `/config_dump`.
    pub fn config_dump(&self) -> Result<Response> {
        self.get(ADMIN_PORT, "/config_dump")
    }

    /// The access-log lines so far.
    pub fn access_log(&self) -> Vec<AccessLine> {
        self.log()
            .lines()
            .into_iter()
            .filter_map(|line| AccessLine::parse(&line.text))
            .collect()
    }

    /// Waits for an access-log line after `from` that has all the given fields with the given values.
    pub fn wait_for_access(
        &self,
        from: Mark,
        fields: &[(&str, &str)],
        timeout: Duration,
    ) -> Result<AccessLine> {
        self.log().wait_for(
            from,
            timeout,
            &format!("an access line with {fields:?}"),
            |line| {
                let access = AccessLine::parse(&line.text)?;
                fields
                    .iter()
                    .all(|(key, value)| access.field(key).as_deref() == Some(value))
                    .then_some(access)
            },
        )
    }

    /// Signals the agent and waits for its end.
    pub fn stop(&self, signal: Signal) -> Result<ExitStatus> {
        self.process.kill(signal)?;
        self.process.wait(READY)
    }

    /// Kills the agent with SIGKILL and waits for its end.
    pub fn kill(&self) -> Result<ExitStatus> {
        self.stop(Signal::SIGKILL)
    }

    /// What the agent has printed.
    pub fn log(&self) -> &Log {
        self.process.log()
    }

    /// The agent's process.
    pub fn process(&self) -> &Proc {
        &self.process
    }

    /// The node it serves.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its admin socket.
    pub fn admin_socket(&self) -> &Path {
        &self.admin_socket
    }
}

fn sum_samples(exposition: &str, name: &str, labels: &[&str]) -> f64 {
    let samples = exposition.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    samples
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// One line of the access log, text or JSON.
#[derive(Clone, Debug)]
pub struct AccessLine {
    /// The line as printed.
    pub text: String,
}

impl AccessLine {
    /// `None` if the line is not of the access log.
    pub fn parse(text: &str) -> Option<Self> {
        let line = Self {
            text: text.to_owned(),
        };
        // Every access line names both ends, no other log line does.
        (line.field("src.addr").is_some() && line.field("dst.addr").is_some()).then_some(line)
    }

    /// The value of a field: `key=value`, `key="value"`, or JSON `"key": value`.
    pub fn field(&self, key: &str) -> Option<String> {
        if self.text.starts_with('{') {
            let object: serde_json::Value = serde_json::from_str(&self.text).ok()?;
            let value = object.get(key).or_else(|| object.get("fields")?.get(key))?;
            return Some(
                value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned),
            );
        }
        field_of(&self.text, key)
    }
}

/// The value of a field of a text log's line: `key=value` or `key="value"`.
pub(crate) fn field_of(text: &str, key: &str) -> Option<String> {
    let marker = format!("{key}=");
    let at = text.match_indices(&marker).map(|(at, _)| at);
    let start = at
        .into_iter()
        .find(|at| text.get(..*at).is_some_and(starts_a_field))?;
    let rest = text.get(start + marker.len()..)?;
    match rest.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next().map(str::to_owned),
        None => rest.split_whitespace().next().map(str::to_owned),
    }
}

fn starts_a_field(before: &str) -> bool {
    before.is_empty() || before.ends_with([' ', '\t'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_fields_are_read_from_text_and_json() {
        let text = r#"2026-01-01 info access connection complete src.addr=10.0.0.1:4 src.identity="spiffe://a/b" dst.addr=10.0.0.2:80 path=direct"#;
        let json = r#"{"level":"info","fields":{"src.addr":"10.0.0.1:4","dst.addr":"10.0.0.2:80","path":"direct","bytes_sent":7}}"#;
        let line = AccessLine::parse(text).unwrap();
        assert_eq!(line.field("addr"), None);
        assert_eq!(line.field("src.identity").as_deref(), Some("spiffe://a/b"));
        for line in [line, AccessLine::parse(json).unwrap()] {
            assert_eq!(line.field("path").as_deref(), Some("direct"));
            assert_eq!(line.field("dst.addr").as_deref(), Some("10.0.0.2:80"));
        }
        assert_eq!(
            AccessLine::parse(json)
                .unwrap()
                .field("bytes_sent")
                .as_deref(),
            Some("7")
        );
        assert!(AccessLine::parse("info listening src.addr=1").is_none());
    }

    #[test]
    fn samples_are_summed_by_name_and_labels() {
        let text = "# HELP a x\na_total{r=\"s\",p=\"1\"} 2\na_total{r=\"d\",p=\"1\"} 3\na_total_created{r=\"s\"} 9\nb 4\n";
        assert_eq!(sum_samples(text, "a_total", &[]), 5.0);
        assert_eq!(sum_samples(text, "a_total", &["r=\"s\""]), 2.0);
        assert_eq!(sum_samples(text, "b", &[]), 4.0);
    }
}
