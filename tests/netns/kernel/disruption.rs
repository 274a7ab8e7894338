//! Pods under load join the mesh and leave it: what was open goes on, whichever way it goes, and no connect fails.

use anyhow::{Result, anyhow};
use culvert_abi::Pod as PodEntry;
use culvert_harness::{Pod, Proc, Workload, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, echo, hold, plug_in, serve, text, unplug,
};

use crate::{
    agent_gone::goes_on,
    enrolment::network,
    kernel_tables::{claims, table},
    life::{churn, end, nothing_lost},
};

/// Whether new connections are the mesh's: the agent's log has them with the client's identity.
fn is_in_the_mesh(scene: &Scene, to: &Pod, path: &str) -> Result<()> {
    let mark = scene.agent1.log().mark();
    assert_eq!(text(&echo(&scene.client, to)?, "data"), "hello");
    let identity = format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/client");
    let fields = [("src.identity", identity.as_str()), ("path", path)];
    scene.agent1.wait_for_access(mark, &fields, SOON).map(drop)
}

fn speak(scene: &mut Scene, server: &str, protocol: &str) -> Result<()> {
    let server = server.to_owned();
    scene.change_mesh(|mesh| {
        let named = |workload: &&mut Workload| workload.name == server;
        if let Some(workload) = mesh.workloads.iter_mut().find(named) {
            workload.protocol = protocol.to_owned();
        }
    })
}

fn all_go_on(held: &[Proc], word: &str) -> Result<()> {
    held.iter().try_for_each(|held| goes_on(held, word))
}

/// A direct handshake of the client, during which one of the two pods leaves. The SYN is lost once, so that it takes a second.
fn handshake_while_leaving(whose: impl Fn(&Scene) -> &Pod) -> Result<()> {
    let scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let leaving = whose(&scene);
    let uid = scene.workload(leaving)?.uid.clone();
    let cookie = leaving.netns().cookie()?;
    unplug(&scene.server_a)?;
    let connecting = scene
        .client
        .probe()?
        .args(["connect", "--to", &scene.server_a.at(PORT), "--hold"])
        .stdin()
        .spawn()?;
    wait_until(SOON, "a claim", || {
        Ok((!claims(&scene.node1)?.is_empty()).then_some(()))
    })?;
    std::thread::scope(|scope| -> Result<()> {
        let left = scope.spawn(|| scene.agent1.unenrol(&uid));
        wait_until(SOON, "the pod to be out", || {
            let pods = table::<u64, PodEntry>(&scene.node1, "PODS")?;
            Ok(pods.get(&cookie, 0).is_err().then_some(()))
        })?;
        plug_in(&scene.server_a)?;
        left.join().map_err(|_| anyhow!("panicked"))?
    })?;
    let connected = connecting.wait_for_event("connected", SOON)?;
    assert_eq!(text(&connected, "connect"), "ok", "{connected}");
    goes_on(&connecting, "hello")?;
    connecting.close_stdin();
    wait_until(SOON, "no claim to be left", || {
        Ok(claims(&scene.node1)?.is_empty().then_some(()))
    })
}

#[test]
fn a_handshake_of_a_pod_that_leaves_is_finished() -> Result<()> {
    handshake_while_leaving(|scene| &scene.client)
}

#[test]
fn a_handshake_with_a_pod_that_leaves_is_finished() -> Result<()> {
    handshake_while_leaving(|scene| &scene.server_a)
}

#[test]
fn pods_under_load_join_and_leave_without_a_reset() -> Result<()> {
    let mut scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    let client = scene.workload(&scene.client)?.clone();
    let server = scene.workload(&scene.server_a)?.clone();
    scene.agent1.unenrol(&client.uid)?;
    scene.agent1.unenrol(&server.uid)?;
    let before = network(&scene.client)?;
    speak(&mut scene, "server-a", "TCP")?;
    let loads = [
        churn(&scene.client, &scene.server_a)?,
        churn(&scene.client, scene.server_b()?)?,
    ];
    let mut held = vec![
        hold(&scene.client, &scene.server_a)?,
        hold(&scene.client, scene.server_b()?)?,
    ];
    all_go_on(&held, "outside")?;
    for round in 0..2 {
        // First the pod, then what the mesh says of it, as istio-cni and istiod do it; and the other way round.
        scene.agent1.enrol_as(&scene.server_a, &server)?;
        speak(&mut scene, "server-a", "HBONE")?;
        all_go_on(&held, "the server is in")?;
        scene.agent1.enrol_as(&scene.client, &client)?;
        all_go_on(&held, "both are in")?;
        is_in_the_mesh(&scene, scene.server_b()?, "hbone")?;
        scene.warm(&scene.client, &scene.server_a)?;
        is_in_the_mesh(&scene, &scene.server_a, "direct")?;
        held.push(hold(&scene.client, &scene.server_a)?);
        held.push(hold(&scene.client, scene.server_b()?)?);
        all_go_on(&held, &format!("round {round}"))?;
        scene.agent1.unenrol(&client.uid)?;
        all_go_on(&held, "the client is out")?;
        speak(&mut scene, "server-a", "TCP")?;
        scene.agent1.unenrol(&server.uid)?;
        all_go_on(&held, "both are out")?;
    }
    for load in &loads {
        nothing_lost(&end(load)?);
    }
    all_go_on(&held, "the end")?;
    // What carried them is taken down with the last of them.
    drop(held);
    wait_until(SOON, "the pod to be as it was", || {
        Ok((network(&scene.client)? == before).then_some(()))
    })
}
