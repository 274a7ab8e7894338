//! Where the agent cannot do its work it says what it needs, and ends.

use anyhow::Result;
use culvert_harness::{Agent, AgentOptions, Fabric, Mesh, Node, log::Stream};
use culvert_tests::scene::{SOON, Scene};

use crate::kernel_tables::pinned;

/// What the agent says that does not start with these options.
fn complaint(node: &Node, options: AgentOptions) -> Result<String> {
    let agent = node.start_agent(options)?;
    let status = agent.process().wait(SOON)?;
    assert!(status.code().is_some_and(|code| code != 0), "{status}");
    Ok(agent.log().text(Stream::Err))
}

fn stage() -> Result<(Fabric, Node)> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    Mesh::default().write(&Agent::default_mesh_file(&node))?;
    Ok((fabric, node))
}

#[test]
fn pins_that_are_not_on_a_bpf_file_system_are_refused() -> Result<()> {
    let (fabric, node) = stage()?;
    let pin_dir = fabric.directory().join("pins");
    let said = complaint(
        &node,
        AgentOptions {
            pin_dir: Some(pin_dir.clone()),
            ..AgentOptions::default()
        },
    )?;
    for part in [
        pin_dir.to_str().unwrap(),
        "BPF file system",
        "mount -t bpf",
        "CULVERT_PIN_DIR",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}

#[test]
fn a_cgroup_root_that_is_no_cgroup_is_refused() -> Result<()> {
    let (fabric, node) = stage()?;
    let cgroup_root = Some(fabric.directory().to_owned());
    let said = complaint(
        &node,
        AgentOptions {
            cgroup_root,
            ..AgentOptions::default()
        },
    )?;
    for part in [
        fabric.directory().to_str().unwrap(),
        "cgroup v2",
        "CULVERT_CGROUP_ROOT",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}

#[test]
fn an_agent_outside_its_cgroup_root_is_refused() -> Result<()> {
    let (_fabric, node) = stage()?;
    let cgroup_root = Some(node.pods_cgroup().path().to_owned());
    let said = complaint(
        &node,
        AgentOptions {
            cgroup_root,
            ..AgentOptions::default()
        },
    )?;
    for part in [
        "does not run inside",
        "CULVERT_CGROUP_ROOT",
        "start it in a cgroup below",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}

#[test]
fn pinned_maps_of_another_layout_are_not_adopted() -> Result<()> {
    let scene = Scene::new()?;
    scene.agent1.kill()?;
    std::fs::remove_file(pinned(&scene.node1, "VERDICTS"))?;
    std::fs::rename(
        pinned(&scene.node1, "FLOWS"),
        pinned(&scene.node1, "VERDICTS"),
    )?;
    let said = complaint(&scene.node1, AgentOptions::default())?;
    for part in ["map VERDICTS", "another type or size", "culvert unload"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    Ok(())
}
