//! The agent stops or dies: what needs it is refused, what does not need it goes on.

use anyhow::Result;
use culvert_harness::{Agent, AgentOptions, Proc, wait_until};
use culvert_tests::scene::{
    PORT, SOON, Scene, Setting, answered, connect_to, echo, hold, serve, text,
};
use nix::sys::signal::Signal;
use serde_json::Value;

const MARKER: &str = "culvert-plaintext-marker";

/// An established direct flow, held open.
fn hold_direct(scene: &Scene) -> Result<(Proc, Proc)> {
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let held = hold(&scene.client, &scene.server_a)?;
    goes_on(&held, "established")?;
    Ok((held, server))
}

/// A word goes to the server and comes back.
pub fn goes_on(held: &Proc, word: &str) -> Result<()> {
    let mark = held.log().mark();
    held.send_line(word)?;
    let data = held.wait_for_event_after(mark, "data", SOON)?;
    assert_eq!(text(&data, "data"), format!("{word}\n"));
    Ok(())
}

/// What works without the agent, and what must not.
fn without_agent(scene: &Scene, held: &Proc) -> Result<()> {
    goes_on(held, "the agent is gone")?;
    assert!(
        answered(&echo(&scene.client, &scene.server_a)?),
        "a cached verdict admits"
    );
    let (report, leaked) = reach_the_other_node(scene)?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    assert!(!leaked, "plaintext left the node");
    Ok(())
}

/// Sends a marker to a pod of the other node; tells whether it passed in clear.
fn reach_the_other_node(scene: &Scene) -> Result<(Value, bool)> {
    let capture = scene.fabric.capture()?;
    let report = connect_to(
        &scene.client,
        &scene.server_b()?.at(PORT),
        &["--send", MARKER, "--read", "5"],
    )?;
    Ok((report, capture.contains(MARKER.as_bytes())?))
}

#[test]
fn a_killed_agent_takes_no_direct_flow_with_it() -> Result<()> {
    let scene = Scene::with(Setting {
        both_agents: true,
        ..Setting::default()
    })?;
    let (held, _server) = hold_direct(&scene)?;
    scene.agent1.kill()?;
    without_agent(&scene, &held)
}

#[test]
fn a_stopped_agent_takes_no_direct_flow_with_it() -> Result<()> {
    let scene = Scene::with(Setting {
        env: vec![("TERMINATION_GRACE_PERIOD_SECONDS", "6s".into())],
        both_agents: true,
        ..Setting::default()
    })?;
    let (held, _server) = hold_direct(&scene)?;
    let status = scene.agent1.stop(Signal::SIGTERM)?;
    assert!(status.success(), "{status}");
    without_agent(&scene, &held)
}

/// No agent, and a client that wants to reach another node.
fn reach_without_an_agent(scene: &Scene) -> Result<(Value, bool)> {
    let _server = serve(scene.server_b()?, "echo")?;
    scene.agent1.kill()?;
    reach_the_other_node(scene)
}

#[test]
fn without_the_agent_nothing_leaves_in_plaintext() -> Result<()> {
    let (report, leaked) = reach_without_an_agent(&Scene::new()?)?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    assert!(!leaked);
    Ok(())
}

#[test]
fn twin_without_steering_the_marker_leaves_in_plaintext() -> Result<()> {
    // The other node must let it in, or it might not be sent at all.
    let (report, leaked) = reach_without_an_agent(&Scene::without("skip-steering,skip-policy")?)?;
    assert!(leaked, "{report}");
    Ok(())
}

/// A server whose agent has gone, and a pod that nobody enrolled.
fn reach_an_unserved_pod(scene: &Scene) -> Result<Value> {
    let _server = serve(&scene.server_a, "echo")?;
    let outsider = scene.node1.pod("outsider")?;
    scene.agent1.kill()?;
    connect_to(
        &outsider,
        &scene.server_a.at(PORT),
        &["--send", "hello", "--read", "5"],
    )
}

#[test]
fn without_the_agent_a_pod_is_not_reached_from_outside() -> Result<()> {
    let report = reach_an_unserved_pod(&Scene::new()?)?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    Ok(())
}

#[test]
fn twin_without_the_guards_a_pod_is_reached_from_outside() -> Result<()> {
    let report = reach_an_unserved_pod(&Scene::without("missing-listener-passes,skip-isolation")?)?;
    assert!(answered(&report), "{report}");
    Ok(())
}

#[test]
fn verdicts_end_some_time_after_the_agent() -> Result<()> {
    let scene = Scene::with(Setting {
        env: vec![("CULVERT_VERDICT_MAX_AGE", "2s".into())],
        ..Setting::default()
    })?;
    let (held, _server) = hold_direct(&scene)?;
    scene.agent1.kill()?;
    wait_until(SOON, "cached verdicts to end", || {
        let report = echo(&scene.client, &scene.server_a)?;
        Ok((text(&report, "connect") == "ECONNREFUSED").then_some(()))
    })?;
    goes_on(&held, "still open")
}

/// Another agent on the first node, with its pods enrolled.
fn start_again(scene: &Scene) -> Result<Agent> {
    let agent = scene.node1.start_agent(AgentOptions::default())?;
    agent.ready()?;
    for pod in [&scene.client, &scene.server_a, &scene.intruder] {
        agent.enrol_as(pod, scene.workload(pod)?)?;
    }
    Ok(agent)
}

#[test]
fn a_new_agent_takes_over_from_a_killed_one() -> Result<()> {
    let scene = Scene::new()?;
    let (held, server) = hold_direct(&scene)?;
    let _other = serve(scene.server_b()?, "echo")?;
    scene.agent1.kill()?;
    let agent = start_again(&scene)?;
    goes_on(&held, "under the new agent")?;
    for _ in 0..2 {
        assert!(answered(&echo(&scene.client, &scene.server_a)?));
        assert!(answered(&echo(&scene.client, scene.server_b()?)?));
        assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    }
    // Events that the killed agent had not read are the new one's, hence "at least".
    wait_until(SOON, "the direct flow to be reported", || {
        Ok((agent.metric("culvert_flows_total", &["path=\"direct\""])? >= 1.0).then_some(()))
    })?;

    // The old flow is the new agent's to cut.
    let mut mesh = scene.mesh.clone();
    mesh.policies = vec![culvert_tests::scene::only("nobody")];
    mesh.write(&scene.mesh_file())?;
    let end = held.wait_for_event("end", SOON)?;
    assert!(
        ["ECONNRESET", "ECONNABORTED"].contains(&text(&end, "how")),
        "{end}"
    );
    drop(server);
    Ok(())
}

#[test]
fn a_new_agent_makes_old_verdicts_void() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    scene.agent1.kill()?;
    // What was allowed before is not now; nobody has told the kernel part yet.
    let mut mesh = scene.mesh.clone();
    mesh.policies = vec![culvert_tests::scene::only("nobody")];
    mesh.write(&scene.mesh_file())?;
    let agent = scene.node1.start_agent(AgentOptions::default())?;
    agent.ready()?;
    let report = echo(&scene.client, &scene.server_a)?;
    assert!(!answered(&report), "{report}");
    Ok(())
}
