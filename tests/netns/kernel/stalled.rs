//! A process that keeps the kernel busy with one of its sockets: it holds up its own pod and nobody else.

use anyhow::Result;
use culvert_harness::{Proc, lacks, wait_until};
use culvert_tests::scene::{SOON, Scene, Setting, hold, only, serve, status, text};

use crate::kernel_tables::flows;

const RESET: [&str; 2] = ["ECONNRESET", "ECONNABORTED"];
const STUCK: &str = "culvert_stuck_pods";

struct Stage {
    scene: Scene,
    stalled: Proc,
    intruder: Proc,
    _server: Proc,
}

/// A flow of the client's whose socket is held, and one of the intruder's; then both are forbidden.
fn forbidden_while_held() -> Result<Stage> {
    let scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let server = serve(&scene.server_a, "sink")?;
    for pod in [&scene.client, &scene.intruder] {
        scene.warm(pod, &scene.server_a)?;
    }
    let to = scene.server_a.at(culvert_tests::scene::PORT);
    let stalled = scene.client.probe()?.args(["stall", "--to", &to]);
    let stalled = stalled.stdin().spawn()?;
    stalled.wait_for_event("stalled", SOON)?;
    let intruder = hold(&scene.intruder, &scene.server_a)?;
    wait_until(SOON, "two direct flows", || {
        Ok((flows(&scene.node1)?.len() == 2).then_some(()))
    })?;
    let mut mesh = scene.mesh.clone();
    mesh.policies = vec![only("nobody")];
    mesh.write(&scene.mesh_file())?;
    Ok(Stage {
        scene,
        stalled,
        intruder,
        _server: server,
    })
}

#[test]
fn a_process_that_keeps_a_socket_busy_holds_up_its_own_pod_only() -> Result<()> {
    let stage = forbidden_while_held()?;
    let agent = &stage.scene.agent1;
    let stuck = wait_until(SOON, "the pod to be known as stuck", || {
        let stuck = agent.metric(STUCK, &[])?;
        Ok((stuck >= 1.0).then_some(stuck))
    })?;
    let cut = || -> Result<()> {
        let end = stage.intruder.wait_for_event("end", SOON)?;
        assert!(RESET.contains(&text(&end, "how")), "{end}");
        Ok(())
    };
    if stuck > 1.0 {
        lacks(
            "sock_diag in several namespaces at once",
            "one that waits for a socket keeps all others waiting",
        );
    } else {
        cut()?;
        assert_eq!(agent.metric(STUCK, &[])?, 1.0);
        let uid = &stage.scene.workload(&stage.scene.client)?.uid;
        let said = agent
            .process()
            .wait_for_line("does not come to an end", SOON)?;
        assert!(said.contains(uid.as_str()), "{said}");
    }
    // The agent goes on with everything else.
    status(agent)?;
    let outsider = stage.scene.node1.pod("outsider")?;
    agent.enrol(
        &outsider,
        "cluster//Pod/demo/outsider",
        "demo",
        "outsider",
        "outsider",
    )?;
    agent.unenrol("cluster//Pod/demo/outsider")?;

    stage.stalled.close_stdin();
    if stuck > 1.0 {
        cut()?;
    }
    let end = stage.stalled.wait_for_event("end", SOON)?;
    assert!(RESET.contains(&text(&end, "how")), "{end}");
    wait_until(SOON, "the pod to be well again", || {
        Ok((agent.metric(STUCK, &[])? == 0.0).then_some(()))
    })?;
    wait_until(SOON, "no flow to be left", || {
        Ok(flows(&stage.scene.node1)?.is_empty().then_some(()))
    })
}
