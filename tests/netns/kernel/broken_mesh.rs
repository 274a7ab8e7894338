//! A new agent that finds a mesh file it cannot read: what an earlier one decided stands until there is a mesh. Agents of a file, as a
//! control plane goes on telling the mesh before.

use anyhow::Result;
use culvert_harness::{Agent, AgentOptions, mesh::replace_file, wait_until};
use culvert_tests::scene::{
    SOON, Scene, Setting, answered, connect, echo, hold, only, serve, text,
};

use crate::agent_gone::goes_on;

const BROKEN: &str = "workloads: 7\n";

/// An allowed and a refused pair whose verdicts are known; then the agent is killed and another finds a broken mesh file.
fn taken_over(scene: &Scene, env: &[(&str, &str)]) -> Result<Agent> {
    for pod in [&scene.client, &scene.intruder] {
        connect(pod, &scene.server_a, &["--send", "x", "--read", "1"])?;
    }
    scene.agent1.kill()?;
    replace_file(&scene.mesh_file(), BROKEN)?;
    let mut options = AgentOptions::default();
    let env = env
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    options.env.extend(env);
    let agent = scene.node1.start_agent(options)?;
    agent
        .process()
        .wait_for_line("there is no valid mesh yet", SOON)?;
    Ok(agent)
}

fn mended(scene: &Scene, agent: &Agent) -> Result<()> {
    scene.mesh.write(&scene.mesh_file())?;
    agent.ready()?;
    wait_until(SOON, "connections to be judged again", || {
        let allowed = answered(&echo(&scene.client, &scene.server_a)?);
        Ok((allowed && !answered(&echo(&scene.intruder, &scene.server_a)?)).then_some(()))
    })
}

#[test]
fn what_was_decided_goes_on_while_the_mesh_file_is_broken() -> Result<()> {
    let scene = Scene::of_a_file()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let held = hold(&scene.client, &scene.server_a)?;
    goes_on(&held, "before")?;
    let agent = taken_over(&scene, &[])?;
    for _ in 0..3 {
        assert!(answered(&echo(&scene.client, &scene.server_a)?));
        let report = echo(&scene.intruder, &scene.server_a)?;
        assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    }
    goes_on(&held, "while it is broken")?;
    let ready = agent.get(15021, "/healthz/ready")?;
    assert_eq!(ready.status, 500);
    assert!(ready.body.contains("mesh file"), "{}", ready.body);

    mended(&scene, &agent)?;
    goes_on(&held, "mended")?;
    // What the new agent decides is in force again.
    let mut mesh = scene.mesh.clone();
    mesh.policies = vec![only("nobody")];
    mesh.write(&scene.mesh_file())?;
    held.wait_for_event("end", SOON)?;
    Ok(())
}

#[test]
fn what_was_decided_ends_some_time_after_the_agent_that_decided_it() -> Result<()> {
    const MAX_AGE: (&str, &str) = ("CULVERT_VERDICT_MAX_AGE", "5s");
    let scene = Scene::with(Setting {
        env: vec![(MAX_AGE.0, MAX_AGE.1.to_owned())],
        mesh_file: true,
        ..Setting::default()
    })?;
    let _server = serve(&scene.server_a, "echo")?;
    let agent = taken_over(&scene, &[MAX_AGE])?;
    wait_until(SOON, "verdicts to end", || {
        Ok((!answered(&echo(&scene.client, &scene.server_a)?)).then_some(()))
    })?;
    mended(&scene, &agent)
}

#[test]
fn a_pod_that_is_removed_and_enrolled_again_meanwhile_is_nobody_until_there_is_a_mesh() -> Result<()>
{
    let scene = Scene::of_a_file()?;
    let _server = serve(&scene.server_a, "echo")?;
    let agent = taken_over(&scene, &[])?;
    let workload = scene.workload(&scene.client)?;
    agent.unenrol(&workload.uid)?;
    agent.enrol_as(&scene.client, workload)?;
    assert!(!answered(&echo(&scene.client, &scene.server_a)?));
    mended(&scene, &agent)
}
