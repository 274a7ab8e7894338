//! The stage: for every way a node with a client's and a server's pod, with an agent or without, all at once. They differ in
//! nothing but the agent and what it is told.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_harness::{
    Agent, AgentOptions, Fabric, Match, Mesh, Node, Pod, Policy, Proc, Service, Workload,
    culvert_binary, wait_until,
};

use serde_json::json;

use crate::plan::Plan;
use crate::servers;
use crate::way::Way;

const NAMESPACE: &str = "bench";
const CLIENT: &str = "cluster.local/ns/bench/sa/client";
/// What the agent's own path is asked for: it resolves services itself.
const SERVICE: &str = "10.96.0.1";
const SOON: Duration = Duration::from_secs(10);
const KNOBS: &str = "CULVERT_TEST_KNOBS";
const TELEMETRY: &str = "CULVERT_FLOW_TELEMETRY";
/// Sends what could be direct through the agent.
const DIRECT: &str = "culvert.dev/direct";
const SHORT_CIRCUIT: &str = "culvert.dev/short-circuit";

/// A node with its two pods.
pub struct Station {
    pub way: Way,
    agent: Option<Agent>,
    /// Decisions by the time everything was learnt.
    learnt: Decisions,
    _servers: Vec<Proc>,
    pub client: Pod,
    server: Pod,
    pub node: Node,
}

pub struct Stage {
    stations: Vec<Station>,
    // Last, so that it takes everything down when all else is gone.
    _fabric: Fabric,
}

/// What the kernel part and the agent decided about connections.
#[derive(Clone, Copy, Debug, Default)]
pub struct Decisions {
    pub direct: f64,
    pub steered: f64,
    pub hbone: f64,
}

impl Stage {
    pub fn new(plan: &Plan) -> Result<Self> {
        let fabric = Fabric::new()?;
        let switches = has_switches()?;
        let mut stations = Vec::new();
        for way in Way::ALL {
            if way == Way::Untold && !switches {
                continue;
            }
            let station = Station::new(&fabric, way, plan, switches)
                .with_context(|| format!("setting up the way `{}`", way.name()))?;
            stations.push(station);
        }
        Ok(Self {
            stations,
            _fabric: fabric,
        })
    }

    /// The node of a way, if this agent has it.
    pub fn station(&self, way: Way) -> Option<&Station> {
        self.stations.iter().find(|station| station.way == way)
    }

    pub fn stations(&self) -> &[Station] {
        &self.stations
    }
}

impl Station {
    fn new(fabric: &Fabric, way: Way, plan: &Plan, switches: bool) -> Result<Self> {
        let node = fabric.node()?;
        let (client, server) = (node.pod("client")?, node.pod("server")?);
        let servers = servers::start(&server, node.directory())?;
        let mut station = Self {
            way,
            agent: None,
            learnt: Decisions::default(),
            _servers: servers,
            client,
            server,
            node,
        };
        if way.is_meshed() {
            station.enrol(plan, switches)?;
        }
        if way.is_decided() {
            station.learn()?;
            station.learnt = station.decisions()?;
        }
        if way == Way::Ruled {
            for pod in [&station.client, &station.server] {
                add_rule(pod)?;
            }
        }
        Ok(station)
    }

    fn enrol(&mut self, plan: &Plan, switches: bool) -> Result<()> {
        let file = self.node.directory().join("mesh.yaml");
        let mesh = self.mesh(plan, switches);
        mesh.write(&file)?;
        let agent = self.node.start_agent(self.options(file))?;
        agent.ready()?;
        for pod in [&self.client, &self.server] {
            agent.enrol_as(pod, &Workload::of_pod(pod, NAMESPACE, pod.name()))?;
        }
        self.agent = Some(agent);
        Ok(())
    }

    fn options(&self, mesh_file: PathBuf) -> AgentOptions {
        let mut options = AgentOptions {
            mesh_file: Some(mesh_file),
            ..AgentOptions::default()
        };
        let mut set = |name: &str, value: &str| {
            options.env.insert(name.to_owned(), value.to_owned());
        };
        if self.way != Way::Logged {
            set("RUST_LOG", "warn,access=off");
        }
        if self.way == Way::Untold {
            set(TELEMETRY, "false");
        }
        if self.way == Way::Idle {
            set(KNOBS, "leave-alone");
        }
        options
    }

    fn mesh(&self, plan: &Plan, switches: bool) -> Mesh {
        let mut service = Service::new(NAMESPACE, "server", SERVICE);
        for port in servers::ports() {
            service = service.port(port, port);
        }
        let workload = |pod: &Pod| {
            let workload = Workload::of_pod(pod, NAMESPACE, pod.name());
            match self.way {
                Way::Short => workload.annotated(SHORT_CIRCUIT, "on"),
                _ => workload,
            }
        };
        let mut server = workload(&self.server);
        for port in servers::ports() {
            server = server.serves(&service, port, port);
        }
        if self.way == Way::Proxy && switches {
            let off = BTreeMap::from([(DIRECT, "off")]);
            server.extra.insert("annotations".to_owned(), json!(off));
        }
        let only = Policy::allow(NAMESPACE, "only-the-client").when(Match::principal(CLIENT));
        let mut mesh = Mesh {
            workloads: vec![workload(&self.client), server],
            services: vec![service],
            policies: vec![only],
            ..Mesh::default()
        };
        if self.way == Way::Big {
            fill(&mut mesh, plan.big_mesh);
        }
        mesh
    }

    /// Where clients of this way connect to.
    pub fn target(&self, port: u16) -> (IpAddr, u16) {
        match (self.way, SERVICE.parse::<Ipv4Addr>()) {
            (Way::Proxy, Ok(service)) => (IpAddr::V4(service), port),
            _ => (self.server.address(), port),
        }
    }

    /// Connects to every port until its connections take this way: the first ones let the agent learn.
    fn learn(&self) -> Result<()> {
        for port in servers::ports() {
            let (address, port) = self.target(port);
            let what = format!("a connection to port {port} on its way");
            wait_until(SOON, &what, || {
                let before = self.on_its_way()?;
                let to = format!("{address}:{port}");
                let steps = ["connect", "--half-close", "--read-all", "--to", &to];
                let tried = self.client.probe()?.args(steps).run(SOON)?.json()?;
                ensure!(
                    tried.get("connect").and_then(|outcome| outcome.as_str()) == Some("ok"),
                    "the client cannot connect to {to}: {tried}"
                );
                Ok((self.on_its_way()? > before).then_some(()))
            })?;
        }
        Ok(())
    }

    fn on_its_way(&self) -> Result<f64> {
        let decisions = self.decisions()?;
        Ok(match self.way {
            Way::Proxy => decisions.hbone,
            _ => decisions.direct,
        })
    }

    fn decisions(&self) -> Result<Decisions> {
        let Some(agent) = &self.agent else {
            return Ok(Decisions::default());
        };
        let decided = |reason: &str| agent.metric("culvert_kernel_decisions_total", &[reason]);
        Ok(Decisions {
            direct: decided("reason=\"direct\"")?,
            steered: decided("reason=\"steered_")?,
            hbone: agent.metric("culvert_flows_total", &["path=\"hbone\""])?,
        })
    }

    /// What was decided about the measured connections. An error where they did not take this way: such figures would be
    /// of something else.
    pub fn proof(&self) -> Result<Decisions> {
        let now = self.decisions()?;
        let seen = Decisions {
            direct: now.direct - self.learnt.direct,
            steered: now.steered - self.learnt.steered,
            hbone: now.hbone - self.learnt.hbone,
        };
        let (on, off) = match self.way {
            Way::Proxy => (seen.steered, seen.direct),
            _ => (seen.direct, seen.steered),
        };
        ensure!(
            off <= on / 1000.0,
            "on the way `{}`, {off} of {} connections took another one: {seen:?}",
            self.way.name(),
            on + off
        );
        Ok(seen)
    }
}

/// The rule that an agent makes. The kernel looks routes up more slowly from the first rule of a namespace on, also after it is gone.
fn add_rule(pod: &Pod) -> Result<()> {
    let rule = "rule add priority 15001 fwmark 0x539/0xffd lookup 15001";
    let status = pod.in_netns(|| {
        std::process::Command::new("ip")
            .args(rule.split(' '))
            .status()
    })?;
    let status = status.context("running `ip rule`")?;
    ensure!(status.success(), "`ip {rule}` failed: {status}");
    Ok(())
}

/// Workloads of other nodes, and policies that do not allow the client.
fn fill(mesh: &mut Mesh, (workloads, policies): (usize, usize)) {
    for number in 0..workloads {
        let [.., high, low] = number.to_be_bytes();
        mesh.workloads.push(Workload {
            uid: format!("elsewhere-{number}"),
            name: format!("elsewhere-{number}"),
            namespace: NAMESPACE.to_owned(),
            service_account: format!("account-{}", number % 1000),
            workload_ips: vec![Ipv4Addr::new(10, 128, high, low).to_string()],
            protocol: "HBONE".to_owned(),
            node: format!("elsewhere-{}", number % 100),
            ..Workload::default()
        });
    }
    for number in 0..policies {
        let account = format!("cluster.local/ns/{NAMESPACE}/sa/account-{number}");
        mesh.policies.push(
            Policy::allow(NAMESPACE, &format!("policy-{number}")).when(Match::principal(&account)),
        );
    }
}

/// Whether this agent knows the switches for flow telemetry and the direct way. One that does not (an older version, to compare
/// with) goes its own way for services, whose address the client of that way connects to.
fn has_switches() -> Result<bool> {
    let help = std::process::Command::new(culvert_binary()?)
        .args(["node", "--help"])
        .output()
        .context("asking `culvert node --help` for its settings")?;
    Ok(String::from_utf8_lossy(&help.stdout).contains(TELEMETRY))
}
