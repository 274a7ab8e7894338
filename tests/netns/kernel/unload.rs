//! `culvert unload` takes the mesh away from a node without anybody's connection noticing, and leaves nothing behind.

use std::fs;

use anyhow::{Context as _, Result};
use culvert::kernel::{Place, attached, loaded};
use culvert_harness::{Node, Pod, culvert_binary, wait_until};
use culvert_tests::scene::{NAMESPACE, SOON, Scene, answered, echo, hold, serve, text};
use serde_json::Value;

use crate::{
    agent_gone::goes_on,
    enrolment::network,
    kernel_tables::{flows, pinned},
    life::{churn, end, nothing_lost},
    owner::attached_to,
};

/// `culvert unload` on a node, as its operator would run it; what it printed and complained of, and whether it succeeded.
fn unload(node: &Node, more: &[&str]) -> Result<(String, String, bool)> {
    let socket = node.directory().join("admin.sock");
    let done = node
        .command(culvert_binary()?)
        .arg("unload")
        .arg("--pin-dir")
        .arg(node.pin_directory())
        .arg("--admin-socket")
        .arg(socket)
        .args(more)
        .run(SOON)?;
    let success = done.status.success();
    Ok((done.stdout, done.stderr, success))
}

/// The same, with its answer as JSON.
fn unloaded(node: &Node) -> Result<Value> {
    let (printed, complained, success) = unload(node, &["--json"])?;
    assert!(success, "{complained}");
    Ok(serde_json::from_str(&printed)?)
}

/// Every link to the node's cgroup and to the pods' namespaces.
fn links(scene: &Scene, pods: &[&Pod]) -> Result<Vec<u32>> {
    let mut places = Vec::new();
    for pod in pods {
        let namespace = fs::metadata(pod.netns().path())?;
        let inode = std::os::unix::fs::MetadataExt::ino(&namespace);
        places.push(Place::Netns(inode));
    }
    let mut found: Vec<_> = attached()?
        .into_iter()
        .filter(|link| places.contains(&link.place))
        .map(|link| link.link)
        .collect();
    let cgroup = attached_to(scene.node1.cgroup().path())?;
    found.extend(cgroup.iter().map(|link| link.link));
    Ok(found)
}

/// The programs that use one of the node's maps.
fn programs(node: &Node) -> Result<Vec<u32>> {
    let pins = pinned(node, "CONFIG");
    let mut maps = Vec::new();
    for entry in fs::read_dir(pins.parent().context("the directory of maps")?)? {
        maps.push(aya::maps::MapInfo::from_pin(entry?.path())?.id());
    }
    Ok(loaded()
        .into_iter()
        .filter(|(_, program)| program.maps.iter().any(|map| maps.contains(map)))
        .map(|(id, _)| id)
        .collect())
}

#[test]
fn an_unloaded_node_is_as_it_was_before_the_agent() -> Result<()> {
    let scene = Scene::new()?;
    let guest = scene.node1.pod("guest")?;
    let untouched = network(&guest)?;
    scene
        .agent1
        .enrol(&guest, "guest-uid", NAMESPACE, "guest", "guest")?;
    assert_ne!(network(&guest)?, untouched);
    let pods = [&scene.client, &scene.server_a, &scene.intruder, &guest];
    let before = programs(&scene.node1)?;
    assert!(before.len() >= 9, "{before:?}");
    assert_eq!(links(&scene, &pods)?.len(), 9);
    scene.agent1.kill()?;
    // The one that the agent itself runs goes with it, and those that it has attached to nothing: no flow was short-circuited.
    const OWN: usize = 4;
    let before = wait_until(SOON, "the agent's own programs to go", || {
        let left = programs(&scene.node1)?;
        Ok((left.len() + OWN == before.len()).then_some(left))
    })?;

    let answer = unloaded(&scene.node1)?;
    assert_eq!(answer["found"], true, "{answer}");
    assert_eq!(answer["links"], 9, "{answer}");
    assert_eq!(answer["programs"], before.len(), "{answer}");
    assert_eq!(answer["pods"].as_array().map(Vec::len), Some(4), "{answer}");
    assert!(links(&scene, &pods)?.is_empty());
    let left: Vec<_> = loaded()
        .into_keys()
        .filter(|id| before.contains(id))
        .collect();
    assert!(left.is_empty());
    assert!(!scene.node1.pin_directory().exists());
    assert_eq!(network(&guest)?, untouched);
    Ok(())
}

#[test]
fn unload_refuses_while_the_agent_lives_and_says_nothing_is_there_the_second_time() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    let pid = scene.agent1.process().pid().to_string();
    let (_, complained, success) = unload(&scene.node1, &[])?;
    assert!(!success);
    for part in [
        pid.as_str(),
        "stop it first",
        scene.node1.pin_directory().to_str().unwrap(),
    ] {
        assert!(complained.contains(part), "{part}: {complained}");
    }
    assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    scene.agent1.kill()?;
    let (printed, complained, success) = unload(&scene.node1, &[])?;
    assert!(success, "{complained}");
    assert!(printed.contains("nothing of them is left"), "{printed}");
    let (printed, _, success) = unload(&scene.node1, &[])?;
    assert!(success && printed.contains("nothing is there"), "{printed}");
    assert_eq!(unloaded(&scene.node1)?["found"], false);
    Ok(())
}

#[test]
fn flows_and_connects_go_on_while_the_node_is_unloaded() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let held = hold(&scene.client, &scene.server_a)?;
    goes_on(&held, "direct")?;
    assert_eq!(flows(&scene.node1)?.len(), 1);
    scene.agent1.kill()?;
    let load = churn(&scene.client, &scene.server_a)?;
    let answer = unloaded(&scene.node1)?;
    assert!(answer["open_flows"].as_u64() >= Some(1), "{answer}");
    goes_on(&held, "without a mesh")?;
    nothing_lost(&end(&load)?);
    assert!(answered(&echo(&scene.intruder, &scene.server_a)?), "plain");
    drop(server);
    Ok(())
}

#[test]
fn an_agent_that_starts_after_an_unload_serves_the_pods_again() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.agent1.kill()?;
    unloaded(&scene.node1)?;
    let agent = scene
        .node1
        .start_agent(culvert_harness::AgentOptions::default())?;
    agent.ready()?;
    let pods = crate::restart::listed(&agent)?;
    assert!(
        pods.iter().all(|pod| text(pod, "state") == "active"),
        "{pods:?}"
    );
    assert_eq!(pods.len(), 3);
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    Ok(())
}
