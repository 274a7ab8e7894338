//! Pods under load that istio-cni takes into the mesh, and out of it: its rules first, then a word to the agent, in both ways to steer.
//!
//! What istio-cni's rules do to connections that are open already is the kernel's: it rewrites those that nobody tracked before. So the
//! pods under load have a rule of their own for which all is tracked, as many have. Between the rules and the agent's word new
//! connections find nobody, with ztunnel as well: what is judged was open before, or is opened after that word.

use std::time::Duration;

use anyhow::{Context as _, Result};
use culvert_harness::{
    Agent, Pod, Proc, Workload,
    cni_rules::{Backend, shell, unprogram},
};
use culvert_tests::scene::{SOON, answered, connect_to, hold_to, text};
use serde_json::Value;

use crate::{
    as_ztunnel::{Served, Stage, addresses, is_in_the_mesh, serve_both},
    zds::goes_on,
};

/// Between two exchanges of a busy connection.
const PACE: Duration = Duration::from_millis(1);

/// Which way steers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Ebpf,
    Iptables,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Iptables => "iptables",
        }
    }

    /// How pods of a node reach each other.
    fn same_node(self) -> &'static str {
        match self {
            Self::Ebpf => "direct",
            Self::Iptables => "hbone",
        }
    }
}

/// A stage on which only the server of the other node is in the mesh.
struct Ground {
    stage: Stage,
    one: Served,
    _two: Served,
    _servers: [Proc; 2],
}

impl Ground {
    fn new(mode: Mode) -> Result<Self> {
        let mut stage = Stage::new(Vec::new())?;
        let env = [("CULVERT_REDIRECT_MODE", mode.name())];
        let one = stage.served(&stage.node1, &env)?;
        let two = stage.served(&stage.node2, &env)?;
        let servers = [serve_both(&stage.server_a)?, serve_both(&stage.server_b)?];
        stage.join(&two, &stage.server_b)?;
        for served in [&one, &two] {
            assert_eq!(served.cni.snapshot_sent()?, "");
            served.agent.ready()?;
        }
        speak(&mut stage, "server-a", "TCP")?;
        Ok(Self {
            stage,
            one,
            _two: two,
            _servers: servers,
        })
    }

    /// Where the client connects to, in both families, with the path once it is in the mesh.
    fn destinations(&self, mode: Mode) -> Result<Vec<(String, &'static str)>> {
        let near = addresses(&self.stage.server_a)?.map(|to| (to, mode.same_node()));
        let far = addresses(&self.stage.server_b)?.map(|to| (to, "hbone"));
        Ok(near.into_iter().chain(far).collect())
    }

    fn holds(&self) -> Result<Vec<Proc>> {
        let destinations = self.destinations(Mode::Ebpf)?.into_iter();
        destinations
            .map(|(to, _)| hold_to(&self.stage.client, &to))
            .collect()
    }

    fn joins(&self, pod: &Pod) -> Result<()> {
        self.stage.join(&self.one, pod)
    }

    /// As istio-cni does it: its rules first.
    fn leaves(&self, pod: &Pod) -> Result<()> {
        unprogram(pod, Backend::Legacy)?;
        let uid = &self.stage.workload(pod)?.uid;
        assert_eq!(self.one.cni.del(uid)?, "");
        Ok(())
    }
}

/// What istiod says of a pod that has joined or left.
fn speak(stage: &mut Stage, name: &str, protocol: &str) -> Result<()> {
    let workload: &mut Workload = stage.mesh.workload(name).context("a pod of the mesh")?;
    workload.protocol = protocol.to_owned();
    let mark = stage.control_plane.log().mark();
    stage.mesh.write(&Agent::default_mesh_file(&stage.node1))?;
    let nodes = [&stage.node1, &stage.node2];
    stage.control_plane.wait_until_told(mark, &nodes)
}

/// A rule of the pod's own, for which the kernel tracks its connections.
fn track(pod: &Pod) -> Result<()> {
    let rule = "-A INPUT -p tcp -m conntrack --ctstate NEW -j ACCEPT";
    let script = format!("iptables-legacy {rule}\nip6tables-legacy {rule}");
    shell(pod, &script).map(drop)
}

/// Busy connections; every byte is compared.
pub fn busy(from: &Pod, to: &str, pause: Duration) -> Result<Proc> {
    let pause = pause.as_millis().to_string();
    let arguments = ["crowd", "--connections", "8", "--threads", "2"];
    let load = from.probe()?.args(arguments).args(["--pause-ms", &pause]);
    let load = load.args(["--to", to]).stdin().spawn()?;
    let open = load.wait_for_event("open", SOON * 2)?;
    assert_eq!(open["failures"], 0, "{open}");
    Ok(load)
}

pub fn nothing_lost(load: &Proc) -> Result<()> {
    load.close_stdin();
    let report: Value = load.wait_for_event("done", SOON * 2)?;
    assert_eq!(report["failures"], 0, "{report}");
    assert_eq!(report["lost"], 0, "{report}");
    assert!(report["count"].as_u64() > Some(8), "{report}");
    Ok(())
}

fn all_go_on(held: &[Proc], word: &str) -> Result<()> {
    held.iter().try_for_each(|held| {
        let told = goes_on(held, word);
        told.with_context(|| format!("`{word}`: {}", held.log().tail()))
    })
}

fn join_and_leave_under_load(mode: Mode) -> Result<()> {
    let mut ground = Ground::new(mode)?;
    let (client, server) = (ground.stage.client.clone(), ground.stage.server_a.clone());
    track(&client)?;
    track(&server)?;
    let destinations = ground.destinations(mode)?;
    let mut loads = Vec::new();
    for (to, _) in &destinations {
        loads.push(busy(&client, to, PACE)?);
    }
    let outside = ground.holds()?;
    all_go_on(&outside, "nobody is in")?;

    ground.joins(&server)?;
    speak(&mut ground.stage, "server-a", "HBONE")?;
    all_go_on(&outside, "the server is in")?;
    ground.joins(&client)?;
    all_go_on(&outside, "both are in")?;
    for (to, path) in &destinations {
        // The kernel part learns from the first one.
        assert!(answered(&connect_to(
            &client,
            to,
            &["--send", "hello", "--read", "5"]
        )?));
        is_in_the_mesh(&ground.one.agent, &client, to, path)?;
    }
    let inside = ground.holds()?;
    all_go_on(&inside, "in the mesh")?;
    let mut busy_inside = Vec::new();
    for (to, _) in &destinations {
        busy_inside.push(busy(&client, to, PACE)?);
    }

    ground.leaves(&client)?;
    speak(&mut ground.stage, "server-a", "TCP")?;
    all_go_on(&outside, "the client is out")?;
    all_go_on(&inside, "the client is out")?;
    ground.leaves(&server)?;
    all_go_on(&outside, "both are out")?;
    all_go_on(&inside, "both are out")?;
    for load in loads.iter().chain(&busy_inside) {
        nothing_lost(load)?;
    }
    for (to, _) in &destinations {
        let report = connect_to(&client, to, &["--send", "hello", "--read", "5"])?;
        assert!(answered(&report), "{to}: {report}");
    }
    Ok(())
}

#[test]
fn pods_under_load_join_and_leave_by_istio_cni_without_a_byte_lost() -> Result<()> {
    join_and_leave_under_load(Mode::Ebpf)
}

#[test]
fn pods_under_load_join_and_leave_without_a_byte_lost_where_istio_cni_s_rules_steer() -> Result<()>
{
    join_and_leave_under_load(Mode::Iptables)
}

/// Connections that nobody tracks, and that say nothing while istio-cni is at work; returns those that go on afterwards.
fn untracked_ones_that_go_on(mode: Mode) -> Result<usize> {
    let ground = Ground::new(mode)?;
    let held = ground.holds()?;
    all_go_on(&held, "before")?;
    ground.joins(&ground.stage.server_a)?;
    ground.joins(&ground.stage.client)?;
    let mut alive = 0;
    for held in &held {
        let mark = held.log().mark();
        held.send_line("after")?;
        let pick = |line: &culvert_harness::log::Line| {
            let event: Value = serde_json::from_str(&line.text).ok()?;
            let name = text(&event, "event").to_owned();
            ["data", "end"].contains(&name.as_str()).then_some(name)
        };
        let came = held.log().wait_for(mark, SOON, "what comes", pick)?;
        alive += usize::from(came == "data");
    }
    Ok(alive)
}

#[test]
fn what_nobody_tracked_goes_on_once_istio_cni_s_rules_are_taken_over() -> Result<()> {
    assert_eq!(untracked_ones_that_go_on(Mode::Ebpf)?, 4);
    Ok(())
}

#[test]
fn twin_where_the_rules_stay_the_kernel_ends_what_nobody_tracked() -> Result<()> {
    assert_eq!(untracked_ones_that_go_on(Mode::Iptables)?, 0);
    Ok(())
}
