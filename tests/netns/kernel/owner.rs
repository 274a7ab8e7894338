//! One cgroup, one agent: a second one with the same pin directory takes over, one with another directory is refused.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use culvert::kernel::{Attached, Place, attached, loaded};
use culvert_harness::{Agent, AgentOptions, Node, culvert_binary, log::Stream};
use culvert_tests::scene::{SOON, Scene, Setting, answered, echo, hold, serve};

use crate::{agent_gone::goes_on, restart::listed, startup::complaint};

/// What Culvert has attached to a cgroup.
pub fn attached_to(cgroup: &Path) -> Result<Vec<Attached>> {
    let id = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(cgroup)?);
    let mut found = attached()?;
    found.retain(|link| link.place == Place::Cgroup(id));
    Ok(found)
}

/// Where no agent has been yet. A BPF file system takes no dots.
fn another_directory(node: &Node) -> PathBuf {
    let own = node.pin_directory();
    own.with_file_name(format!("{}-other", node.name()))
}

#[test]
fn an_agent_with_another_pin_directory_is_refused_where_one_lives() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    let cgroup = scene.node1.cgroup().path();
    let above = cgroup.parent().context("a cgroup above")?;
    let below = cgroup.join("agent");
    let pids =
        [&scene.agent1, scene.agent2()?].map(|agent| format!("process {},", agent.process().pid()));
    let [own, other] = pids.each_ref().map(String::as_str);
    // Above them all are two.
    for (root, pids) in [
        (cgroup, &[own][..]),
        (&below, &[own]),
        (above, &[own, other]),
    ] {
        let options = AgentOptions {
            pin_dir: Some(another_directory(&scene.node1)),
            cgroup_root: Some(root.to_owned()),
            ..AgentOptions::default()
        };
        let said = complaint(&scene.node1, options)?;
        assert!(
            pids.iter().any(|pid| said.contains(pid)),
            "{pids:?}: {said}"
        );
        for part in [
            root.to_str().unwrap(),
            "overlaps",
            "stop it",
            "CULVERT_CGROUP_ROOT",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(!another_directory(&scene.node1).exists());
    }
    // The one that lives goes on, and is still reached by its admin socket.
    assert_eq!(listed(&scene.agent1)?.len(), 3);
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    Ok(())
}

#[test]
fn what_a_dead_agent_left_in_another_directory_is_named_with_the_mend() -> Result<()> {
    let scene = Scene::new()?;
    let pid = scene.agent1.process().pid().to_string();
    scene.agent1.kill()?;
    let other = another_directory(&scene.node1);
    let options = || AgentOptions {
        pin_dir: Some(other.clone()),
        ..AgentOptions::default()
    };
    let said = complaint(&scene.node1, options())?;
    let mend = format!(
        "culvert unload --pin-dir {}",
        scene.node1.pin_directory().display()
    );
    for part in [pid.as_str(), "has ended", &mend] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let arguments = mend.split(' ').skip(1);
    let unload = scene.node1.command(culvert_binary()?).args(arguments);
    unload.run(SOON)?.success()?;
    let agent = scene.node1.start_agent(options())?;
    agent.ready()
}

/// A second agent with the first one's directory, while that one runs.
fn takes_over(scene: &Scene) -> Result<Agent> {
    let second = scene.node1.start_agent(AgentOptions::default())?;
    scene
        .agent1
        .process()
        .wait_for_line("another agent has taken the kernel part over", SOON)?;
    Ok(second)
}

#[test]
fn a_second_agent_with_the_same_directory_takes_over_and_the_first_one_ends() -> Result<()> {
    let scene = Scene::with(Setting {
        env: vec![("TERMINATION_GRACE_PERIOD_SECONDS", "60s".into())],
        ..Setting::default()
    })?;
    let _server = serve(&scene.server_a, "echo")?;
    let _far = serve(scene.server_b()?, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let (direct, proxied) = (
        hold(&scene.client, &scene.server_a)?,
        hold(&scene.client, scene.server_b()?)?,
    );
    goes_on(&direct, "before")?;
    goes_on(&proxied, "before")?;
    let second = takes_over(&scene)?;
    // The first one ends what it carries, and then itself.
    goes_on(&proxied, "the first agent's to end")?;
    proxied.close_stdin();
    let status = scene.agent1.process().wait(SOON)?;
    assert!(status.success(), "{status}");
    second.ready()?;
    goes_on(&direct, "after")?;
    for _ in 0..2 {
        for server in [&scene.server_a, scene.server_b()?] {
            assert!(answered(&echo(&scene.client, server)?));
            assert!(!answered(&echo(&scene.intruder, server)?));
        }
    }
    assert_eq!(listed(&second)?.len(), 3);
    Ok(())
}

#[test]
fn an_agent_that_was_taken_over_from_changes_nothing_any_more() -> Result<()> {
    let mut scene = Scene::with(Setting {
        both_agents: true,
        ..Setting::default()
    })?;
    let _server = serve(&scene.server_a, "echo")?;
    let second = takes_over(&scene)?;
    let held = hold(&scene.client, scene.server_b()?);
    drop(held);
    second.ready()?;
    scene.warm(&scene.client, &scene.server_a)?;
    // The first one still runs, for its connections' sake, and reads the mesh too.
    scene.mesh.policies = vec![culvert_tests::scene::only("nobody")];
    scene.mesh.write(&scene.mesh_file())?;
    culvert_harness::wait_until(SOON, "the new policy", || {
        Ok((!answered(&echo(&scene.client, &scene.server_a)?)).then_some(()))
    })?;
    let said = scene.agent1.log().text(Stream::Err);
    assert!(!said.contains("cannot"), "{said}");
    Ok(())
}

#[test]
fn agents_on_sibling_cgroups_do_not_disturb_each_other() -> Result<()> {
    let scene = Scene::with(Setting {
        both_agents: true,
        ..Setting::default()
    })?;
    for node in [&scene.node1, &scene.node2] {
        let links = attached_to(node.cgroup().path())?;
        let programs = loaded();
        let mut names: Vec<_> = links
            .iter()
            .filter_map(|link| Some(programs.get(&link.program)?.name.clone()))
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "connect4",
                "connect6",
                "peer_name4",
                "peer_name6",
                "socket_ops"
            ]
        );
    }
    Ok(())
}
