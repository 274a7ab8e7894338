//! A pod that a new agent cannot serve yet waits: refused, never in plaintext, and named until it can be served.

use anyhow::Result;
use culvert_abi::OUTBOUND_PORT;
use culvert_harness::{Agent, Pod, Proc, mesh::replace_file, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect_to, echo, hold, only, serve, serve_on,
    text,
};
use serde_json::Value;

use crate::enrolment::network;
use crate::{
    agent_gone::goes_on,
    restart::{entry, listed, start},
};

const BROKEN: &str = "workloads: 7\n";
const MARKER: &str = "culvert-waiting-marker";
const HELLO: [&str; 4] = ["--send", "hello", "--read", "5"];

/// Enrols a pod again, with nothing but its uid: only the mesh says who it is.
fn enrol_by_uid(scene: &Scene, pod: &Pod) -> Result<String> {
    let uid = scene.workload(pod)?.uid.clone();
    scene.agent1.unenrol(&uid)?;
    let netns = pod.netns().path().to_string_lossy();
    let add = ["pod", "add", "--netns", netns.as_ref(), "--uid", &uid];
    scene.agent1.cli(add)?.success()?;
    Ok(uid)
}

/// A new agent in place of the killed one, which finds a mesh file that it cannot read. (A control plane goes on telling the mesh
/// before: scenes for this are of a file.)
fn restart_without_a_mesh(scene: &Scene, knobs: &str) -> Result<Agent> {
    scene.agent1.kill()?;
    replace_file(&scene.mesh_file(), BROKEN)?;
    let agent = start(&scene.node1, knobs)?;
    wait_until(SOON, "an answer", || {
        Ok(agent.get(15021, "/healthz/ready").ok())
    })?;
    Ok(agent)
}

fn wait_until_active(agent: &Agent, uid: &str) -> Result<()> {
    wait_until(SOON, "the pod to be active", || {
        Ok((entry(agent, uid)?["state"] == "active").then_some(()))
    })
}

#[test]
fn a_pod_that_cannot_be_served_after_a_restart_waits_for_the_mesh() -> Result<()> {
    let scene = Scene::of_a_file()?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
        serve(&scene.client, "echo")?,
    );
    let outsider = scene.node1.pod("outsider")?;
    let uid = enrol_by_uid(&scene, &scene.client)?;
    for server in [&scene.server_a, scene.server_b()?] {
        assert!(answered(&echo(&scene.client, server)?));
    }
    let agent = restart_without_a_mesh(&scene, "")?;

    let waits = entry(&agent, &uid)?;
    assert_eq!(waits["state"], "pending", "{waits}");
    assert!(text(&waits, "reason").contains(&uid), "{waits}");
    let ready = agent.get(15021, "/healthz/ready")?;
    assert_eq!(ready.status, 500);
    for part in ["mesh file", &uid] {
        assert!(ready.body.contains(part), "{part}: {}", ready.body);
    }
    let capture = scene.fabric.capture()?;
    // What an earlier agent decided stands until there is a mesh; what needs the agent is refused.
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    let report = connect_to(
        &scene.client,
        &scene.server_b()?.at(PORT),
        &["--send", MARKER],
    )?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    assert!(!capture.contains(MARKER.as_bytes())?);
    let report = connect_to(&outsider, &scene.client.at(PORT), &HELLO)?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");

    scene.mesh.write(&scene.mesh_file())?;
    wait_until_active(&agent, &uid)?;
    agent.ready()?;
    for server in [&scene.server_a, scene.server_b()?] {
        wait_until(SOON, "the pod to work", || {
            Ok(answered(&echo(&scene.client, server)?).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn a_waiting_pod_can_be_removed() -> Result<()> {
    let scene = Scene::of_a_file()?;
    let _server = serve(&scene.client, "echo")?;
    let outsider = scene.node1.pod("outsider")?;
    let untouched = network(&outsider)?;
    let uid = enrol_by_uid(&scene, &scene.client)?;
    let agent = restart_without_a_mesh(&scene, "")?;
    agent.unenrol(&uid)?;
    // Rules, sysctls and ports of the agent are gone; routes differ by the pod's own address.
    let (released, own) = (network(&scene.client)?, network(&outsider)?);
    assert_eq!(own, untouched);
    let others = |lines: &[String]| -> Vec<String> {
        let mut lines = lines.to_vec();
        // The routes of both families.
        lines.remove(3);
        lines.remove(1);
        lines
    };
    assert_eq!(others(&released), others(&own));
    assert!(listed(&agent)?.iter().all(|pod| pod["uid"] != *uid));
    let ready = agent.get(15021, "/healthz/ready")?;
    assert!(!ready.body.contains(&uid), "{}", ready.body);
    // It is a pod like any other again.
    assert!(answered(&connect_to(
        &outsider,
        &scene.client.at(PORT),
        &HELLO
    )?));
    scene.mesh.write(&scene.mesh_file())?;
    agent.ready()?;
    assert!(listed(&agent)?.iter().all(|pod| pod["uid"] != *uid));
    agent.enrol_as(&scene.client, scene.workload(&scene.client)?)
}

#[test]
fn a_waiting_pod_is_served_when_a_request_says_who_it_is() -> Result<()> {
    let scene = Scene::of_a_file()?;
    let uid = enrol_by_uid(&scene, &scene.client)?;
    let agent = restart_without_a_mesh(&scene, "")?;
    assert_eq!(entry(&agent, &uid)?["state"], "pending");
    agent.enrol(&scene.client, &uid, NAMESPACE, "client", "client")?;
    let active = entry(&agent, &uid)?;
    assert_eq!(active["state"], "active", "{active}");
    assert_eq!(listed(&agent)?.len(), 3);
    Ok(())
}

/// A pod that waits sends a marker to the other node; tells whether it passed in clear.
fn reach_while_waiting(knobs: &'static str) -> Result<(Value, bool)> {
    let scene = Scene::with(Setting {
        knobs,
        mesh_file: true,
        ..Setting::default()
    })?;
    let _server = serve(scene.server_b()?, "echo")?;
    enrol_by_uid(&scene, &scene.client)?;
    let _agent = restart_without_a_mesh(&scene, knobs)?;
    let capture = scene.fabric.capture()?;
    let say = ["--send", MARKER, "--read", "5"];
    let report = connect_to(&scene.client, &scene.server_b()?.at(PORT), &say)?;
    Ok((report, capture.contains(MARKER.as_bytes())?))
}

#[test]
fn a_waiting_pod_sends_nothing_in_plaintext() -> Result<()> {
    let (report, leaked) = reach_while_waiting("skip-policy")?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    assert!(!leaked);
    Ok(())
}

#[test]
fn twin_without_steering_a_waiting_pod_sends_in_plaintext() -> Result<()> {
    let (report, leaked) = reach_while_waiting("skip-policy,skip-steering")?;
    assert!(leaked, "{report}");
    Ok(())
}

/// An open flow to a server that waits, and meanwhile policy forbids it.
struct Stage {
    scene: Scene,
    held: Proc,
    _agent: Agent,
    _server: Proc,
}

fn forbidden_while_its_server_waits(knobs: &'static str) -> Result<Stage> {
    let scene = Scene::with(Setting {
        knobs,
        policies: Some(Vec::new()),
        mesh_file: true,
        ..Setting::default()
    })?;
    let server = serve(&scene.server_a, "echo")?;
    let uid = enrol_by_uid(&scene, &scene.server_a)?;
    scene.warm(&scene.intruder, &scene.server_a)?;
    let held = hold(&scene.intruder, &scene.server_a)?;
    goes_on(&held, "before")?;
    let agent = restart_without_a_mesh(&scene, knobs)?;
    goes_on(&held, "while it waits")?;
    let mut mesh = scene.mesh.clone();
    mesh.policies = vec![only("client")];
    mesh.write(&scene.mesh_file())?;
    wait_until_active(&agent, &uid)?;
    Ok(Stage {
        scene,
        held,
        _agent: agent,
        _server: server,
    })
}

#[test]
fn a_flow_to_a_waiting_pod_is_judged_when_the_pod_is_back() -> Result<()> {
    let stage = forbidden_while_its_server_waits("")?;
    let end = stage.held.wait_for_event("end", SOON)?;
    assert!(
        ["ECONNRESET", "ECONNABORTED"].contains(&text(&end, "how")),
        "{end}"
    );
    Ok(())
}

#[test]
fn twin_without_the_sweep_a_flow_to_a_waiting_pod_goes_on() -> Result<()> {
    let stage = forbidden_while_its_server_waits("skip-sweep")?;
    let scene = &stage.scene;
    assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    goes_on(&stage.held, "after")
}

/// An open flow whose client alone waits: somebody has taken a port of the agent's in its pod.
fn its_client_waits(scene: &Scene) -> Result<(Agent, Proc, Proc)> {
    let held = hold(&scene.client, &scene.server_a)?;
    goes_on(&held, "before")?;
    scene.agent1.kill()?;
    let taker = serve_on(&scene.client, "echo", OUTBOUND_PORT)?;
    let agent = start(&scene.node1, "")?;
    let uid = scene.workload(&scene.client)?.uid.clone();
    wait_until(SOON, "all other pods to be back", || {
        let pods = listed(&agent).unwrap_or_default();
        let back = pods.iter().filter(|pod| pod["state"] == "active").count();
        Ok((back == 2).then_some(()))
    })?;
    assert_eq!(entry(&agent, &uid)?["state"], "pending");
    Ok((agent, held, taker))
}

#[test]
fn a_flow_whose_client_waits_goes_on() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let (agent, held, taker) = its_client_waits(&scene)?;
    agent
        .process()
        .wait_for_line("the agent is running", SOON)?;
    goes_on(&held, "while it waits")?;
    drop(taker);
    wait_until_active(&agent, &scene.workload(&scene.client)?.uid)?;
    goes_on(&held, "after")
}

#[test]
fn a_flow_whose_client_waits_is_cut_when_policy_forbids_it() -> Result<()> {
    let mut scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let (agent, held, _taker) = its_client_waits(&scene)?;
    agent
        .process()
        .wait_for_line("the agent is running", SOON)?;
    goes_on(&held, "while it waits")?;
    scene.mesh.policies = vec![only("intruder")];
    scene.mesh.write(&scene.mesh_file())?;
    let end = held.wait_for_event("end", SOON)?;
    assert_eq!(text(&end, "how"), "ECONNRESET", "{end}");
    Ok(())
}
