//! The stage of most tests: two nodes, `client`, `server-a` and `intruder` on the first, `server-b` on the second, and a
//! policy that lets only `client` reach the servers. The second node has an agent from when a test first asks for it or for `server-b`.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use culvert_harness::{
    Agent, AgentOptions, Clock, ControlPlane, Fabric, FabricOptions, Match, Mesh, Node, Pod,
    Policy, Proc, Workload,
    cni_rules::{self, Backend},
    culvert_binary,
    fabric::BRIDGE,
    stretch, wait_until,
};
use serde_json::Value;

pub const NAMESPACE: &str = "demo";
pub const PORT: u16 = 7000;
pub const SOON: Duration = Duration::from_secs(15);

pub struct Scene {
    pub mesh: Mesh,
    pub agent1: Agent,
    agent2: OnceLock<Agent>,
    /// As what it is started.
    options2: AgentOptions,
    starting: Mutex<()>,
    /// Tells the agents the mesh; none where they read the file.
    pub control_plane: Option<ControlPlane>,
    /// What they all go by, if it is not the machine's.
    pub clock: Option<Clock>,
    pub client: Pod,
    pub server_a: Pod,
    pub intruder: Pod,
    server_b: Pod,
    pub node1: Node,
    pub node2: Node,
    // Last, so that it takes everything down when all else is gone.
    pub fabric: Fabric,
}

/// How a test wants its stage.
#[derive(Clone, Default)]
pub struct Setting {
    /// Protections that are off on both nodes.
    pub knobs: &'static str,
    /// More environment of both agents.
    pub env: Vec<(&'static str, String)>,
    /// In place of the usual policies.
    pub policies: Option<Vec<Policy>>,
    /// Pods have IPv6 addresses too.
    pub ipv6: bool,
    /// Agents read the mesh file and have the CA's key themselves, in place of a control plane: for what only a file can say, such as
    /// nothing that is a mesh.
    pub mesh_file: bool,
    /// Agents have a control plane under emulation as well, where each process takes its time and a file does: for what is about it.
    pub control_plane: bool,
    /// How the control plane behaves from the beginning.
    pub behaviour: &'static str,
    /// Agents and their control plane go by a clock that the test sets.
    pub clock: bool,
    /// istio-cni's rules steer on the first node: they are made in its pods, and its agent is told.
    pub iptables: bool,
    /// The second node's agent runs from the beginning: for what happens before a test needs it.
    pub both_agents: bool,
}

/// The environment in which these are lenient; nothing, unless something is named.
pub fn lenient(names: &str) -> Vec<(&'static str, String)> {
    vec![("CULVERT_LENIENT", names.to_owned())]
}

pub fn principal(account: &str) -> String {
    format!("cluster.local/ns/{NAMESPACE}/sa/{account}")
}

/// Only `account` may connect to pods of the namespace.
pub fn only(account: &str) -> Policy {
    Policy::allow(NAMESPACE, "only-the-client").when(Match::principal(&principal(account)))
}

pub fn strict() -> Policy {
    Policy::deny(NAMESPACE, "strict-mtls").when(Match::not_principal("*"))
}

impl Scene {
    pub fn new() -> Result<Self> {
        Self::with(Setting::default())
    }

    /// With agents that read the mesh file.
    pub fn of_a_file() -> Result<Self> {
        Self::with(Setting {
            mesh_file: true,
            ..Setting::default()
        })
    }

    pub fn without(knobs: &'static str) -> Result<Self> {
        Self::with(Setting {
            knobs,
            ..Setting::default()
        })
    }

    pub fn with(setting: Setting) -> Result<Self> {
        let fabric = Fabric::with(FabricOptions { ipv6: setting.ipv6 })?;
        let node1 = fabric.node()?;
        let node2 = fabric.node()?;
        let client = node1.pod("client")?;
        let server_a = node1.pod("server-a")?;
        let intruder = node1.pod("intruder")?;
        let server_b = node2.pod("server-b")?;
        let workloads = [&client, &server_a, &intruder, &server_b]
            .map(|pod| Workload::of_pod(pod, NAMESPACE, pod.name()));
        let mesh = Mesh {
            workloads: workloads.to_vec(),
            policies: setting.policies.unwrap_or_else(|| vec![only("client")]),
            ..Mesh::default()
        };
        mesh.write(&Agent::default_mesh_file(&node1))?;
        // As in a cluster: from here on agents get mesh and certificates from a control plane.
        let clock = setting
            .clock
            .then(|| Clock::in_directory(fabric.directory()));
        let clock = clock.transpose()?;
        let told_time = clock.as_ref().map(Clock::environment).unwrap_or_default();
        let emulated = stretch(SOON) > SOON;
        let control_plane = match setting.mesh_file || emulated && !setting.control_plane {
            false => {
                let binary = culvert_binary()?;
                Some(ControlPlane::of_fabric_with(
                    &node1,
                    &binary,
                    told_time.clone(),
                )?)
            }
            true => None,
        };
        if let Some(control_plane) = &control_plane
            && !setting.behaviour.is_empty()
        {
            control_plane.misbehave_now(setting.behaviour)?;
        }
        let mut options = AgentOptions::default();
        options.env.extend(told_time);
        options.env.extend(
            setting
                .env
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value)),
        );
        if !setting.knobs.is_empty() {
            options
                .env
                .insert("CULVERT_TEST_KNOBS".to_owned(), setting.knobs.to_owned());
        }
        let mut options1 = options.clone();
        if setting.iptables {
            let name = "CULVERT_REDIRECT_MODE".to_owned();
            options1.env.insert(name, "iptables".to_owned());
            for pod in [&client, &server_a, &intruder] {
                cni_rules::program(pod, Backend::Legacy)?;
            }
        }
        let agent1 = node1.start_agent(options1)?;
        agent1.ready()?;
        if let Some(clock) = &clock {
            clock.tidy(agent1.process())?;
            if let Some(control_plane) = &control_plane {
                clock.tidy(control_plane.process())?;
            }
        }
        let scene = Self {
            mesh,
            agent1,
            agent2: OnceLock::new(),
            options2: options,
            starting: Mutex::new(()),
            control_plane,
            clock,
            client,
            server_a,
            intruder,
            server_b,
            node1,
            node2,
            fabric,
        };
        for pod in [&scene.client, &scene.server_a, &scene.intruder] {
            scene.agent1.enrol_as(pod, scene.workload(pod)?)?;
        }
        if setting.both_agents {
            scene.agent2()?;
        }
        Ok(scene)
    }

    /// The second node's agent, with `server-b` enrolled. The first who asks starts it.
    pub fn agent2(&self) -> Result<&Agent> {
        let _alone = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = self.agent2.get() {
            return Ok(agent);
        }
        let agent = self.node2.start_agent(self.options2.clone())?;
        agent.ready()?;
        if let Some(clock) = &self.clock {
            clock.tidy(agent.process())?;
        }
        // As at the beginning, whatever has become of the mesh.
        let workload = Workload::of_pod(&self.server_b, NAMESPACE, self.server_b.name());
        agent.enrol_as(&self.server_b, &workload)?;
        Ok(self.agent2.get_or_init(|| agent))
    }

    pub fn agent2_mut(&mut self) -> Result<&mut Agent> {
        self.agent2()?;
        self.agent2.get_mut().context("it was started just now")
    }

    /// The second node's pod, which its agent serves.
    pub fn server_b(&self) -> Result<&Pod> {
        self.agent2()?;
        Ok(&self.server_b)
    }

    /// The same pod, whether an agent serves it or not: for a test that needs no more than what the mesh says of it.
    pub fn pod_b(&self) -> &Pod {
        &self.server_b
    }

    /// Those that have been started.
    pub fn agents(&self) -> Vec<&Agent> {
        [&self.agent1]
            .into_iter()
            .chain(self.agent2.get())
            .collect()
    }

    pub fn workload(&self, pod: &Pod) -> Result<&Workload> {
        let found = self
            .mesh
            .workloads
            .iter()
            .find(|workload| workload.name == pod.name());
        found.with_context(|| format!("{} is not in the mesh", pod.name()))
    }

    pub fn mesh_file(&self) -> PathBuf {
        Agent::default_mesh_file(&self.node1)
    }

    /// What agents and control plane go by.
    pub fn clock(&self) -> Result<&Clock> {
        self.clock
            .as_ref()
            .context("these go by the machine's clock")
    }

    /// The control plane of the agents.
    pub fn control_plane(&mut self) -> Result<&mut ControlPlane> {
        self.control_plane
            .as_mut()
            .context("these agents read a file")
    }

    /// Changes the mesh, and waits until the agents that run have heard of all of it.
    pub fn change_mesh(&mut self, change: impl FnOnce(&mut Mesh)) -> Result<()> {
        change(&mut self.mesh);
        self.tell(&self.mesh)
    }

    /// Tells the agents another mesh, and waits until those that run have heard of all of it.
    pub fn tell(&self, mesh: &Mesh) -> Result<()> {
        let agents = self.agents();
        let file = self.mesh_file();
        let Some(control_plane) = &self.control_plane else {
            return changes(&agents, "mesh", || mesh.write(&file));
        };
        let differs = |path: &Path, text: String| -> Result<bool> {
            Ok(std::fs::read_to_string(path).context("reading the mesh of before")? != text)
        };
        let annotations = Mesh::annotations_file(&file);
        let other_annotations = differs(&annotations, mesh.annotations_to_yaml()?)?;
        let other_mesh = differs(&file, mesh.to_yaml()?)?;
        let mark = control_plane.log().mark();
        match other_annotations {
            true => changes(&agents, "annotations", || mesh.write(&file))?,
            false => mesh.write(&file)?,
        }
        if other_mesh {
            let nodes: Vec<_> = agents.iter().map(|agent| agent.node()).collect();
            control_plane.wait_until_told(mark, &nodes)?;
        }
        // What an agent has answered is what it judges by; its kernel part follows within milliseconds, sooner than it tells this.
        for agent in agents {
            status(agent)?;
        }
        Ok(())
    }

    /// How many flows have been short-circuited so far, on the first node.
    pub fn short_circuited(&self) -> Result<f64> {
        self.proposed("entered")
    }

    /// Of how many flows that were worth a short-circuit this came, on the first node.
    pub fn proposed(&self, outcome: &str) -> Result<f64> {
        proposed_to(&self.agent1, outcome)
    }

    /// How many messages of short-circuited flows went by TCP for this reason, on the first node.
    pub fn by_tcp(&self, reason: &str) -> Result<f64> {
        let label = format!("outcome=\"{reason}\"");
        let name = "culvert_short_circuited_messages_total";
        self.agent1.metric(name, &[&label])
    }

    /// Lets the kernel part learn a verdict, so that the next connection of the pair is direct (or refused) at once.
    pub fn warm(&self, from: &Pod, to: &Pod) -> Result<()> {
        connect(from, to, &["--send", "x", "--read", "1"]).map(drop)
    }
}

/// Of how many flows that an agent was told of this came since it started.
pub fn proposed_to(agent: &Agent, outcome: &str) -> Result<f64> {
    let label = format!("outcome=\"{outcome}\"");
    agent.metric("culvert_short_circuited_flows_total", &[&label])
}

/// What `culvert status` says of the mesh.
pub fn mesh_status(agent: &Agent) -> Result<String> {
    Ok(text(&status(agent)?, "mesh").to_owned())
}

/// Makes a change, and waits until these agents have another revision of what `culvert status` says there.
fn changes(agents: &[&Agent], of: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
    let said = |agent: &Agent| -> Result<String> { Ok(text(&status(agent)?, of).to_owned()) };
    let before: Vec<_> = agents
        .iter()
        .map(|agent| said(agent))
        .collect::<Result<_>>()?;
    change()?;
    for (agent, before) in agents.iter().zip(before) {
        wait_until(SOON, &format!("the agent to read the {of}"), || {
            let now = said(agent)?;
            Ok((revision(&now) != revision(&before)).then_some(()))
        })?;
    }
    Ok(())
}

/// The part of that which changes with the content alone.
fn revision(status: &str) -> Option<&str> {
    status.split(", ").find(|part| part.starts_with("revision"))
}

pub fn status(agent: &Agent) -> Result<Value> {
    Ok(serde_json::from_str(
        &agent.cli(["status", "--json"])?.success()?,
    )?)
}

/// A server of the probe program in `pod`, listening on [`PORT`].
pub fn serve(pod: &Pod, mode: &str) -> Result<Proc> {
    serve_on(pod, mode, PORT)
}

pub fn serve_on(pod: &Pod, mode: &str, port: u16) -> Result<Proc> {
    let server = pod
        .probe()?
        .args(["serve", "--port", &port.to_string(), "--mode", mode])
        .spawn()?;
    server.wait_for_line("listening", SOON)?;
    Ok(server)
}

/// One connection from a pod, with its outcome.
pub fn connect(from: &Pod, to: &Pod, more: &[&str]) -> Result<Value> {
    connect_to(from, &to.at(PORT), more)
}

pub fn connect_to(from: &Pod, to: &str, more: &[&str]) -> Result<Value> {
    from.probe()?
        .args(["connect", "--to", to])
        .args(more)
        .run(SOON)?
        .json()
}

/// Sends a word to an echo server and reads it back.
pub fn echo(from: &Pod, to: &Pod) -> Result<Value> {
    connect(from, to, &["--send", "hello", "--read", "5"])
}

/// A held connection, for driving a live flow step by step.
pub fn hold(from: &Pod, to: &Pod) -> Result<Proc> {
    hold_to(from, &to.at(PORT))
}

pub fn hold_to(from: &Pod, to: &str) -> Result<Proc> {
    let held = from
        .probe()?
        .args(["connect", "--to", to, "--hold"])
        .stdin()
        .spawn()?;
    let connected = held.wait_for_event("connected", SOON)?;
    ensure!(text(&connected, "connect") == "ok", "{connected}");
    Ok(held)
}

/// Takes a pod with an address of the node's choice off the link: nothing reaches it, and what it sends is lost.
pub fn unplug(pod: &Pod) -> Result<()> {
    link(pod, &["nomaster"])
}

/// Undoes [`unplug`].
pub fn plug_in(pod: &Pod) -> Result<()> {
    link(pod, &["master", BRIDGE])
}

fn link(pod: &Pod, change: &[&str]) -> Result<()> {
    let address = pod.address().to_string();
    let host = address.rsplit('.').next().context("an IPv4 address")?;
    let port = format!("p{host}");
    pod.node()
        .command("ip")
        .args(["link", "set", &port])
        .args(change)
        .run(SOON)?
        .success()
        .map(drop)
}

pub fn text<'a>(report: &'a Value, field: &str) -> &'a str {
    report
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Whether the probe exchanged its word with the server.
pub fn answered(report: &Value) -> bool {
    text(report, "data") == "hello"
}

/// Whether the connection was accepted and then reset, which the client may notice at any of its steps.
pub fn was_reset(report: &Value) -> bool {
    ["connect", "send", "read"]
        .iter()
        .any(|step| ["ECONNRESET", "EPIPE"].contains(&text(report, step)))
}
