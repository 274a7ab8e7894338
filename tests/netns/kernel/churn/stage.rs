//! The stage of the churn: what always runs on it, and what may change.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result};
use culvert_harness::{
    Agent, AgentOptions, Match, Node, Pod, Policy, Proc, Service, Workload, stretch, wait_until,
};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, mesh_status, only, principal, serve_on,
};
use serde_json::Value;

use super::{
    Chance, Plan,
    health::{Health, complaints},
    load::{Expected, Load, Streams, Totals, Way},
    pods::{SLOTS, Slot},
};

/// A policy that keeps the client out of workloads that name it.
pub const CLOSED: &str = "closed";
pub const VIP_PORT: u16 = 80;
const VIP: &str = "10.96.0.1";
const VIP_V6: &str = "fd96::1";
/// Of a service that comes and goes.
const PASSING: &str = "10.96.0.2";
/// Where nobody but the intruder ever connects to.
const WITNESS: u16 = 7001;
/// Milliseconds between two connections of a pair.
const PACE: u64 = 60;
/// From when both agents have read a change until all it means is in force.
const GRACE: Duration = Duration::from_millis(500);

pub const NODES: usize = 2;

pub fn settle() {
    std::thread::sleep(stretch(GRACE));
}

pub fn service() -> Service {
    let mut service = Service::new(NAMESPACE, "servers", VIP).port(VIP_PORT, PORT);
    service.vips.push(format!("/{VIP_V6}"));
    service
}

fn passing() -> Service {
    Service::new(NAMESPACE, "passing", PASSING).port(VIP_PORT, PORT)
}

/// An echo server for both families.
pub fn servers(pod: &Pod) -> Result<Proc> {
    let words = ["serve", "--port", "7000", "--mode", "echo", "--bind", "::"];
    let server = pod.probe()?.args(words).arg("--quiet").spawn()?;
    server.wait_for_line("listening", SOON)?;
    Ok(server)
}

pub struct Stage {
    pub scene: Scene,
    pub slots: [Slot; SLOTS],
    pub totals: Totals,
    /// Who had each of the addresses last.
    pub owners: BTreeMap<Ipv4Addr, &'static str>,
    changes: BTreeMap<&'static str, u64>,
    restarted: AgentOptions,
    remote: Pod,
    guest: Guest,
    steady: Vec<Load>,
    passing: Option<Load>,
    streams: Vec<Streams>,
    exchanged: u64,
    certificates: u64,
    errors: Vec<String>,
    warnings: BTreeMap<String, u64>,
    witnesses: Vec<Proc>,
    _servers: Vec<Proc>,
}

/// A pod that policy lets in and keeps out in turn.
struct Guest {
    allowed: bool,
    loads: Vec<Load>,
}

/// What it all came to.
pub struct Outcome {
    pub totals: Totals,
    pub changes: BTreeMap<&'static str, u64>,
    pub certificates: u64,
    pub streams: u64,
    /// Warnings, and how often.
    pub log: BTreeMap<String, u64>,
    errors: Vec<String>,
    witnessed: Vec<Value>,
}

impl Outcome {
    pub fn judge(&self, report: &Value) {
        for counts in self.totals.values() {
            assert_eq!(counts.failures + counts.admitted, 0, "{report:#}");
        }
        let sum =
            |count: fn(&super::load::Counts) -> u64| self.totals.values().map(count).sum::<u64>();
        assert!(
            sum(|counts| counts.allowed) > 0 && sum(|counts| counts.denied) > 0,
            "{report:#}"
        );
        assert!(self.errors.is_empty(), "{:#?}", self.errors);
        assert!(self.witnessed.is_empty(), "{:?}", self.witnessed);
    }
}

impl Stage {
    pub fn new(plan: &Plan) -> Result<Self> {
        let env = vec![("SECRET_TTL", format!("{}s", plan.certificate.as_secs()))];
        let closed = Policy::deny(NAMESPACE, CLOSED)
            .selector()
            .when(Match::principal(&principal("client")));
        let mut scene = Scene::with(Setting {
            policies: Some(vec![only("client"), closed]),
            ipv6: true,
            knobs: plan.knobs,
            env: env.clone(),
            control_plane: true,
            both_agents: true,
            ..Setting::default()
        })?;
        let guest = scene.node1.pod("guest")?;
        let remote = scene.node2.pod("remote")?;
        let of_guest = Workload::of_pod(&guest, NAMESPACE, "guest");
        let of_remote = Workload::of_pod(&remote, NAMESPACE, "client");
        let told = [of_guest.clone(), of_remote.clone()];
        scene.change_mesh(|mesh| {
            mesh.workloads.extend(told);
            mesh.services.push(service());
            for name in ["server-a", "server-b"] {
                if let Some(workload) = mesh.workload(name) {
                    *workload = workload.clone().serves(&service(), VIP_PORT, PORT);
                }
            }
        })?;
        scene.agent1.enrol_as(&guest, &of_guest)?;
        scene.agent2()?.enrol_as(&remote, &of_remote)?;
        let both = [&scene.server_a, scene.server_b()?];
        let _servers = both.map(servers).into_iter().collect::<Result<_>>()?;
        let witnesses = both.map(|pod| serve_on(pod, "echo", WITNESS));
        let witnesses = witnesses.into_iter().collect::<Result<_>>()?;
        settle();
        let mut restarted = AgentOptions {
            ..AgentOptions::default()
        };
        let env = env
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value));
        restarted.env.extend(env);
        if !plan.knobs.is_empty() {
            let knobs = ("CULVERT_TEST_KNOBS".to_owned(), plan.knobs.to_owned());
            restarted.env.extend([knobs]);
        }
        let start = |way, to: &str| Load::start(way, &guest, to, PACE, Expected::Deny);
        let guest = Guest {
            allowed: false,
            loads: vec![
                start(Way::Direct(0), &scene.server_a.at(PORT))?,
                start(Way::Tunnel, &scene.server_b()?.at(PORT))?,
            ],
        };
        let mut stage = Self {
            steady: steady(&scene, &remote)?,
            scene,
            slots: Default::default(),
            totals: Totals::default(),
            owners: BTreeMap::new(),
            changes: BTreeMap::new(),
            restarted,
            remote,
            guest,
            passing: None,
            streams: Vec::new(),
            exchanged: 0,
            certificates: 0,
            errors: Vec::new(),
            warnings: BTreeMap::new(),
            witnesses,
            _servers,
        };
        stage.streams.push(stage.direct_streams()?);
        stage.start_streams()?;
        Ok(stage)
    }

    pub fn count(&mut self, change: &'static str) {
        *self.changes.entry(change).or_default() += 1;
    }

    pub fn agent(&self, node: usize) -> &Agent {
        self.scene.agents()[node]
    }

    pub fn node(&self, node: usize) -> &Node {
        [&self.scene.node1, &self.scene.node2][node]
    }

    fn direct_streams(&self) -> Result<Streams> {
        let to = self.scene.server_a.at_v6(PORT)?;
        Streams::start(Way::Direct(0), &self.scene.client, &to)
    }

    /// Those that end with an agent.
    fn start_streams(&mut self) -> Result<()> {
        let scene = &self.scene;
        self.streams.extend([
            Streams::start(Way::Tunnel, &scene.client, &scene.server_b()?.at(PORT))?,
            Streams::start(Way::Tunnel, &self.remote, &scene.server_a.at_v6(PORT)?)?,
        ]);
        Ok(())
    }

    fn end_streams(&mut self, ended: impl Fn(Way) -> bool) -> Result<()> {
        let streams = std::mem::take(&mut self.streams).into_iter();
        let (ended, stay) = streams.partition(|streams| ended(streams.way));
        self.streams = stay;
        for streams in ended {
            self.exchanged += streams.end()?;
        }
        Ok(())
    }

    /// Something at random.
    pub fn change(&mut self, chance: &mut Chance) -> Result<()> {
        match chance.below(10) {
            0..5 => {
                let place = chance.below(SLOTS);
                self.live_or_die(place, chance)
            }
            5 | 6 => self.turn_guest(),
            7 | 8 => self.turn_endpoint(chance),
            _ => self.turn_passing(),
        }
    }

    /// Policy lets the guest in or keeps it out, by the absence of a permission or by a prohibition.
    fn turn_guest(&mut self) -> Result<()> {
        self.guest.allowed = !self.guest.allowed;
        let allowed = self.guest.allowed;
        self.count(match allowed {
            true => "a policy allows what was denied",
            false => "a policy denies what was allowed",
        });
        for load in &self.guest.loads {
            load.expect(Expected::Unsure)?;
        }
        let prohibits = self.changes.values().sum::<u64>() % 2 == 0;
        self.scene.change_mesh(|mesh| {
            mesh.policies
                .retain(|policy| !policy.name.starts_with("guest"));
            let permission = Policy {
                name: "guest-too".to_owned(),
                ..only("guest")
            };
            let prohibition = Policy::deny(NAMESPACE, "guest-not");
            match (allowed, prohibits) {
                (true, _) => mesh.policies.push(permission),
                (false, true) => mesh.policies.extend([
                    permission,
                    prohibition.when(Match::principal(&principal("guest"))),
                ]),
                (false, false) => {}
            }
        })?;
        settle();
        for load in &mut self.guest.loads {
            load.usually = Expected::allow_if(allowed);
            load.expect(load.usually)?;
        }
        Ok(())
    }

    fn turn_endpoint(&mut self, chance: &mut Chance) -> Result<()> {
        let lives = self.slots.iter().filter_map(Slot::endpoint);
        let candidates: Vec<_> = lives.chain(["server-b"]).map(str::to_owned).collect();
        let name = &candidates[chance.below(candidates.len())];
        let workload = self.scene.mesh.workload(name).context("a workload")?;
        let serves = workload.services.is_empty();
        self.set_endpoint(name, serves)?;
        settle();
        Ok(())
    }

    /// A whole service comes or goes.
    fn turn_passing(&mut self) -> Result<()> {
        if let Some(load) = self.passing.take() {
            self.count("a service is removed");
            load.end(&mut self.totals)?;
            self.scene.change_mesh(|mesh| {
                mesh.services.retain(|service| service.name != "passing");
                if let Some(workload) = mesh.workload("server-a") {
                    workload
                        .services
                        .retain(|name, _| !name.contains("passing"));
                }
            })?;
            return Ok(());
        }
        self.count("a service is added");
        self.scene.change_mesh(|mesh| {
            mesh.services.push(passing());
            if let Some(workload) = mesh.workload("server-a") {
                *workload = workload.clone().serves(&passing(), VIP_PORT, PORT);
            }
        })?;
        settle();
        let to = format!("{PASSING}:{VIP_PORT}");
        let client = &self.scene.client;
        self.passing = Some(Load::start(
            Way::Service,
            client,
            &to,
            PACE,
            Expected::Allow,
        )?);
        Ok(())
    }

    /// The agents go on meanwhile, and so does everything else.
    pub fn restart_control_plane(&mut self) -> Result<()> {
        self.count("the control plane restarts");
        self.note_certificates()?;
        self.scene.control_plane()?.restart()?;
        for agent in self.scene.agents() {
            wait_until(SOON, "the control plane to be found again", || {
                Ok(mesh_status(agent)?.contains(", connected").then_some(()))
            })?;
        }
        settle();
        Ok(())
    }

    /// What needs the agent is refused meanwhile; the rest goes on, and what is denied stays denied.
    pub fn restart_agent(&mut self, node: usize) -> Result<()> {
        self.count("an agent is killed and started anew");
        self.end_streams(|way| way.needs_agent(node))?;
        for load in self.loads().filter(|load| load.way.needs_agent(node)) {
            // Who is denied is denied all the time.
            if load.usually == Expected::Allow {
                load.expect(Expected::Unsure)?;
            }
        }
        self.agent(node).kill()?;
        let log = self.agent(node).log().clone();
        complaints(&log, &mut self.errors, &mut self.warnings);
        let agent = self.node(node).start_agent(self.restarted.clone())?;
        *self.agent_mut(node)? = agent;
        self.agent(node).ready()?;
        settle();
        for load in self.loads().filter(|load| load.way.needs_agent(node)) {
            if load.usually == Expected::Allow {
                load.expect(Expected::Allow)?;
            }
        }
        self.start_streams()
    }

    fn agent_mut(&mut self, node: usize) -> Result<&mut Agent> {
        match node {
            0 => Ok(&mut self.scene.agent1),
            _ => self.scene.agent2_mut(),
        }
    }

    fn loads(&self) -> impl Iterator<Item = &Load> {
        let lives = self.slots.iter().flat_map(Slot::loads);
        let others = self.steady.iter().chain(&self.guest.loads);
        others.chain(&self.passing).chain(lives)
    }

    /// Before the control plane's log ends.
    fn note_certificates(&mut self) -> Result<()> {
        let log = self.scene.control_plane()?.log().lines();
        let issued = log
            .iter()
            .filter(|line| line.text.contains("a certificate was issued"));
        self.certificates += issued.count() as u64;
        Ok(())
    }

    /// How large everything is while nobody is there but those who always are, under their load.
    pub fn measure(&mut self) -> Result<Health> {
        self.empty()?;
        if self.passing.is_some() {
            self.turn_passing()?;
        }
        std::thread::sleep(stretch(GRACE * 4));
        let scene = &self.scene;
        Health::of([
            (&scene.agent1, &scene.node1),
            (scene.agent2()?, &scene.node2),
        ])
    }

    pub fn end(mut self) -> Result<Outcome> {
        self.empty()?;
        self.note_certificates()?;
        self.end_streams(|_| true)?;
        for load in self
            .steady
            .into_iter()
            .chain(self.guest.loads)
            .chain(self.passing)
        {
            load.end(&mut self.totals)?;
        }
        for agent in self.scene.agents() {
            complaints(agent.log(), &mut self.errors, &mut self.warnings);
        }
        let witnessed = self.witnesses.iter();
        Ok(Outcome {
            totals: self.totals,
            changes: self.changes,
            certificates: self.certificates,
            streams: self.exchanged,
            log: self.warnings,
            errors: self.errors,
            witnessed: witnessed
                .flat_map(|witness| witness.events("accepted"))
                .collect(),
        })
    }
}

/// The pairs that always connect.
fn steady(scene: &Scene, remote: &Pod) -> Result<Vec<Load>> {
    let (near, far) = (&scene.server_a, scene.server_b()?);
    let vip = format!("{VIP}:{VIP_PORT}");
    let vip_v6 = format!("[{VIP_V6}]:{VIP_PORT}");
    let may = |way, from: &Pod, to: &str| Load::start(way, from, to, PACE, Expected::Allow);
    let may_not = |way, to: &str| Load::start(way, &scene.intruder, to, PACE, Expected::Deny);
    Ok(vec![
        may(Way::Direct(0), &scene.client, &near.at(PORT))?,
        may(Way::Direct(0), &scene.client, &near.at_v6(PORT)?)?,
        may(Way::Tunnel, &scene.client, &far.at(PORT))?,
        may(Way::Tunnel, &scene.client, &far.at_v6(PORT)?)?,
        may(Way::Tunnel, remote, &near.at(PORT))?,
        may(Way::Service, &scene.client, &vip)?,
        may(Way::Service, remote, &vip_v6)?,
        may_not(Way::Direct(0), &near.at(WITNESS))?,
        may_not(Way::Tunnel, &far.at_v6(WITNESS)?)?,
        may_not(Way::Service, &vip)?,
    ])
}
