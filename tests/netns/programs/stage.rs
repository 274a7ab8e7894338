//! Three pods of one node, first without a mesh and then in one, and the same programs run in both. Called by every module
//! here, through [`compare`].
//!
//! Invariant: what is compared with the plain run went over direct flows, all of it; the kernel part and the agent say so.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use culvert_harness::{
    Agent, AgentOptions, ControlPlane, Fabric, Launch, Match, Mesh, Namespace, Node, Pod, Policy,
    Proc, TcpState, Workload, culvert_binary, wait_until,
};
use culvert_tests::scene::{NAMESPACE, SOON, connect_to, principal, text};

use crate::transcript::{Transcript, same};

/// No program here may take longer for one step.
pub const STEP: Duration = Duration::from_secs(60);

/// Whether direct flows are short-circuited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Off,
    /// What a mesh gets that says nothing about it.
    Default,
    On,
}

impl Mode {
    /// Says so in the mesh.
    fn set(self, mesh: &mut Mesh) {
        let said = match self {
            Self::Off => "off",
            Self::Default => return,
            Self::On => "on",
        };
        let annotated = Namespace::annotated(NAMESPACE, "culvert.dev/short-circuit", said);
        mesh.namespaces.push(annotated);
    }
}

/// One of the three pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Client,
    /// Between the two others, for programs that pass on.
    Relay,
    Server,
}

/// Which connections a program makes: from, to, port.
pub type Route = (End, End, u16);

pub struct Stage {
    agent: Option<Agent>,
    /// Tells it the mesh.
    control_plane: Option<ControlPlane>,
    /// How they are joined, once they are.
    mode: Option<Mode>,
    pub client: Pod,
    relay: Pod,
    pub server: Pod,
    node: Node,
    // Last, so that it takes everything down when all else is gone.
    fabric: Fabric,
}

/// What programs do at any rate.
#[derive(Clone, Copy, Debug)]
pub struct Least {
    /// Connections that they make.
    pub direct: u32,
    /// Those of them that are short-circuited, where a short-circuit is asked for.
    pub short: u64,
}

/// Runs programs without a mesh and over direct flows along `routes`, and demands the same of both.
pub fn compare(
    mode: Mode,
    routes: &[Route],
    least: Least,
    program: impl Fn(&Stage, &mut Transcript) -> Result<()>,
) -> Result<()> {
    compare_without("", mode, routes, least, program)
}

/// With protections of the agent switched off.
pub fn compare_without(
    knobs: &str,
    mode: Mode,
    routes: &[Route],
    least: Least,
    program: impl Fn(&Stage, &mut Transcript) -> Result<()>,
) -> Result<()> {
    let run = |stage: &Stage| {
        let mut told = Transcript::default();
        let ended = program(stage, &mut told);
        ended.with_context(|| format!("what was said until then:\n{told}"))?;
        Ok::<_, anyhow::Error>(told)
    };
    let mut stage = Stage::plain()?;
    let plain = run(&stage).context("without a mesh")?;
    stage.join(knobs, mode, routes)?;
    let before = stage.ways()?;
    let direct = run(&stage).with_context(|| format!("over direct flows, {mode:?}"))?;
    println!("{direct}");
    stage.went_direct(before, least.direct)?;
    stage.went_short(least.short)?;
    same(&plain, &direct, mode)
}

/// How connections have gone so far.
#[derive(Clone, Copy, Debug)]
struct Ways {
    /// Left to the two applications by `connect`.
    direct: f64,
    /// Handed to the agent by `connect`, or refused, for any reason.
    otherwise: f64,
    /// Carried by the agent.
    carried: f64,
}

impl Stage {
    fn plain() -> Result<Self> {
        let fabric = Fabric::new()?;
        let node = fabric.node()?;
        Ok(Self {
            agent: None,
            control_plane: None,
            mode: None,
            client: node.pod("client")?,
            relay: node.pod("relay")?,
            server: node.pod("server")?,
            node,
            fabric,
        })
    }

    /// Takes the three pods into a mesh that allows each only what the routes need, and lets the kernel part learn it.
    fn join(&mut self, knobs: &str, mode: Mode, routes: &[Route]) -> Result<()> {
        let ends = [End::Client, End::Relay, End::Server];
        let workloads = ends.map(|end| {
            let pod = self.pod(end);
            Workload::of_pod(pod, NAMESPACE, pod.name())
        });
        let callers =
            ["client", "relay"].map(|name| vec![vec![Match::principal(&principal(name))]]);
        let mut mesh = Mesh {
            workloads: workloads.to_vec(),
            policies: vec![Policy {
                rules: callers.to_vec(),
                ..Policy::allow(NAMESPACE, "callers")
            }],
            ..Mesh::default()
        };
        mode.set(&mut mesh);
        mesh.write(&Agent::default_mesh_file(&self.node))?;
        let control_plane = ControlPlane::of_fabric(&self.node, &culvert_binary()?)?;
        self.control_plane = Some(control_plane);
        let mut options = AgentOptions::default();
        if !knobs.is_empty() {
            let name = "CULVERT_TEST_KNOBS".to_owned();
            options.env.insert(name, knobs.to_owned());
        }
        let agent = self.node.start_agent(options)?;
        agent.ready()?;
        for (end, workload) in ends.into_iter().zip(&workloads) {
            agent.enrol_as(self.pod(end), workload)?;
        }
        self.agent = Some(agent);
        self.mode = Some(mode);
        for (from, to, port) in routes {
            self.learn(*from, *to, *port)?;
        }
        Ok(())
    }

    /// Nobody listens yet. What the agent carries is accepted first and ended then; a refusal at once is the server's own.
    fn learn(&self, from: End, to: End, port: u16) -> Result<()> {
        let (from, to) = (self.pod(from), self.pod(to).at(port));
        wait_until(SOON, &format!("a direct connection to {to}"), || {
            let report = connect_to(from, &to, &["--read", "1"])?;
            Ok((text(&report, "connect") == "ECONNREFUSED").then_some(()))
        })
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("there is no mesh yet")
    }

    fn ways(&self) -> Result<Ways> {
        const DECISIONS: &str = "culvert_kernel_decisions_total";
        const FLOWS: &str = "culvert_flows_total";
        let metrics = self.agent()?.metrics()?;
        let sum = |name: &str, wanted: &dyn Fn(&str) -> bool| -> f64 {
            let samples = metrics.lines().filter_map(|line| {
                let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
                wanted(labels).then_some(value.parse::<f64>().ok()?)
            });
            samples.sum()
        };
        let otherwise = |labels: &str| {
            ["\"steered", "\"denied"]
                .iter()
                .any(|way| labels.contains(way))
        };
        Ok(Ways {
            direct: sum(DECISIONS, &|labels| labels.contains("reason=\"direct\"")),
            otherwise: sum(DECISIONS, &otherwise),
            carried: sum(FLOWS, &|labels| !labels.contains("path=\"direct\"")),
        })
    }

    fn went_direct(&self, before: Ways, least: u32) -> Result<()> {
        let after = self.ways()?;
        let direct = after.direct - before.direct;
        ensure!(
            direct >= f64::from(least),
            "{direct} connections were direct, not {least} or more: {before:?}, then {after:?}"
        );
        ensure!(
            after.otherwise == before.otherwise && after.carried == before.carried,
            "not all connections were direct: {before:?}, then {after:?}"
        );
        Ok(())
    }

    fn went_short(&self, least: u64) -> Result<()> {
        let outcomes = self.short_circuited()?;
        println!("flows worth a short-circuit: {outcomes:?}");
        let entered = outcomes.get("entered").copied().unwrap_or_default();
        if self.is_short() {
            ensure!(
                entered >= least,
                "{entered} flows were short-circuited, not {least} or more: {outcomes:?}"
            );
        } else {
            ensure!(entered == 0, "{entered} flows were short-circuited");
        }
        Ok(())
    }

    /// Whether flows are short-circuited here, if their programs let them.
    pub fn is_short(&self) -> bool {
        self.mode == Some(Mode::On)
    }

    /// Direct flows that were worth a short-circuit, by what became of them.
    fn short_circuited(&self) -> Result<BTreeMap<String, u64>> {
        const NAME: &str = "culvert_short_circuited_flows_total{";
        let metrics = self.agent()?.metrics()?;
        let samples = metrics.lines().filter_map(|line| {
            let (labels, value) = line.strip_prefix(NAME)?.rsplit_once(' ')?;
            let outcome = labels.split('"').nth(1)?;
            Some((outcome.to_owned(), value.parse().ok()?))
        });
        Ok(samples.collect())
    }

    pub fn pod(&self, end: End) -> &Pod {
        match end {
            End::Client => &self.client,
            End::Relay => &self.relay,
            End::Server => &self.server,
        }
    }

    /// For the programs' files; root's alone.
    pub fn directory(&self) -> &Path {
        self.fabric.directory()
    }

    /// Starts a server, and waits until it listens on `port`, without connecting to it.
    pub fn serve(&self, end: End, port: u16, server: Launch) -> Result<Proc> {
        let server = server.spawn()?;
        wait_until(SOON, &format!("a listener on port {port}"), || {
            if let Some(status) = server.status() {
                bail!("it ended ({status}): {}", server.log().tail());
            }
            let sockets = self.pod(end).sockets()?;
            let listens = sockets
                .iter()
                .any(|socket| socket.state == TcpState::Listen && socket.local.port() == port);
            Ok(listens.then_some(()))
        })?;
        Ok(server)
    }

    /// Runs a shell command in the client's pod: its output, if it succeeds.
    pub fn shell(&self, command: &str) -> Result<String> {
        let launch = self
            .client
            .command("bash")
            .args(["-euo", "pipefail", "-c", command]);
        let ran = launch.run(STEP)?.success();
        ran.with_context(|| format!("`{command}`"))
    }
}

/// The distribution's Python in a pod.
pub fn python(pod: &Pod) -> Launch {
    pod.command("/usr/bin/python3")
        .env("PYTHONDONTWRITEBYTECODE", "1")
}
