//! The mesh file: broken, missing, repaired.

use super::access::accepted_from;
use anyhow::Result;
use culvert_harness::{
    Agent, AgentOptions, Fabric, Mesh, Node, Workload, log::Stream, mesh::replace_file, wait_until,
};
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, answered, connect, echo, mesh_status, only, serve, status, text,
    was_reset,
};

const READINESS: u16 = 15021;
const BROKEN: &str = "workloads: []\npolicies:\n  - name: a\n    namespace: b\n    scope: Namespace\n    action: Alow\n";

#[test]
fn a_broken_change_leaves_the_old_mesh_in_force() -> Result<()> {
    let mut scene = Scene::of_a_file()?;
    let server = serve(scene.server_b()?, "echo")?;
    let mark = scene.agent2()?.log().mark();
    replace_file(&scene.mesh_file(), BROKEN)?;
    let line = scene
        .agent2()?
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
    assert_eq!(
        scene.agent2()?.get(READINESS, "/healthz/ready")?.status,
        200
    );
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    assert!(!answered(&echo(&scene.intruder, scene.server_b()?)?));
    assert_eq!(accepted_from(&server, scene.server_b()?)?.len(), 1);
    scene.change_mesh(|mesh| mesh.policies.clear())?;
    assert!(
        !status(&scene.agent1)?["warnings"]
            .to_string()
            .contains("mesh file")
    );
    assert!(answered(&echo(&scene.intruder, scene.server_b()?)?));
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

/// A pod is enrolled while no mesh was ever in force, and connects to a pod that the mesh will have. Tells whether what it
/// sends passes between the nodes in clear; then the file is repaired.
fn leaks_before_the_mesh(first: Option<&str>, knobs: &str) -> Result<bool> {
    const MARKER: &str = "nobody-else-may-read-this";
    let fabric = Fabric::new()?;
    let (node1, node2) = (fabric.node()?, fabric.node()?);
    let (client, server) = (node1.pod("client")?, node2.pod("server")?);
    let workloads = [&client, &server].map(|pod| Workload::of_pod(pod, NAMESPACE, pod.name()));
    let file = Agent::default_mesh_file(&node1);
    if let Some(text) = first {
        replace_file(&file, text)?;
    }
    let mut options = AgentOptions::default();
    if !knobs.is_empty() {
        options
            .env
            .insert("CULVERT_TEST_KNOBS".to_owned(), knobs.to_owned());
    }
    let agents = [
        node1.start_agent(options.clone())?,
        node2.start_agent(options)?,
    ];
    for agent in &agents {
        wait_until(SOON, "an answer", || {
            Ok(agent.get(READINESS, "/healthz/ready").ok())
        })?;
    }
    agents[0].enrol_as(&client, &workloads[0])?;
    let _server = serve(&server, "echo")?;
    let capture = fabric.capture()?;
    let length = MARKER.len().to_string();
    let send = ["--send", MARKER, "--read", &length];
    let mark = agents[0].log().mark();
    let report = connect(&client, &server, &send)?;
    let leaked = capture.contains(MARKER.as_bytes())?;
    assert_eq!(text(&report, "data") == MARKER, leaked, "{report}");
    if leaked {
        return Ok(true);
    }
    assert!(was_reset(&report), "{report}");
    super::access::wait_for_failure(&agents[0], mark, "the mesh is not known yet", &[])?;
    let mesh = Mesh {
        workloads: workloads.to_vec(),
        ..Mesh::default()
    };
    mesh.write(&file)?;
    for agent in &agents {
        agent.ready()?;
    }
    agents[1].enrol_as(&server, &workloads[1])?;
    let mark = agents[0].log().mark();
    let report = connect(&client, &server, &send)?;
    assert_eq!(text(&report, "data"), MARKER, "{report}");
    agents[0].wait_for_access(mark, &[("path", "hbone"), ("src.workload", "client")], SOON)?;
    capture.contains(MARKER.as_bytes())
}

#[test]
fn nothing_leaves_in_clear_while_the_first_mesh_is_broken() -> Result<()> {
    assert!(!leaks_before_the_mesh(Some(BROKEN), "")?);
    Ok(())
}

#[test]
fn nothing_leaves_in_clear_before_there_is_a_mesh() -> Result<()> {
    assert!(!leaks_before_the_mesh(None, "")?);
    Ok(())
}

#[test]
fn twin_everything_leaves_in_clear_before_there_is_a_mesh_when_none_is_awaited() -> Result<()> {
    assert!(leaks_before_the_mesh(None, "skip-mesh-wait")?);
    Ok(())
}

/// An agent with the mesh in its environment, in the place of a file.
fn agent_with_text(node: &Node, text: &str) -> Result<Agent> {
    let mut options = AgentOptions::default();
    let env = [("LOCAL_XDS_PATH", ""), ("LOCAL_XDS", text)];
    let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
    options.env.extend(env);
    node.start_agent(options)
}

#[test]
fn a_mesh_that_is_given_as_text_is_in_force() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let (client, server, intruder) = (
        node.pod("client")?,
        node.pod("server")?,
        node.pod("intruder")?,
    );
    let pods = [&client, &server, &intruder];
    let mesh = Mesh {
        workloads: pods
            .map(|pod| Workload::of_pod(pod, NAMESPACE, pod.name()))
            .to_vec(),
        policies: vec![only("client")],
        ..Mesh::default()
    };
    let file = node.directory().join("mesh-as-text.yaml");
    mesh.write(&file)?;
    let agent = agent_with_text(&node, &std::fs::read_to_string(&file)?)?;
    agent.ready()?;
    for (pod, workload) in pods.into_iter().zip(&mesh.workloads) {
        agent.enrol_as(pod, workload)?;
    }
    let _server = serve(&server, "echo")?;
    assert!(answered(&echo(&client, &server)?));
    assert!(!answered(&echo(&intruder, &server)?));
    assert!(mesh_status(&agent)?.contains("revision 1"));
    Ok(())
}

#[test]
fn a_broken_mesh_that_is_given_as_text_keeps_the_agent_from_starting() -> Result<()> {
    let fabric = Fabric::new()?;
    let agent = agent_with_text(&fabric.node()?, BROKEN)?;
    assert!(!agent.process().wait(SOON)?.success());
    let said = agent.log().text(Stream::Err);
    assert!(said.contains("LOCAL_XDS:6:13:"), "{said}");
    Ok(())
}
