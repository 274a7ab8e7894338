//! The short-circuit, where both pods have it on: what is sent goes straight into the other end's receive queue, in order and counted.

use anyhow::{Context as _, Result};
use aya::maps::MapError;
use culvert_abi::{Address, Endpoint, FlowKey, Pod, ShortFlow};
use culvert_harness::{Namespace, Proc, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, answered, connect_to, echo, hold, principal, serve,
};

use crate::{
    agent_gone::goes_on,
    kernel_tables::{flows, table},
};

pub const COUNT: usize = 20;

/// A scene in whose namespace the annotation says so, or nothing does.
fn scene(mode: Option<&str>) -> Result<Scene> {
    let mut scene = Scene::new()?;
    if let Some(mode) = mode {
        say(&mut scene, mode)?;
    }
    Ok(scene)
}

/// Says of all pods whether their flows are short-circuited, and waits until the kernel part knows.
pub fn say(scene: &mut Scene, mode: &str) -> Result<()> {
    let namespace = Namespace::annotated(NAMESPACE, "culvert.dev/short-circuit", mode);
    scene.change_mesh(|mesh| mesh.namespaces = vec![namespace])?;
    wait_until(SOON, "the kernel part to know", || {
        let pods = table::<u64, Pod>(&scene.node1, "PODS")?;
        let endpoints = table::<Address, Endpoint>(&scene.node1, "ENDPOINTS")?;
        let pods = pods
            .iter()
            .map(|entry| Ok(entry?.1.flags & Pod::SHORT_CIRCUIT));
        let endpoints = endpoints
            .iter()
            .map(|entry| Ok(entry?.1.flags & Endpoint::SHORT_CIRCUIT));
        let flags = pods
            .chain(endpoints)
            .collect::<Result<Vec<_>, MapError>>()?;
        let know = flags.iter().all(|flag| (*flag != 0) == mode.contains("on"));
        Ok(know.then_some(()))
    })
}

/// All pods have the short-circuit on, and the first connection of `client` to `server-a` has been.
pub fn stage(knobs: &'static str) -> Result<Scene> {
    let mut scene = Scene::without(knobs)?;
    say(&mut scene, "on")?;
    scene.warm(&scene.client, &scene.server_a)?;
    Ok(scene)
}

fn busy_pair(scene: &Scene) -> Result<(Proc, Proc)> {
    busy_pair_at(scene, PORT)
}

/// Programs with non-blocking sockets, each of whose connections has a byte there and back all the time.
pub fn busy_pair_at(scene: &Scene, port: u16) -> Result<(Proc, Proc)> {
    let target = &scene.server_a;
    let to = target.at(port);
    let server = target
        .probe()?
        .args(["serve-many", "--port", &port.to_string()])
        .stdin()
        .spawn()?;
    server.wait_for_event("listening", SOON)?;
    connect_to(&scene.client, &to, &["--send", "x", "--read", "1"])?;
    let client = scene
        .client
        .probe()?
        .args(["many", "--to", &to, "--every-ms", "20"])
        .args(["--count", &COUNT.to_string()])
        .stdin()
        .spawn()?;
    client.wait_for_event("open", SOON)?;
    Ok((client, server))
}

pub fn short_flows(scene: &Scene) -> Result<Vec<(FlowKey, ShortFlow)>> {
    Ok(table(&scene.node1, "SHORT_FLOWS")?
        .iter()
        .flatten()
        .collect())
}

/// What became of all flows and messages so far.
pub fn outcomes(scene: &Scene) -> String {
    let metrics = scene.agent1.metrics().unwrap_or_default();
    let lines = metrics.lines().filter(|line| {
        let told = ["culvert_short_circuited_", "culvert_kernel_decisions_total"];
        told.iter().any(|name| line.starts_with(name)) && !line.ends_with(" 0")
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// All flows of [`busy_pair_at`].
pub fn wait_until_all_entered(scene: &Scene) -> Result<()> {
    let entered = wait_until(SOON, "all flows to be entered", || {
        Ok((scene.short_circuited()? == COUNT as f64).then_some(()))
    });
    entered.with_context(|| outcomes(scene))
}

/// How many bytes were sent and received so far.
pub fn bytes(client: &Proc) -> Result<u64> {
    let mark = client.log().mark();
    client.send_line("")?;
    let tally = client.wait_for_event_after(mark, "tally", SOON)?;
    Ok(tally["bytes"].as_u64().unwrap_or_default())
}

#[test]
fn busy_flows_are_short_circuited_where_both_pods_have_it_on() -> Result<()> {
    let scene = scene(Some("on"))?;
    let (client, _server) = busy_pair(&scene)?;
    wait_until_all_entered(&scene)?;
    wait_until(SOON, "both sides of each flow to redirect", || {
        let all = short_flows(&scene)?;
        let each = all.iter().flat_map(|(_, flow)| flow.sides);
        let redirecting = each.filter(|side| side.messages > 10).count();
        Ok((redirecting == 2 * COUNT).then_some(()))
    })?;
    let before = bytes(&client)?;
    wait_until(SOON, "the flows to go on", || {
        Ok((bytes(&client)? > before + COUNT as u64).then_some(()))
    })?;
    Ok(())
}

#[test]
fn no_flow_is_short_circuited_where_nobody_asked_or_one_pod_must_not() -> Result<()> {
    for mode in [None, Some("auto"), Some("off"), Some("on")] {
        let mut scene = scene(mode)?;
        if mode == Some("on") {
            scene.change_mesh(|mesh| {
                if let Some(server) = mesh.workload("server-a") {
                    let off = ("culvert.dev/short-circuit".to_owned(), "off".to_owned());
                    server.annotations.extend([off]);
                }
            })?;
        }
        let (client, _server) = busy_pair(&scene)?;
        wait_until(SOON, "the flows to carry something", || {
            Ok((bytes(&client)? > 100 * COUNT as u64).then_some(()))
        })?;
        assert_eq!(scene.short_circuited()?, 0.0, "{mode:?}");
        assert_eq!(short_flows(&scene)?, [], "{mode:?}");
    }
    Ok(())
}

#[test]
fn blocking_programs_are_not_short_circuited() -> Result<()> {
    let scene = scene(Some("on"))?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let held = hold(&scene.client, &scene.server_a)?;
    for _ in 0..20 {
        goes_on(&held, "again")?;
    }
    wait_until(SOON, "the flow to be refused", || {
        Ok((scene.proposed("blocking")? == 1.0).then_some(()))
    })?;
    assert_eq!(short_flows(&scene)?, []);
    assert_eq!(flows(&scene.node1)?.len(), 1);
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    Ok(())
}

/// What TCP does not see is in the telemetry all the same.
#[test]
fn redirected_bytes_are_counted_with_the_others() -> Result<()> {
    let scene = scene(Some("on"))?;
    let (client, server) = busy_pair(&scene)?;
    wait_until(SOON, "much to be redirected", || {
        Ok((bytes(&client)? > 200 * COUNT as u64).then_some(()))
    })?;
    drop(client);
    drop(server);
    let name = "istio_tcp_received_bytes_total";
    let from = format!("source_principal=\"spiffe://{}\"", principal("client"));
    let labels = ["reporter=\"source\"", &from];
    wait_until(SOON, "the flows to be reported", || {
        let counted = scene.agent1.metric(name, &labels)?;
        Ok((counted > 99.0 * COUNT as f64).then_some(()))
    })?;
    assert_eq!(short_flows(&scene)?, []);
    Ok(())
}
