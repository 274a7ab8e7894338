//! What applications notice when the agent is killed and another one comes: nothing.

use anyhow::Result;
use culvert_harness::{Agent, Pod, Proc, culvert_binary, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, answered, echo, serve};
use serde_json::Value;

use crate::{
    kernel_tables::{decisions, flows},
    restart::start,
};

/// Direct flows under load.
const CROWD: usize = 1000;

/// Many busy connections; what is sent is compared with what comes back.
fn crowd(from: &Pod, to: &Pod) -> Result<Proc> {
    let arguments = ["crowd", "--to", &to.at(PORT), "--connections", "1000"];
    let load = from.probe()?.args(arguments).stdin().spawn()?;
    let open = load.wait_for_event("open", SOON * 2)?;
    assert_eq!(open["failures"], 0, "{open}");
    Ok(load)
}

/// Connections one after the other, on two threads.
pub fn churn(from: &Pod, to: &Pod) -> Result<Proc> {
    let arguments = ["churn", "--to", &to.at(PORT)];
    let load = from.probe()?.args(arguments).stdin().spawn()?;
    load.wait_for_event("open", SOON)?;
    Ok(load)
}

/// Ends a load and returns what it came to.
pub fn end(load: &Proc) -> Result<Value> {
    load.close_stdin();
    load.wait_for_event("done", SOON * 2)
}

pub fn nothing_lost(report: &Value) {
    assert_eq!(report["failures"], 0, "{report}");
    assert_eq!(report["lost"], 0, "{report}");
    assert!(report["count"].as_u64() > Some(0), "{report}");
}

/// `culvert flows`, following.
fn following(scene: &Scene) -> Result<Proc> {
    let socket = scene.node1.directory().join("admin.sock");
    let command = scene.node1.command(culvert_binary()?);
    let command = command.args(["flows", "--json", "--recent", "512", "--admin-socket"]);
    command.arg(socket).spawn()
}

#[test]
fn a_thousand_busy_flows_lose_nothing_when_the_agent_is_killed() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let load = crowd(&scene.client, &scene.server_a)?;
    assert_eq!(flows(&scene.node1)?.len(), CROWD);
    let before = decisions(&scene.agent1, "direct")?;
    assert!(before >= CROWD as u64);
    scene.agent1.kill()?;
    let agent = start(&scene.node1, "")?;
    agent.ready()?;
    assert_eq!(flows(&scene.node1)?.len(), CROWD);
    assert!(decisions(&agent, "direct")? >= before);
    wait_until(SOON, "the flows to be counted again", || {
        let open = agent.metric("culvert_open_flows", &["path=\"direct\""])?;
        Ok((open as usize == CROWD).then_some(()))
    })?;
    let shown = following(&scene)?;
    // As many as the agent keeps for those who come later.
    wait_until(SOON, "the flows to be shown again", || {
        let opened = shown.events("opened");
        let direct = opened
            .iter()
            .filter(|event| event["flow"]["path"] == "direct");
        Ok((direct.count() >= 256).then_some(()))
    })?;
    let report = end(&load)?;
    nothing_lost(&report);
    println!("{report}");
    wait_until(SOON, "the ends to be reported", || {
        let closed = agent.metric(
            "istio_tcp_connections_closed_total",
            &["reporter=\"source\""],
        )?;
        Ok((closed >= CROWD as f64).then_some(()))
    })
}

/// Connections that were steered so far, whichever agent was there.
fn steered(agent: &Agent) -> Result<u64> {
    let metrics = agent.metrics()?;
    let lines = metrics.lines();
    let counts = lines
        .filter(|line| line.starts_with("culvert_kernel_decisions_total{reason=\"steered_"))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok());
    Ok(counts.sum())
}

/// A few connections are steered when a new agent's verdicts come into force. Such a one ends with its agent, which is among the README's
/// limits: waits until all have ended that were steered after the first `before`, and returns how many there are now.
fn carries_nothing(agent: &Agent, before: u64) -> Result<u64> {
    wait_until(SOON, "the agent's own connections to end", || {
        let steered = steered(agent)?;
        let lines = agent.log().lines();
        let ended = lines
            .iter()
            .filter(|line| line.text.contains("not_direct=\"steered_"));
        Ok((before + ended.count() as u64 == steered).then_some(steered))
    })
}

#[test]
fn agents_that_come_and_go_under_load_refuse_nobody_and_admit_nobody_else() -> Result<()> {
    let mut scene = Scene::new()?;
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    let allowed = churn(&scene.client, &scene.server_a)?;
    let denied = churn(&scene.intruder, &scene.server_a)?;
    let mut before = 0;
    for _ in 0..5 {
        before = carries_nothing(&scene.agent1, before)?;
        scene.agent1.kill()?;
        scene.agent1 = start(&scene.node1, "")?;
        scene.agent1.ready()?;
    }
    let report = end(&denied)?;
    assert_eq!(report["count"], 0, "{report}");
    nothing_lost(&end(&allowed)?);
    drop(server);
    Ok(())
}
