//! Agents that ask for what they need (`XDS_ON_DEMAND`): the first connection to an address waits until it is known what is there.

use anyhow::Result;
use culvert_harness::{Agent, Match, Policy, Service, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect, connect_to, echo, only, principal,
    serve, status,
};
use serde_json::Value;

use super::access::wait_for_failure;

const WORD: &str = "not-for-the-wire";
const SAY: [&str; 6] = ["--send", WORD, "--read", "16", "--timeout-ms", "9000"];

fn scene(knobs: &'static str, policies: Vec<Policy>) -> Result<Scene> {
    Scene::with(Setting {
        knobs,
        policies: Some(policies),
        env: vec![("XDS_ON_DEMAND", "true".to_owned())],
        ..Setting::default()
    })
}

fn workloads(agent: &Agent) -> Result<Option<u64>> {
    Ok(status(agent)?["workloads"].as_u64())
}

fn said(report: &Value) -> bool {
    report["data"] == WORD
}

#[test]
fn the_first_connection_waits_until_it_is_known_where_it_goes() -> Result<()> {
    // One policy is for all, and the other only for workloads that name it: what a pod itself is was asked for as well.
    let closed = Policy::deny(NAMESPACE, "closed")
        .selector()
        .when(Match::principal(&principal("client")));
    let mut scene = scene("", vec![only("client"), closed])?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
        serve(&scene.intruder, "echo")?,
    );
    // Only the one agent hears of it.
    if let Some(workload) = scene.mesh.workload("intruder") {
        workload.authorization_policies = vec![format!("{NAMESPACE}/closed")];
    }
    scene.mesh.write(&scene.mesh_file())?;
    wait_until(SOON, "the pod to be closed", || {
        Ok((!answered(&echo(&scene.client, &scene.intruder)?)).then_some(()))
    })?;
    // Each knows its own pods and nobody else.
    assert_eq!(workloads(&scene.agent1)?, Some(3));
    assert_eq!(workloads(scene.agent2()?)?, Some(1));
    let (mark, capture) = (scene.agent1.log().mark(), scene.fabric.capture()?);
    assert!(said(&connect(&scene.client, scene.server_b()?, &SAY)?));
    let fields = [("path", "hbone"), ("dst.workload", "server-b")];
    scene.agent1.wait_for_access(mark, &fields, SOON)?;
    assert!(!capture.contains(WORD.as_bytes())?);
    assert_eq!(workloads(&scene.agent1)?, Some(4));
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    for (from, to) in [
        (&scene.intruder, &scene.server_a),
        (&scene.intruder, scene.server_b()?),
        (&scene.client, &scene.intruder),
    ] {
        assert!(
            !answered(&echo(from, to)?),
            "{} to {}",
            from.name(),
            to.name()
        );
    }
    Ok(())
}

#[test]
fn twin_without_asking_the_first_connection_is_in_clear() -> Result<()> {
    let scene = scene("skip-demand", Vec::new())?;
    let _server = serve(scene.server_b()?, "echo")?;
    let capture = scene.fabric.capture()?;
    connect(&scene.client, scene.server_b()?, &SAY)?;
    assert!(capture.contains(WORD.as_bytes())?);
    Ok(())
}

#[test]
fn a_service_is_asked_for_with_what_is_behind_it() -> Result<()> {
    let mut scene = scene("", vec![only("client")])?;
    let _server = serve(scene.server_b()?, "echo")?;
    let service = Service::new(NAMESPACE, "servers", "10.96.0.1").port(80, PORT);
    scene.mesh.services.push(service.clone());
    if let Some(workload) = scene.mesh.workload("server-b") {
        *workload = workload.clone().serves(&service, 80, PORT);
    }
    let revisions = scene.control_plane()?.log().mark();
    scene.mesh.write(&scene.mesh_file())?;
    scene.control_plane()?.process().wait_for_line_after(
        revisions,
        "the mesh file is in effect",
        SOON,
    )?;
    wait_until(SOON, "the service to lead to its endpoint", || {
        Ok(said(&connect_to(&scene.client, "10.96.0.1:80", &SAY)?).then_some(()))
    })?;
    assert!(!said(&connect_to(&scene.intruder, "10.96.0.1:80", &SAY)?));
    Ok(())
}

#[test]
fn what_is_not_in_the_mesh_is_reached_as_it_is_once_that_is_known() -> Result<()> {
    let mut scene = scene("", vec![only("client")])?;
    let outside = scene.node2.pod("outside")?;
    let _servers = (serve(&outside, "echo")?, serve(scene.server_b()?, "echo")?);
    let mark = scene.agent1.log().mark();
    assert!(said(&connect(&scene.client, &outside, &SAY)?));
    scene
        .agent1
        .wait_for_access(mark, &[("path", "plaintext")], SOON)?;

    // Without an answer nothing is sent; with one that is late, it is sent late.
    let capture = scene.fabric.capture()?;
    scene
        .control_plane()?
        .misbehave_now("xds: [{delay-ms: 7000}]")?;
    let mark = scene.agent1.log().mark();
    assert!(!said(&connect(&scene.client, scene.server_b()?, &SAY)?));
    wait_for_failure(&scene.agent1, mark, "has not said within", &[])?;
    assert!(said(&connect(&scene.client, scene.server_b()?, &SAY)?));
    assert!(!capture.contains(WORD.as_bytes())?);
    Ok(())
}

#[test]
fn a_pod_is_not_enrolled_before_it_is_known_what_it_is() -> Result<()> {
    let mut scene = scene("", vec![only("client")])?;
    let _server = serve(scene.server_b()?, "echo")?;
    let late = scene.node1.pod("late")?;
    scene
        .control_plane()?
        .misbehave_now("xds: [{delay-ms: 7000}]")?;
    // The mesh gives its address to somebody else, which the agent has to hear first.
    let workload = culvert_harness::Workload::of_pod(&late, NAMESPACE, "client");
    let mut other = workload.clone();
    (other.uid, other.name) = ("other".to_owned(), "other".to_owned());
    scene.mesh.workloads.push(other);
    scene.mesh.write(&scene.mesh_file())?;
    let refused = scene.agent1.enrol_as(&late, &workload).unwrap_err();
    let refused = format!("{refused:#}");
    assert!(refused.contains("has not said what it knows"), "{refused}");
    scene.control_plane()?.misbehave("")?;
    wait_until(SOON, "the reason to be another", || {
        let refused = scene.agent1.enrol_as(&late, &workload).unwrap_err();
        let refused = format!("{refused:#}");
        Ok(refused.contains("to another workload").then_some(()))
    })
}

#[test]
fn an_agent_that_comes_back_asks_for_its_pods_again() -> Result<()> {
    let mut scene = scene("", vec![only("client")])?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    scene.agent1.kill()?;
    let mut options = culvert_harness::AgentOptions::default();
    let on_demand = ("XDS_ON_DEMAND".to_owned(), "true".to_owned());
    options.env.extend([on_demand]);
    scene.agent1 = scene.node1.start_agent(options)?;
    scene.agent1.ready()?;
    assert_eq!(workloads(&scene.agent1)?, Some(3));
    for server in [&scene.server_a, scene.server_b()?] {
        assert!(answered(&echo(&scene.client, server)?));
        assert!(!answered(&echo(&scene.intruder, server)?));
    }
    Ok(())
}
