//! A change of policy: it cuts exactly the open flows that it forbids, and binds new connections at once.

use anyhow::Result;
use culvert_harness::{Match, Pod, Policy, Proc, TcpState, wait_until};
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, Setting, answered, echo, hold, only, serve, text,
};
use serde_json::Value;

use crate::{
    agent_gone::goes_on,
    kernel_tables::{decisions, flows},
};

const RESET: [&str; 2] = ["ECONNRESET", "ECONNABORTED"];

fn both() -> Vec<Policy> {
    let intruder = Policy {
        name: "the-intruder-too".into(),
        ..only("intruder")
    };
    vec![only("client"), intruder]
}

struct Stage {
    scene: Scene,
    server: Proc,
    client: Proc,
    intruder: Proc,
}

/// Two direct flows to one server, both allowed for now.
fn two_flows(knobs: &'static str) -> Result<Stage> {
    let scene = Scene::with(Setting {
        knobs,
        policies: Some(both()),
        ..Setting::default()
    })?;
    let server = serve(&scene.server_a, "echo")?;
    for pod in [&scene.client, &scene.intruder] {
        scene.warm(pod, &scene.server_a)?;
    }
    let (client, intruder) = (
        hold(&scene.client, &scene.server_a)?,
        hold(&scene.intruder, &scene.server_a)?,
    );
    for held in [&client, &intruder] {
        goes_on(held, "before")?;
    }
    wait_until(SOON, "two direct flows", || {
        Ok((flows(&scene.node1)?.len() == 2).then_some(()))
    })?;
    Ok(Stage {
        scene,
        server,
        client,
        intruder,
    })
}

fn forbid(stage: &Stage) -> Result<()> {
    let mut mesh = stage.scene.mesh.clone();
    mesh.policies = vec![only("client")];
    stage.scene.tell(&mesh)
}

#[test]
fn a_policy_change_cuts_the_flow_it_forbids_and_no_other() -> Result<()> {
    let stage = two_flows("")?;
    let log = stage.scene.agent1.log().mark();
    forbid(&stage)?;
    let end = stage.intruder.wait_for_event("end", SOON)?;
    assert!(RESET.contains(&text(&end, "how")), "{end}");
    let peer = format!("{}:", stage.scene.intruder.address());
    let cut: Value = wait_until(SOON, "the server's end to be cut", || {
        let ends = stage.server.events("closed");
        Ok(ends
            .into_iter()
            .find(|end| text(end, "peer").starts_with(&peer) && end["bytes_read"] != 1))
    })?;
    assert!(RESET.contains(&text(&cut, "end")), "{cut}");
    goes_on(&stage.client, "after")?;
    let fields = [
        ("src.workload", "intruder"),
        ("path", "direct"),
        ("error", "policy changed and denies"),
    ];
    stage.scene.agent1.wait_for_access(log, &fields, SOON)?;
    assert_eq!(
        stage
            .scene
            .agent1
            .metric("culvert_revoked_flows_total", &["path=\"direct\""])?,
        1.0
    );
    assert_eq!(flows(&stage.scene.node1)?.len(), 1);
    Ok(())
}

/// Policy that an address may pass, too: a pod that is not enrolled has nothing else to show.
fn and_from(outsider: &Pod, account: &str) -> Vec<Policy> {
    let source = Match::source(&format!("{}/32", outsider.address()));
    let outside = Policy::allow(NAMESPACE, "the-outsider").when(source);
    vec![only(account), outside]
}

#[test]
fn the_listeners_of_both_pods_survive_the_cut_of_a_flow() -> Result<()> {
    let mut scene = Scene::with(Setting {
        policies: Some(both()),
        ..Setting::default()
    })?;
    let outsider = scene.node1.pod("outsider")?;
    let servers = [&scene.client, &scene.server_a, &scene.intruder];
    let _servers: Vec<_> = servers
        .iter()
        .map(|pod| serve(pod, "echo"))
        .collect::<Result<_>>()?;
    let listening = |pod: &Pod| -> Result<Vec<_>> {
        let sockets = pod.sockets()?.into_iter();
        let mut found: Vec<_> = sockets
            .filter(|socket| socket.state == TcpState::Listen)
            .map(|socket| (socket.local.port(), socket.inode))
            .collect();
        found.sort_unstable();
        Ok(found)
    };
    let before = [listening(&scene.intruder)?, listening(&scene.server_a)?];
    scene.warm(&scene.intruder, &scene.server_a)?;
    let doomed = hold(&scene.intruder, &scene.server_a)?;
    goes_on(&doomed, "before")?;
    scene.change_mesh(|mesh| mesh.policies = and_from(&outsider, "client"))?;
    doomed.wait_for_event("end", SOON)?;
    for pod in [&scene.intruder, &scene.server_a, &scene.client] {
        let report = echo(&outsider, pod)?;
        assert!(answered(&report), "{}: {report}", pod.name());
    }
    let after = [listening(&scene.intruder)?, listening(&scene.server_a)?];
    assert_eq!(before, after);
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    Ok(())
}

#[test]
fn twin_without_the_sweep_the_forbidden_flow_goes_on() -> Result<()> {
    let stage = two_flows("skip-sweep")?;
    forbid(&stage)?;
    wait_until(SOON, "the change to bind new connections", || {
        Ok((!answered(&echo(&stage.scene.intruder, &stage.scene.server_a)?)).then_some(()))
    })?;
    goes_on(&stage.intruder, "after")
}

/// New connections of the intruder once the change is in effect, with its old verdict left in the kernel part.
fn connect_under_an_old_verdict(knobs: &'static str) -> Result<(Stage, bool)> {
    let stage = two_flows(knobs)?;
    let before = decisions(&stage.scene.agent1, "steered_old_generation")?;
    forbid(&stage)?;
    // The client's verdict is as old as the intruder's: when it no longer counts, or surely would not, all is in effect.
    let bound = knobs.contains("skip-generation");
    wait_until(SOON, "the change to bind", || {
        assert!(answered(&echo(&stage.scene.client, &stage.scene.server_a)?));
        Ok(
            (bound || decisions(&stage.scene.agent1, "steered_old_generation")? > before)
                .then_some(()),
        )
    })?;
    let answered = answered(&echo(&stage.scene.intruder, &stage.scene.server_a)?);
    Ok((stage, answered))
}

#[test]
fn a_verdict_of_an_older_policy_does_not_admit() -> Result<()> {
    let (_stage, answered) = connect_under_an_old_verdict("skip-sweep")?;
    assert!(!answered);
    Ok(())
}

#[test]
fn twin_without_generations_a_verdict_of_an_older_policy_admits() -> Result<()> {
    let (_stage, answered) = connect_under_an_old_verdict("skip-sweep,skip-generation")?;
    assert!(answered);
    Ok(())
}

#[test]
fn a_policy_that_allows_again_is_obeyed_at_once() -> Result<()> {
    let stage = two_flows("")?;
    forbid(&stage)?;
    stage.intruder.wait_for_event("end", SOON)?;
    let scene = &stage.scene;
    for _ in 0..2 {
        assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    }
    scene.mesh.write(&scene.mesh_file())?;
    wait_until(SOON, "the intruder to be allowed", || {
        Ok(answered(&echo(&scene.intruder, &scene.server_a)?).then_some(()))
    })?;
    goes_on(&stage.client, "all the time")
}
