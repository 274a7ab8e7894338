//! Processes of the node: kubelet's probes reach applications that policy closes to everybody else; a host-network pod does
//! not, although it has the same addresses.

use anyhow::Result;
use culvert_harness::{Launch, probe_binary};
use culvert_tests::scene::{SOON, Scene, Setting, answered, echo, serve, status, text, was_reset};
use serde_json::Value;

fn probe(scene: &Scene, from: impl FnOnce() -> Result<Launch>) -> Result<Value> {
    let server = scene.server_a.at(culvert_tests::scene::PORT);
    from()?
        .args(["connect", "--to", &server])
        .args(["--send", "hello", "--read", "5"])
        .run(SOON)?
        .json()
}

fn by_the_node(scene: &Scene) -> Result<Value> {
    probe(scene, || Ok(scene.node1.command(probe_binary()?)))
}

fn by_a_host_pod(scene: &Scene) -> Result<Value> {
    probe(scene, || Ok(scene.node1.host_pod_command(probe_binary()?)))
}

#[test]
fn a_process_of_the_node_reaches_an_application_and_is_seen_as_itself() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_a, "echo")?;
    for _ in 0..2 {
        let report = by_the_node(&scene)?;
        assert!(answered(&report), "{report}");
    }
    let accepted = server.wait_for_event("accepted", SOON)?;
    let seen = text(&accepted, "peer");
    let node = scene.node1.address().to_string();
    assert!(seen.starts_with(&node), "{accepted}");
    // It took nothing away from the pods.
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    status(&scene.agent1).map(drop)
}

#[test]
fn a_host_network_pod_is_judged_by_policy() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_a, "echo")?;
    let report = by_a_host_pod(&scene)?;
    assert!(was_reset(&report), "{report}");
    assert!(server.events("accepted").is_empty());
    Ok(())
}

#[test]
fn twin_without_the_cgroup_check_a_host_network_pod_passes_for_the_node() -> Result<()> {
    let scene = Scene::without("host-pods-are-node")?;
    let _server = serve(&scene.server_a, "echo")?;
    let report = by_a_host_pod(&scene)?;
    assert!(answered(&report), "{report}");
    Ok(())
}

#[test]
fn where_probes_may_not_pass_the_node_is_judged_by_policy() -> Result<()> {
    let scene = Scene::with(Setting {
        env: vec![("CULVERT_PASS_NODE_PROBES", "false".to_owned())],
        ..Setting::default()
    })?;
    let _server = serve(&scene.server_a, "echo")?;
    let report = by_the_node(&scene)?;
    assert!(was_reset(&report), "{report}");
    Ok(())
}

#[test]
fn the_node_is_not_left_out_of_a_port_that_belongs_to_the_agent() -> Result<()> {
    let scene = Scene::new()?;
    let report = scene
        .node1
        .command(probe_binary()?)
        .args(["connect", "--to", &scene.server_a.at(15001)])
        .args(["--send", "hello", "--read", "5"])
        .run(SOON)?
        .json()?;
    assert!(!answered(&report), "{report}");
    assert_ne!(text(&report, "connect"), "ok", "{report}");
    Ok(())
}
