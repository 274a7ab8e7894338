//! Certificates of the agents: only of their own pods, and renewed in time.

use std::path::Path;

use anyhow::Result;
use culvert::identity::DevCa;
use culvert_harness::{AgentOptions, Fabric, Mesh, log::Stream, wait_until};
use culvert_tests::scene::{SOON, Scene, Setting, answered, echo, hold, serve, status};

use super::peer::{genuine, server_leaf, spiffe};

fn files(directory: &Path) -> Result<Vec<std::path::PathBuf>> {
    Ok(std::fs::read_dir(directory)?
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()?)
}

/// Starts an agent with a development CA that `spoil` has prepared; returns what it says before it gives up.
fn complaint(spoil: impl Fn(&Path) -> Result<()>) -> Result<String> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    Mesh::default().write(&culvert_harness::Agent::default_mesh_file(&node))?;
    let directory = fabric.directory().join("spoilt-ca");
    spoil(&directory)?;
    let agent = node.start_agent(AgentOptions {
        dev_ca: Some(directory),
        ..AgentOptions::default()
    })?;
    let status = agent.process().wait(SOON)?;
    assert!(!status.success());
    Ok(agent.log().text(Stream::Out) + &agent.log().text(Stream::Err))
}

#[test]
fn a_spoilt_development_ca_is_an_error_at_the_start() -> Result<()> {
    let said = complaint(|directory| {
        DevCa::open(directory, "cluster.local")?;
        for file in files(directory)? {
            std::fs::write(file, "-----BEGIN CERTIFICATE-----\nnot base64 at all\n")?;
        }
        Ok(())
    })?;
    assert!(said.contains("is not a development CA"), "{said}");
    let said = complaint(|directory| {
        DevCa::open(directory, "elsewhere.local")
            .map(drop)
            .map_err(Into::into)
    })?;
    assert!(
        said.contains("belongs to the trust domain `elsewhere.local`"),
        "{said}"
    );
    let said = complaint(|directory| {
        DevCa::open(directory, "cluster.local")?;
        for file in files(directory)? {
            std::os::unix::fs::chown(&file, Some(0), Some(0))?;
            std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        }
        Ok(())
    })?;
    assert!(said.contains("chmod"), "{said}");
    Ok(())
}

#[test]
fn an_agent_holds_certificates_of_its_own_pods_only() -> Result<()> {
    let scene = Scene::with(Setting {
        both_agents: true,
        ..Setting::default()
    })?;
    let held = |agent| -> Result<Vec<String>> {
        let status = status(agent)?;
        let lines = status["certificates"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        Ok(lines
            .iter()
            .filter_map(|line| Some(line.as_str()?.split(": ").next()?.to_owned()))
            .collect())
    };
    assert_eq!(
        held(&scene.agent1)?,
        [spiffe("client"), spiffe("intruder"), spiffe("server-a")]
    );
    assert_eq!(held(scene.agent2()?)?, [spiffe("server-b")]);
    scene.agent1.unenrol("n1-intruder")?;
    assert_eq!(held(&scene.agent1)?, [spiffe("client"), spiffe("server-a")]);
    Ok(())
}

#[test]
fn connections_outlive_renewals_and_new_tunnels_use_the_new_certificate() -> Result<()> {
    let setting = Setting {
        env: vec![("SECRET_TTL", "10s".to_owned())],
        ..Setting::default()
    };
    let scene = Scene::with(setting)?;
    let _server = serve(scene.server_b()?, "echo")?;
    let held = hold(&scene.client, scene.server_b()?)?;
    let mut leaf = server_leaf(&scene.client, scene.server_b()?, genuine(&scene, "client")?)?;
    for renewal in 0..3 {
        leaf = wait_until(SOON, "a renewed certificate", || {
            let now = server_leaf(&scene.client, scene.server_b()?, genuine(&scene, "client")?)?;
            Ok((now != leaf).then_some(now))
        })?;
        let mark = held.log().mark();
        held.send_line("still here")?;
        held.wait_for_event_after(mark, "data", SOON)?;
        assert!(
            answered(&echo(&scene.client, scene.server_b()?)?),
            "after renewal {renewal}"
        );
    }
    Ok(())
}
