//! The stage: two nodes with four pods and the servers in them, with agents or without. Both stages are the same but for
//! the agents, so that figures can be compared.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_harness::{
    Agent, AgentOptions, ControlPlane, End, Fabric, Match, Mesh, Node, Pod, Policy, Proc, Workload,
    culvert_binary, pinned_probe, wait_until,
};
use serde_json::Value;

pub const NAMESPACE: &str = "demo";
/// Echoes, and tells of every connection.
pub const WITNESS: u16 = 7000;
/// Echoes, silently: for figures.
pub const ECHO: u16 = 7001;
/// Counts bytes.
pub const SINK: u16 = 7002;
/// Answers with a checksum of what came.
pub const COLLECT: u16 = 7003;
/// For what takes milliseconds when it works.
pub const SOON: Duration = Duration::from_secs(10);

/// A pod with its servers.
pub struct Server {
    pub pod: Pod,
    pub witness: Proc,
    _others: Vec<Proc>,
}

/// The agents, and the mesh they are told of.
pub struct Agents {
    pub first: Agent,
    pub second: Agent,
    /// Dropped with them.
    _control_plane: ControlPlane,
    pub mesh: Mesh,
}

impl Agents {
    /// The agent on the node of a server.
    pub fn of(&self, server: &str) -> &Agent {
        match server {
            "server-b" => &self.second,
            _ => &self.first,
        }
    }
}

pub struct Stage {
    pub agents: Option<Agents>,
    pub client: Pod,
    pub intruder: Pod,
    pub server_a: Server,
    pub server_b: Server,
    pub node1: Node,
    pub node2: Node,
    // Last, so that it takes everything down when all else is gone.
    pub fabric: Fabric,
}

impl Stage {
    /// Without agents.
    pub fn plain() -> Result<Self> {
        let fabric = Fabric::new()?;
        let (node1, node2) = (fabric.node()?, fabric.node()?);
        let (client, intruder) = (node1.pod("client")?, node1.pod("intruder")?);
        let server_a = Server::start(node1.pod("server-a")?)?;
        let server_b = Server::start(node2.pod("server-b")?)?;
        Ok(Self {
            agents: None,
            client,
            intruder,
            server_a,
            server_b,
            node1,
            node2,
            fabric,
        })
    }

    /// With an agent on each node, all pods enrolled, and a policy that lets only `client` reach the servers.
    pub fn meshed() -> Result<Self> {
        let mut stage = Self::plain()?;
        let workloads = stage
            .pods()
            .map(|pod| Workload::of_pod(pod, NAMESPACE, pod.name()));
        let only = Policy::allow(NAMESPACE, "only-the-client");
        let mesh = Mesh {
            workloads: workloads.to_vec(),
            policies: vec![only.when(Match::principal(&principal("client")))],
            ..Mesh::default()
        };
        mesh.write(&Agent::default_mesh_file(&stage.node1))?;
        // As in a cluster: mesh and certificates come from a control plane.
        let control_plane = ControlPlane::of_fabric(&stage.node1, &culvert_binary()?)?;
        let first = stage.node1.start_agent(AgentOptions::default())?;
        let second = stage.node2.start_agent(AgentOptions::default())?;
        first.ready()?;
        second.ready()?;
        for pod in stage.pods() {
            let agent = if pod.node().name() == stage.node1.name() {
                &first
            } else {
                &second
            };
            let workload = Workload::of_pod(pod, NAMESPACE, pod.name());
            agent.enrol_as(pod, &workload)?;
        }
        stage.agents = Some(Agents {
            first,
            second,
            _control_plane: control_plane,
            mesh,
        });
        Ok(stage)
    }

    fn pods(&self) -> [&Pod; 4] {
        [
            &self.client,
            &self.intruder,
            &self.server_a.pod,
            &self.server_b.pod,
        ]
    }

    /// The agents of a meshed stage.
    pub fn agents(&self) -> Result<&Agents> {
        self.agents.as_ref().context("this stage has no agents")
    }

    /// The pod called `name` among those that connect.
    pub fn source(&self, name: &str) -> &Pod {
        match name {
            "intruder" => &self.intruder,
            _ => &self.client,
        }
    }

    /// The server called `name`.
    pub fn server(&self, name: &str) -> &Server {
        match name {
            "server-b" => &self.server_b,
            _ => &self.server_a,
        }
    }

    /// Connects until the kernel admits the pair by itself: the first connection to a port makes the verdict.
    pub fn learn(&self, port: u16) -> Result<()> {
        let agents = self.agents()?;
        let target = self.server_a.pod.at(port);
        wait_until(SOON, "a direct connection from client to server-a", || {
            let mark = agents.first.log().mark();
            let tried = connect(&self.client, &target, &["--half-close", "--read-all"])?;
            ensure!(text(&tried, "read") == "EOF", "client to {target}: {tried}");
            let local = text(&tried, "local").to_owned();
            let line = agents
                .first
                .wait_for_access(mark, &[("src.addr", &local)], SOON)?;
            Ok((line.field("path").as_deref() == Some("direct")).then_some(()))
        })
    }
}

impl Server {
    fn start(pod: Pod) -> Result<Self> {
        let witness = serve(&pod, WITNESS, &["echo"])?;
        let others = vec![
            serve(&pod, ECHO, &["echo", "--quiet"])?,
            serve(&pod, SINK, &["sink", "--quiet"])?,
            serve(&pod, COLLECT, &["collect", "--quiet"])?,
        ];
        Ok(Self {
            pod,
            witness,
            _others: others,
        })
    }
}

fn serve(pod: &Pod, port: u16, mode: &[&str]) -> Result<Proc> {
    let port = port.to_string();
    let launch = pinned_probe(pod, End::Server)?.args(["serve", "--port", &port, "--mode"]);
    let server = launch.args(mode).spawn()?;
    server.wait_for_event("listening", SOON)?;
    Ok(server)
}

/// The identity of a service account, as policies write it.
pub fn principal(account: &str) -> String {
    format!("cluster.local/ns/{NAMESPACE}/sa/{account}")
}

/// One connection, with the outcome of every step.
pub fn connect(from: &Pod, to: &str, steps: &[&str]) -> Result<Value> {
    let launch = from.probe()?.args(["connect", "--to", to]).args(steps);
    launch.run(SOON)?.json()
}

/// A connection that stays open, driven line by line.
pub fn hold(from: &Pod, to: &str) -> Result<(Proc, String)> {
    let launch = from.probe()?.args(["connect", "--hold", "--to", to]);
    let held = launch.stdin().spawn()?;
    // `connected` or `failed`: both say how connect went.
    let connected = held.wait_for_line("\"connect\":", SOON)?;
    let connected: Value = serde_json::from_str(&connected)?;
    ensure!(text(&connected, "connect") == "ok", "{connected}");
    Ok((held, text(&connected, "local").to_owned()))
}

/// Sends a line on a held connection and waits for its echo.
pub fn converse(held: &Proc, line: &str) -> Result<()> {
    let mark = held.log().mark();
    held.send_line(line)?;
    let echo = held.wait_for_event_after(mark, "data", SOON)?;
    ensure!(text(&echo, "data").trim_end() == line, "{echo}");
    Ok(())
}

/// A field of a report, empty if absent.
pub fn text<'a>(report: &'a Value, field: &str) -> &'a str {
    report
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
}
