//! A pod gives itself another's address before the mesh says who the pod is: it never counts as that other.

use anyhow::Result;
use culvert_harness::{Agent, Match, Mesh, Pod, Policy, Workload, wait_until};
use culvert_tests::scene::{NAMESPACE, SOON, Scene, Setting, answered, connect, serve};

use crate::restart::entry;

/// A workload that is not on this node, or nowhere.
const OTHER: &str = "10.77.1.121";
const UID: &str = "cluster//Pod/demo/thief";

struct Stage {
    scene: Scene,
    thief: Pod,
}

/// Only whoever has the other's address may connect; the mesh does not know the thief.
fn stage(knobs: &'static str, other_is_known: bool) -> Result<Stage> {
    let policy = Policy::allow(NAMESPACE, "the-other").when(Match::source(&format!("{OTHER}/32")));
    let mut scene = Scene::with(Setting {
        knobs,
        policies: Some(vec![policy]),
        ..Setting::default()
    })?;
    if other_is_known {
        name_the_other(&mut scene)?;
    }
    let thief = scene.node1.pod("thief")?;
    thief.add_address(OTHER.parse()?)?;
    scene
        .agent1
        .enrol(&thief, UID, NAMESPACE, "thief", "thief")?;
    Ok(Stage { scene, thief })
}

fn other(scene: &Scene) -> Result<Workload> {
    Ok(Workload {
        uid: "the-other".into(),
        name: "the-other".into(),
        workload_ips: vec![OTHER.into()],
        ..scene.workload(scene.pod_b())?.clone()
    })
}

fn name_the_other(scene: &mut Scene) -> Result<()> {
    let other = other(scene)?;
    scene.change_mesh(|mesh: &mut Mesh| mesh.workloads.push(other))
}

fn has_the_address(agent: &Agent) -> Result<bool> {
    let thief = entry(agent, UID)?;
    let addresses = thief["addresses"].as_array().cloned().unwrap_or_default();
    assert!(!addresses.is_empty(), "{thief}");
    Ok(addresses.iter().any(|address| address == OTHER))
}

/// Whether the thief passes for the other.
fn passes(stage: &Stage) -> Result<bool> {
    let scene = &stage.scene;
    let _server = serve(&scene.server_a, "echo")?;
    let hello = ["--bind-ip", OTHER, "--send", "hello", "--read", "5"];
    Ok(answered(&connect(&stage.thief, &scene.server_a, &hello)?))
}

#[test]
fn an_address_that_the_mesh_gives_to_another_is_not_the_pod_s() -> Result<()> {
    let stage = stage("", true)?;
    assert!(!has_the_address(&stage.scene.agent1)?);
    assert!(!passes(&stage)?);
    Ok(())
}

#[test]
fn twin_a_pod_that_keeps_another_s_address_passes_for_the_other() -> Result<()> {
    let stage = stage("keep-foreign-addresses", true)?;
    assert!(has_the_address(&stage.scene.agent1)?);
    assert!(passes(&stage)?);
    Ok(())
}

#[test]
fn addresses_are_chosen_anew_whenever_the_mesh_changes() -> Result<()> {
    let mut stage = stage("", false)?;
    assert!(has_the_address(&stage.scene.agent1)?);
    for (named, kept) in [(true, false), (false, true)] {
        let other = other(&stage.scene)?;
        stage.scene.change_mesh(|mesh| {
            if named {
                mesh.workloads.push(other);
            } else {
                mesh.workloads.retain(|workload| workload.uid != other.uid);
            }
        })?;
        let agent = &stage.scene.agent1;
        wait_until(SOON, "the addresses to be chosen", || {
            Ok((has_the_address(agent)? == kept).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn the_true_owner_can_be_enrolled_once_the_mesh_names_it() -> Result<()> {
    let mut stage = stage("", false)?;
    let owner = stage.scene.node1.pod("owner")?;
    owner.add_address(OTHER.parse()?)?;
    let mut workload = Workload::of_pod(&owner, NAMESPACE, "owner");
    workload.workload_ips.push(OTHER.into());
    let named = workload.clone();
    stage.scene.change_mesh(|mesh| mesh.workloads.push(named))?;
    let agent = &stage.scene.agent1;
    wait_until(SOON, "the address to be free", || {
        Ok((!has_the_address(agent)?).then_some(()))
    })?;
    agent.enrol_as(&owner, &workload)?;
    let entry = entry(agent, &workload.uid)?;
    let addresses = entry["addresses"].as_array().cloned().unwrap_or_default();
    assert!(addresses.iter().any(|address| address == OTHER), "{entry}");
    Ok(())
}
