//! The mesh file: broken, missing, repaired.

use super::access::accepted_from;
use anyhow::Result;
use culvert_harness::{Agent, AgentOptions, Fabric, Mesh, mesh::replace_file, wait_until};
use culvert_tests::scene::{SOON, Scene, answered, echo, mesh_status, serve, status};

const READINESS: u16 = 15021;
const BROKEN: &str = "workloads: []\npolicies:\n  - name: a\n    namespace: b\n    scope: Namespace\n    action: Alow\n";

#[test]
fn a_broken_change_leaves_the_old_mesh_in_force() -> Result<()> {
    let mut scene = Scene::new()?;
    let server = serve(&scene.server_b, "echo")?;
    let mark = scene.agent2.log().mark();
    replace_file(&scene.mesh_file(), BROKEN)?;
    let line = scene
        .agent2
        .process()
        .wait_for_line_after(mark, "Alow", SOON)?;
    assert!(
        line.contains("\terror\t") && line.contains("mesh.yaml:6:13:"),
        "{line}"
    );
    wait_until(SOON, "the status to tell", || {
        Ok(mesh_status(&scene.agent1)?
            .contains("still in force")
            .then_some(()))
    })?;
    assert!(
        status(&scene.agent1)?["warnings"]
            .to_string()
            .contains("Alow")
    );
    assert_eq!(scene.agent2.get(READINESS, "/healthz/ready")?.status, 200);
    assert!(answered(&echo(&scene.client, &scene.server_b)?));
    assert!(!answered(&echo(&scene.intruder, &scene.server_b)?));
    assert_eq!(accepted_from(&server, &scene.server_b)?.len(), 1);
    scene.change_mesh(|mesh| mesh.policies.clear())?;
    assert!(
        !status(&scene.agent1)?["warnings"]
            .to_string()
            .contains("mesh file")
    );
    assert!(answered(&echo(&scene.intruder, &scene.server_b)?));
    Ok(())
}

/// An agent that starts with this file, or none, is not ready and says why; with a good one it becomes ready.
fn repaired(first: Option<&str>, complaint: &str) -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let file = Agent::default_mesh_file(&node);
    if let Some(text) = first {
        replace_file(&file, text)?;
    }
    let agent = node.start_agent(AgentOptions::default())?;
    let answer = wait_until(SOON, "an answer", || {
        Ok(agent.get(READINESS, "/healthz/ready").ok())
    })?;
    assert_eq!(answer.status, 500, "{answer:?}");
    assert!(answer.body.contains(complaint), "{answer:?}");
    Mesh::default().write(&file)?;
    agent.ready()
}

#[test]
fn an_agent_with_a_broken_file_is_not_ready_until_it_is_repaired() -> Result<()> {
    repaired(Some(BROKEN), "Alow")
}

#[test]
fn an_agent_without_a_file_is_not_ready_until_there_is_one() -> Result<()> {
    repaired(None, "mesh.yaml")
}
