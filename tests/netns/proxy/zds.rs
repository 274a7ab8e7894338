//! Pods enrolled by istio-cni: its protocol over a real socket, with what it may say and what nobody should.

use std::{fs::File, os::fd::AsRawFd as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use culvert_harness::{
    Agent, AgentOptions, Fabric, Mesh, Node, Pod, Proc, Workload, ZdsAgent, ZdsPod, ZdsServer,
    wait_until, zds::add_message,
};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, answered, connect, echo, hold, serve, status, text,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::enrolment_under_load::{busy, nothing_lost};

/// One node whose agent is told by istio-cni, with a client and a server that nobody has enrolled yet.
struct Stage {
    mesh: Mesh,
    agent: Agent,
    server: Pod,
    client: Pod,
    cni: ZdsServer,
    node: Node,
    // Last, so that it takes everything down when all else is gone.
    fabric: Fabric,
}

fn socket(node: &Node) -> PathBuf {
    node.directory().join("ztunnel.sock")
}

fn options(node: &Node, knobs: &str) -> AgentOptions {
    let mut options = AgentOptions::default();
    let path = socket(node).to_string_lossy().into_owned();
    options.env.insert("INPOD_UDS".to_owned(), path);
    if !knobs.is_empty() {
        let name = "CULVERT_TEST_KNOBS".to_owned();
        options.env.insert(name, knobs.to_owned());
    }
    options
}

impl Stage {
    fn new() -> Result<Self> {
        Self::served_by("", ZdsServer::listen)
    }

    /// Another node with a pod in the mesh, of which the agent has heard.
    fn other_node(&mut self) -> Result<(Agent, Pod)> {
        let node = self.fabric.node()?;
        let pod = node.pod("far")?;
        let workload = Workload::of_pod(&pod, NAMESPACE, "far");
        self.mesh.workloads.push(workload.clone());
        self.mesh.write(&Agent::default_mesh_file(&self.node))?;
        let agent = node.start_agent(AgentOptions::default())?;
        agent.ready()?;
        agent.enrol_as(&pod, &workload)?;
        wait_until(SOON, "the agent to hear of the other pod", || {
            let known = status(&self.agent)?["workloads"].as_u64();
            Ok((known == Some(3)).then_some(()))
        })?;
        Ok((agent, pod))
    }

    fn served_by(
        knobs: &str,
        listen: impl FnOnce(&std::path::Path) -> Result<ZdsServer>,
    ) -> Result<Self> {
        let fabric = Fabric::new()?;
        let node = fabric.node()?;
        let client = node.pod("client")?;
        let server = node.pod("server")?;
        let workloads = [&client, &server].map(|pod| Workload::of_pod(pod, NAMESPACE, pod.name()));
        let mesh = Mesh {
            workloads: workloads.to_vec(),
            ..Mesh::default()
        };
        mesh.write(&Agent::default_mesh_file(&node))?;
        let cni = listen(&socket(&node))?;
        let agent = node.start_agent(options(&node, knobs))?;
        Ok(Self {
            mesh,
            agent,
            server,
            client,
            cni,
            node,
            fabric,
        })
    }

    fn workload(&self, pod: &Pod) -> Result<&Workload> {
        let mut all = self.mesh.workloads.iter();
        let found = all.find(|workload| workload.name == pod.name());
        found.context("a pod of the mesh")
    }

    fn add(&self, cni: &ZdsAgent, pod: &Pod) -> Result<String> {
        cni.add(&ZdsPod::of(self.workload(pod)?), pod)
    }

    /// A connection over which both pods were named.
    fn told(&self) -> Result<ZdsAgent> {
        let cni = self.cni.accept(SOON)?;
        for pod in [&self.client, &self.server] {
            assert_eq!(self.add(&cni, pod)?, "");
        }
        assert_eq!(cni.snapshot_sent()?, "");
        self.agent.ready()?;
        Ok(cni)
    }

    fn pods(&self, agent: &Agent) -> Result<Vec<(String, String)>> {
        let listed = agent.cli(["pod", "list", "--json"])?.success()?;
        let listed: Vec<Value> = serde_json::from_str(&listed)?;
        let told = |pod: &Value| (text(pod, "uid").to_owned(), text(pod, "state").to_owned());
        Ok(listed.iter().map(told).collect())
    }

    fn wait_for_pods(&self, agent: &Agent, expected: &[(&str, &str)]) -> Result<()> {
        let mut expected: Vec<(String, String)> = expected
            .iter()
            .map(|(uid, state)| ((*uid).to_owned(), (*state).to_owned()))
            .collect();
        expected.sort();
        let mut last = Vec::new();
        let waited = wait_until(SOON, "the list of pods", || {
            last = self.pods(agent)?;
            last.sort();
            Ok((last == expected).then_some(()))
        });
        waited.with_context(|| format!("{last:?}, not {expected:?}"))
    }

    fn unready(&self) -> Result<String> {
        wait_until(SOON, "the agent not to be ready", || {
            let ready = self.agent.get(15021, "/healthz/ready");
            Ok(ready
                .ok()
                .filter(|ready| ready.status == 500)
                .map(|ready| ready.body))
        })
    }

    fn descriptors(&self) -> Result<usize> {
        let pid = self.agent.process().pid();
        Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    }
}

pub fn goes_on(held: &Proc, word: &str) -> Result<()> {
    let mark = held.log().mark();
    held.send_line(word)?;
    let data = held.wait_for_event_after(mark, "data", SOON)?;
    assert_eq!(text(&data, "data"), format!("{word}\n"));
    Ok(())
}

#[test]
fn pods_named_by_istio_cni_are_in_the_mesh_until_they_leave() -> Result<()> {
    let stage = Stage::new()?;
    let _server = serve(&stage.server, "echo")?;
    let cni = stage.cni.accept(SOON)?;
    assert!(stage.unready()?.contains("istio-cni"));
    for pod in [&stage.client, &stage.server] {
        assert_eq!(stage.add(&cni, pod)?, "");
    }
    assert!(stage.unready()?.contains("istio-cni"));
    assert_eq!(cni.snapshot_sent()?, "");
    stage.agent.ready()?;
    let mark = stage.agent.log().mark();
    assert!(answered(&echo(&stage.client, &stage.server)?));
    let identity = format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/client");
    let fields = [("src.identity", identity.as_str())];
    stage.agent.wait_for_access(mark, &fields, SOON)?;
    let active = "workload_manager_active_proxy_count";
    assert_eq!(stage.agent.metric(active, &[])?, 2.0);
    // The same again changes nothing.
    assert_eq!(stage.add(&cni, &stage.client)?, "");
    let uid = stage.workload(&stage.client)?.uid.clone();
    for _ in 0..2 {
        assert_eq!(cni.del(&uid)?, "");
    }
    stage.wait_for_pods(
        &stage.agent,
        &[(&stage.workload(&stage.server)?.uid, "active")],
    )?;
    Ok(())
}

#[test]
fn a_lost_connection_keeps_the_pods_and_the_next_snapshot_counts() -> Result<()> {
    let stage = Stage::new()?;
    let _server = serve(&stage.server, "echo")?;
    let manual = stage.node.pod("manual")?;
    stage
        .agent
        .enrol(&manual, "manual", NAMESPACE, "manual", "manual")
        .or_else(|_| {
            // The admin socket may come a moment after the first connection.
            wait_until(SOON, "the admin socket", || {
                let done = stage
                    .agent
                    .enrol(&manual, "manual", NAMESPACE, "manual", "manual");
                Ok(done.ok())
            })
        })?;
    let cni = stage.told()?;
    assert!(answered(&echo(&stage.client, &stage.server)?));
    let (client, server) = (
        stage.workload(&stage.client)?.uid.clone(),
        stage.workload(&stage.server)?.uid.clone(),
    );
    drop(cni);
    assert!(stage.unready()?.contains("istio-cni"));
    assert!(answered(&echo(&stage.client, &stage.server)?));
    let cni = stage.cni.accept(SOON)?;
    assert_eq!(cni.keep(&server)?, "");
    assert_eq!(cni.keep("not-here")?, "");
    let all = [
        (client.as_str(), "active"),
        (&server, "active"),
        ("manual", "active"),
    ];
    stage.wait_for_pods(&stage.agent, &all)?;
    assert_eq!(cni.snapshot_sent()?, "");
    stage.wait_for_pods(&stage.agent, &all[1..])?;
    // Nor can istio-cni release what is not its own.
    assert_eq!(cni.del("manual")?, "");
    stage.wait_for_pods(&stage.agent, &all[1..])?;
    stage.agent.ready()
}

#[test]
fn the_same_uid_in_another_namespace_begins_anew() -> Result<()> {
    let stage = Stage::new()?;
    let cni = stage.told()?;
    let uid = stage.workload(&stage.server)?.uid.clone();
    let (address, workload) = (
        stage.server.address(),
        stage.workload(&stage.server)?.clone(),
    );
    stage.server.remove()?;
    let std::net::IpAddr::V4(address) = address else {
        anyhow::bail!("an IPv4 address");
    };
    let options = culvert_harness::PodOptions {
        address: Some(address),
        ..culvert_harness::PodOptions::default()
    };
    let successor = stage.node.pod_with("successor", options)?;
    let _server = serve(&successor, "echo")?;
    assert_eq!(cni.add(&ZdsPod::of(&workload), &successor)?, "");
    assert!(answered(&echo(&stage.client, &successor)?));
    let listed = stage.agent.cli(["pod", "list", "--json"])?.success()?;
    let cookie = successor.netns().cookie()?;
    assert!(listed.contains(&cookie.to_string()), "{listed}");
    assert_eq!(stage.pods(&stage.agent)?.len(), 2);
    assert_eq!(cni.del(&uid)?, "");
    Ok(())
}

#[test]
fn a_pod_that_cannot_be_enrolled_is_complained_of_and_tried_again() -> Result<()> {
    let stage = Stage::new()?;
    let cni = stage.cni.accept(SOON)?;
    // Somebody has one of the agent's ports.
    let taker = culvert_tests::scene::serve_on(&stage.server, "echo", 15008)?;
    let complaint = stage.add(&cni, &stage.server)?;
    assert!(complaint.contains("15008"), "{complaint}");
    assert_eq!(stage.add(&cni, &stage.client)?, "", "others are served");
    assert_eq!(cni.snapshot_sent()?, "");
    let server = stage.workload(&stage.server)?.uid.clone();
    assert!(stage.unready()?.contains(&server));
    let pending = "workload_manager_pending_proxy_count";
    assert_eq!(stage.agent.metric(pending, &[])?, 1.0);
    drop(taker);
    stage.agent.ready()?;
    assert_eq!(stage.agent.metric(pending, &[])?, 0.0);
    Ok(())
}

#[test]
fn what_istio_cni_would_never_send_is_refused_and_closed() -> Result<()> {
    let stage = Stage::new()?;
    let cni = stage.told()?;
    let netns = File::open(stage.server.netns().path())?;
    let file = File::open("/etc/hostname")?;
    let mount = File::open("/proc/self/ns/mnt")?;
    let own = File::open(stage.node.netns().path())?;
    let workload = stage.workload(&stage.server)?.clone();
    let pod = ZdsPod {
        uid: "another",
        ..ZdsPod::of(&workload)
    };
    let add = add_message(&pod);
    let netns = netns.as_raw_fd();
    let many = vec![netns; 253];
    let before = stage.descriptors()?;
    let hostile: [(&str, &[u8], &[i32]); 12] = [
        ("no descriptor", &add, &[]),
        ("two descriptors", &add, &[netns, netns]),
        ("all that fit", &add, &many),
        ("a file", &add, &[file.as_raw_fd()]),
        ("another namespace", &add, &[mount.as_raw_fd()]),
        ("the agent's own", &add, &[own.as_raw_fd()]),
        ("that of another pod", &add, &[netns]),
        ("a descriptor too much", &[0x1a, 0], &[netns]),
        ("nothing known", &[0x7a, 0], &[]),
        ("half a message", &add[..add.len() / 2], &[netns]),
        ("a long message", &[0x0a; 2000], &[netns]),
        ("no uid", &[0x0a, 0], &[netns]),
    ];
    for (name, message, descriptors) in hostile {
        let complaint = cni.tell(message, descriptors)?;
        assert!(!complaint.is_empty(), "{name}");
    }
    assert_eq!(cni.del("another")?, "");
    wait_until(SOON, "all descriptors to be closed", || {
        Ok((stage.descriptors()? <= before).then_some(()))
    })?;
    let _server = serve(&stage.server, "echo")?;
    assert!(answered(&echo(&stage.client, &stage.server)?));
    stage.agent.ready()
}

fn told_by_somebody(knobs: &str) -> Result<(Stage, Result<ZdsAgent>)> {
    const NOBODY: u32 = 65534;
    let stage = Stage::served_by(knobs, |path| ZdsServer::listen_as(path, NOBODY))?;
    let cni = stage.cni.accept(SOON);
    Ok((stage, cni))
}

#[test]
fn only_root_can_be_istio_cni() -> Result<()> {
    let (stage, cni) = told_by_somebody("")?;
    assert!(cni.is_err(), "it says hello");
    assert!(stage.unready()?.contains("not by root"));
    Ok(())
}

#[test]
fn twin_without_the_check_anybody_can_be_istio_cni() -> Result<()> {
    let (stage, cni) = told_by_somebody("skip-cni-credentials")?;
    assert_eq!(stage.add(&cni?, &stage.server)?, "");
    Ok(())
}

#[test]
fn a_pod_that_has_ended_without_a_word_is_cleaned_up() -> Result<()> {
    let stage = Stage::new()?;
    let cni = stage.told()?;
    let server = stage.workload(&stage.server)?.uid.clone();
    // Its namespace ends between istio-cni's message and the agent's work: only the descriptor holds it.
    let passing = stage.node.pod("passing")?;
    let netns = File::open(passing.netns().path())?;
    passing.remove()?;
    let pod = ZdsPod {
        uid: "passing",
        name: "passing",
        namespace: NAMESPACE,
        service_account: "passing",
    };
    let complaint = cni.tell(&add_message(&pod), &[netns.as_raw_fd()])?;
    assert!(complaint.contains("passing"), "{complaint}");
    drop(netns);
    let client = stage.workload(&stage.client)?.uid.clone();
    stage.client.remove()?;
    stage.wait_for_pods(&stage.agent, &[(&server, "active")])?;
    stage
        .agent
        .log()
        .lines()
        .iter()
        .find(|line| line.text.contains(&client) && line.text.contains("no network device"))
        .context("the reason in the log")?;
    stage.agent.ready()
}

#[test]
fn an_agent_that_comes_back_takes_its_pods_back_when_they_are_named() -> Result<()> {
    let stage = Stage::new()?;
    let _server = serve(&stage.server, "echo")?;
    let cni = stage.told()?;
    assert!(answered(&echo(&stage.client, &stage.server)?));
    let held = hold(&stage.client, &stage.server)?;
    goes_on(&held, "before")?;
    stage.agent.stop(Signal::SIGKILL)?;
    drop(cni);
    let agent = stage.node.start_agent(options(&stage.node, ""))?;
    let cni = stage.cni.accept(SOON)?;
    let (client, server) = (
        stage.workload(&stage.client)?.uid.clone(),
        stage.workload(&stage.server)?.uid.clone(),
    );
    stage.wait_for_pods(&agent, &[(&client, "pending"), (&server, "pending")])?;
    goes_on(&held, "while they wait")?;
    assert_eq!(stage.add(&cni, &stage.client)?, "");
    assert_eq!(stage.add(&cni, &stage.server)?, "");
    assert_eq!(cni.snapshot_sent()?, "");
    agent.ready()?;
    goes_on(&held, "after")?;
    assert!(answered(&echo(&stage.client, &stage.server)?));
    // And one that comes back to fewer lets the others go.
    agent.stop(Signal::SIGKILL)?;
    drop(cni);
    let agent = stage.node.start_agent(options(&stage.node, ""))?;
    let cni = stage.cni.accept(SOON)?;
    assert_eq!(stage.add(&cni, &stage.server)?, "");
    assert_eq!(cni.snapshot_sent()?, "");
    agent.ready()?;
    stage.wait_for_pods(&agent, &[(&server, "active")])?;
    let rules = stage.client.command("ip").args(["rule"]).run(SOON)?;
    assert!(!rules.success()?.contains("fwmark"));
    Ok(())
}

#[test]
fn tunnels_of_an_agent_in_an_upgrade_carry_until_its_drain_ends() -> Result<()> {
    let mut stage = Stage::new()?;
    let (_far_agent, far) = stage.other_node()?;
    let _servers = (serve(&stage.server, "echo")?, serve(&far, "echo")?);
    let _old = stage.told()?;
    let by_tunnel = |agent: &Agent| -> Result<()> {
        let mark = agent.log().mark();
        assert!(answered(&echo(&stage.client, &far)?));
        let to = far.at(PORT);
        let fields = [("dst.hbone_addr", to.as_str()), ("path", "hbone")];
        agent.wait_for_access(mark, &fields, SOON).map(drop)
    };
    by_tunnel(&stage.agent)?;
    let mark = stage.agent.log().mark();
    // One that the old agent carries out of the node, and one that it carries into it.
    let held = [hold(&stage.client, &far)?, hold(&far, &stage.server)?];
    let all_go_on = |word: &str| held.iter().try_for_each(|held| goes_on(held, word));
    all_go_on("before")?;

    let agent = stage.node.start_agent(options(&stage.node, ""))?;
    let new = stage.cni.accept(SOON)?;
    let taken_over = "another agent has taken the kernel part over";
    stage.agent.process().wait_for_line(taken_over, SOON)?;
    all_go_on("taken over")?;
    for pod in [&stage.client, &stage.server] {
        assert_eq!(stage.add(&new, pod)?, "");
    }
    assert_eq!(new.snapshot_sent()?, "");
    agent.ready()?;
    all_go_on("the new one is ready")?;
    by_tunnel(&agent)?;
    assert!(answered(&echo(&far, &stage.server)?));
    all_go_on("beside those of the new one")?;

    // Its drain ends, and only then what it carries.
    let drained = "another agent serves this node";
    assert!(!stage.agent.log().contains(drained));
    stage.agent.process().wait_for_line(drained, SOON * 3)?;
    for held in &held {
        held.wait_for_event("end", SOON)?;
    }
    for direction in ["outbound", "inbound"] {
        let fields = [("path", "hbone"), ("direction", direction)];
        let line = stage.agent.wait_for_access(mark, &fields, SOON)?;
        let sent = line.field("bytes_sent").unwrap_or_default();
        assert!(sent.parse::<u64>()? > 40, "{}", line.text);
    }
    by_tunnel(&agent)?;
    stage.agent.stop(Signal::SIGTERM)?;
    by_tunnel(&agent)?;
    agent.ready()
}

/// What brings answers back to the agent is never missing in the pods while a new one takes them over.
#[test]
fn busy_tunnels_go_on_while_new_agents_take_their_pods_over() -> Result<()> {
    let mut stage = Stage::new()?;
    let (_far_agent, far) = stage.other_node()?;
    let _servers = (serve(&stage.server, "echo")?, serve(&far, "echo")?);
    let _old = stage.told()?;
    let pairs = [(&stage.client, &far), (&far, &stage.server)];
    let loads: Vec<Proc> = pairs
        .into_iter()
        .map(|(from, to)| busy(from, &to.at(PORT), Duration::ZERO))
        .collect::<Result<_>>()?;
    // What leads steered connections to the agent: without it they would be sent out of the pod as they are.
    let watched: Vec<Proc> = [&stage.client, &stage.server]
        .into_iter()
        .map(|pod| pod.command("ip").args(["monitor", "rule", "route"]).spawn())
        .collect::<Result<_>>()?;
    let mut agents = Vec::new();
    for _ in 0..3 {
        let agent = stage.node.start_agent(options(&stage.node, ""))?;
        let new = stage.cni.accept(SOON)?;
        for pod in [&stage.client, &stage.server] {
            assert_eq!(stage.add(&new, pod)?, "");
        }
        assert_eq!(new.snapshot_sent()?, "");
        agent.ready()?;
        agents.push((agent, new));
    }
    loads.iter().try_for_each(nothing_lost)?;
    for watched in &watched {
        assert!(
            !watched.log().contains("Deleted"),
            "{}",
            watched.log().tail()
        );
    }
    Ok(())
}

#[test]
fn two_agents_in_an_upgrade_each_serve_what_they_were_told() -> Result<()> {
    let stage = Stage::new()?;
    let _server = serve(&stage.server, "echo")?;
    let late = stage.node.pod("late")?;
    let old = stage.told()?;
    // The next connection of the pair is direct.
    assert!(answered(&echo(&stage.client, &stage.server)?));
    let held = hold(&stage.client, &stage.server)?;
    goes_on(&held, "before")?;
    // The new one says hello while the old one is still there; from now on it is the one that is told of new pods.
    let agent = stage.node.start_agent(options(&stage.node, ""))?;
    let new = stage.cni.accept(SOON)?;
    for pod in [&stage.client, &stage.server] {
        assert_eq!(stage.add(&new, pod)?, "");
    }
    let pod = ZdsPod {
        uid: "late",
        name: "late",
        namespace: NAMESPACE,
        service_account: "late",
    };
    assert_eq!(new.add(&pod, &late)?, "");
    assert_eq!(new.snapshot_sent()?, "");
    agent.ready()?;
    goes_on(&held, "during")?;
    assert!(answered(&connect(
        &stage.client,
        &stage.server,
        &["--send", "hello", "--read", "5"]
    )?));
    // All are told of what leaves; what the old one does then is no harm to the new one's.
    let client = stage.workload(&stage.client)?.uid.clone();
    let server = stage.workload(&stage.server)?.uid.clone();
    for cni in [&old, &new] {
        // The old one may have ended by now.
        let _ = cni.del("late");
    }
    stage.wait_for_pods(&agent, &[(&client, "active"), (&server, "active")])?;
    // The old one stays until kubelet ends it, which would start it anew at once otherwise.
    stage
        .agent
        .process()
        .wait_for_line("another agent serves this node", SOON * 3)?;
    assert!(stage.agent.process().status().is_none());
    stage.agent.stop(Signal::SIGTERM)?;
    goes_on(&held, "after")?;
    assert!(answered(&echo(&stage.client, &stage.server)?));
    assert!(stage.cni.is_left_alone(Duration::from_millis(500)));
    agent.ready()
}
