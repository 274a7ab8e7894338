//! Agents that get their mesh and certificates from a control plane; first that one itself.

use anyhow::Result;
use culvert_harness::{
    Agent, ControlPlane, Fabric, Mesh, TcpState, Workload, culvert_binary, wait_until,
};
use culvert_tests::scene::{SOON, Scene, answered, echo, mesh_status, only, serve, status};
use nix::sys::signal::Signal;

fn mesh_of(name: &str) -> Mesh {
    Mesh {
        workloads: vec![Workload {
            uid: name.to_owned(),
            name: name.to_owned(),
            namespace: "demo".to_owned(),
            protocol: "HBONE".to_owned(),
            ..Workload::default()
        }],
        ..Mesh::default()
    }
}

#[test]
fn it_follows_its_files_and_comes_back_at_the_same_address() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let mesh_file = fabric.directory().join("mesh.yaml");
    mesh_of("first").write(&mesh_file)?;
    let dev_ca = fabric.directory().join("dev-ca");
    let mut plane = ControlPlane::start(&node, &culvert_binary()?, &mesh_file, &dev_ca)?;
    let listens = || -> Result<bool> {
        let mut sockets = node.sockets()?.into_iter();
        Ok(sockets.any(|one| one.state == TcpState::Listen && one.local == plane.address()))
    };
    assert!(listens()?);
    let told = |plane: &ControlPlane, line: &str| plane.process().wait_for_line(line, SOON);
    told(&plane, "the mesh file is in effect")?;
    mesh_of("second").write(&mesh_file)?;
    told(&plane, "revision=2")?;
    plane.misbehave("xds: [stall]")?;
    told(&plane, "another behaviour is in effect")?;
    plane.misbehave("xds: [unheard-of]")?;
    told(&plane, "the behaviour stays as it was")?;
    plane.misbehave("")?;

    let address = plane.address();
    plane.stop(Signal::SIGTERM)?;
    assert!(
        plane
            .process()
            .status()
            .is_some_and(|status| status.success())
    );
    plane.restart()?;
    assert_eq!(plane.address(), address);
    told(&plane, "the mesh file is in effect")?;
    assert!(dev_ca.join("root-cert.pem").is_file());
    Ok(())
}

fn wait_for_status(agent: &Agent, words: &str) -> Result<()> {
    wait_until(SOON, words, || {
        Ok(mesh_status(agent)?.contains(words).then_some(()))
    })
}

/// Whether the client still reaches a server, on this node or the other.
fn reaches(scene: &Scene, near: bool) -> Result<bool> {
    let server = if near {
        &scene.server_a
    } else {
        scene.server_b()?
    };
    Ok(answered(&echo(&scene.client, server)?))
}

#[test]
fn both_ways_and_policy_work_as_with_a_file() -> Result<()> {
    let mut scene = Scene::new()?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    assert!(mesh_status(&scene.agent1)?.starts_with("control plane, connected"));
    for near in [true, false] {
        assert!(reaches(&scene, near)?);
    }
    assert!(!answered(&echo(&scene.intruder, scene.server_b()?)?));
    scene.change_mesh(|mesh| mesh.policies = vec![only("intruder")])?;
    for near in [true, false] {
        assert!(!reaches(&scene, near)?);
    }
    assert!(answered(&echo(&scene.intruder, scene.server_b()?)?));
    Ok(())
}

#[test]
fn without_its_control_plane_an_agent_goes_on_and_says_so() -> Result<()> {
    let mut scene = Scene::new()?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    for near in [true, false] {
        assert!(reaches(&scene, near)?);
    }
    scene.control_plane()?.stop(Signal::SIGKILL)?;
    wait_for_status(&scene.agent1, "lost for")?;
    let connected = |agent: &Agent| agent.metric("culvert_control_plane_connected", &[]);
    assert_eq!(connected(&scene.agent1)?, 0.0);
    let warnings = status(&scene.agent1)?["warnings"].to_string();
    assert!(
        warnings.contains("the control plane has been gone for"),
        "{warnings}"
    );
    for near in [true, false] {
        assert!(reaches(&scene, near)?);
    }
    // What changes meanwhile is learnt when it is back.
    scene.mesh.policies = vec![only("intruder")];
    scene.mesh.write(&scene.mesh_file())?;
    scene.control_plane()?.restart()?;
    wait_for_status(&scene.agent1, "connected")?;
    assert_eq!(connected(&scene.agent1)?, 1.0);
    wait_until(
        SOON,
        "the change to reach the other pod of the node",
        || Ok((!reaches(&scene, true)?).then_some(())),
    )
}
