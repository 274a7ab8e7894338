//! What is told of short-circuited flows, and of those that were not: records, metrics and `culvert status`.

use anyhow::Result;
use culvert_harness::{AgentOptions, Proc, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, answered, echo, hold, serve, status};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    agent_gone::goes_on,
    short_circuit::{COUNT, busy_pair_at, bytes, say, wait_until_all_entered},
    telemetry::{flows, stop},
};

/// A scene whose namespace says this.
fn scene(word: &str) -> Result<Scene> {
    let mut scene = Scene::new()?;
    say(&mut scene, word)?;
    Ok(scene)
}

/// The records of direct flows in such events of `culvert flows`.
fn records(shown: &Proc, event: &str) -> Vec<Value> {
    let events = shown.events(event).into_iter();
    let flows = events.map(|event| event["flow"].clone());
    flows.filter(|flow| flow["path"] == "direct").collect()
}

fn ended(shown: &Proc, count: usize) -> Result<Vec<Value>> {
    wait_until(SOON, "the ends to be told", || {
        let ended = records(shown, "closed");
        Ok((ended.len() >= count).then_some(ended))
    })
}

fn sum(records: &[Value], field: &str) -> u64 {
    let values = records.iter().map(|record| record[field].as_u64());
    values.flatten().sum()
}

fn metric(scene: &Scene, name: &str, labels: &[&str]) -> Result<u64> {
    let name = format!("culvert_short_circuited_{name}");
    Ok(scene.agent1.metric(&name, labels)? as u64)
}

/// Stands the client still, and waits until the server has answered all; returns how many bytes came from direct flows.
fn settle(client: &Proc, server: &Proc) -> Result<u64> {
    stop(client)?;
    let mut last = 0;
    wait_until(SOON, "the server to have answered all", || {
        let now = bytes(server)?;
        let before = std::mem::replace(&mut last, now);
        Ok((before == now).then_some(()))
    })?;
    // The connection before was the agent's, with a byte.
    Ok(last - 1)
}

#[test]
fn short_circuited_flows_are_told_with_what_was_redirected() -> Result<()> {
    let mut scene = scene("on")?;
    let (client, server) = busy_pair_at(&scene, PORT)?;
    wait_until_all_entered(&scene)?;
    assert_eq!(metric(&scene, "flows_open", &[])?, COUNT as u64);
    let shown = flows(&scene)?;
    wait_until(SOON, "open flows to be told", || {
        let mut open = records(&shown, "opened");
        open.extend(records(&shown, "report"));
        let redirects = |flow: &&Value| {
            flow["short_circuit"] == "yes" && flow["redirected_sent"].as_u64() > Some(0)
        };
        Ok((open.iter().filter(redirects).count() >= COUNT).then_some(()))
    })?;
    let while_open = metric(&scene, "bytes_total", &["way=\"redirected\""])?;
    assert!(while_open > 0);
    let short = status(&scene.agent1)?["short_circuit"].clone();
    assert_eq!(
        (&short["on"], &short["flows"]),
        (&true.into(), &COUNT.into()),
        "{short}"
    );
    assert_eq!(
        (&short["direct_flows"], &short["unfit_pods"]),
        (&COUNT.into(), &0.into())
    );
    let text = scene.agent1.cli(["status"])?.success()?;
    let share = format!("{COUNT} of {COUNT} open direct flows");
    assert!(text.contains(&share), "{text}");

    let carried = settle(&client, &server)?;
    let log = scene.agent1.log().mark();
    client.kill(Signal::SIGKILL)?;
    let ended = ended(&shown, COUNT)?;
    for flow in &ended {
        assert_eq!(flow["short_circuit"], "yes", "{flow}");
        for way in ["sent", "received"] {
            let redirected = flow[format!("redirected_{way}")].as_u64();
            assert!(redirected > Some(0), "{flow}");
            assert!(
                redirected <= flow[format!("bytes_{way}")].as_u64(),
                "{flow}"
            );
        }
    }
    let totals = [sum(&ended, "bytes_received"), sum(&ended, "bytes_sent")];
    assert_eq!(totals, [carried, carried]);
    let redirected = sum(&ended, "redirected_received") + sum(&ended, "redirected_sent");
    let line = scene
        .agent1
        .wait_for_access(log, &[("short_circuit", "yes")], SOON)?;
    assert!(line.field("redirected_recv").is_some(), "{}", line.text);

    let counted = metric(&scene, "bytes_total", &["way=\"redirected\""])?;
    assert_eq!(counted, redirected);
    assert!(counted >= while_open);
    let by_tcp = metric(&scene, "bytes_total", &["way=\"tcp\""])?;
    assert!(counted + by_tcp <= 2 * carried, "{by_tcp}");
    // Of a byte each, or of more where the server was late.
    let messages = metric(&scene, "messages_total", &["outcome=\"redirected\""])?;
    assert!((1..=counted).contains(&messages), "{messages}");
    assert!((messages..=counted + by_tcp).contains(&metric(&scene, "messages_total", &[])?));
    assert_eq!(metric(&scene, "flows_open", &[])?, 0);
    assert_eq!(status(&scene.agent1)?["short_circuit"]["flows"], 0);

    // The kernel part counts, not the agent.
    scene.agent1.kill()?;
    scene.agent1 = scene.node1.start_agent(AgentOptions::default())?;
    scene.agent1.ready()?;
    let counted_still = metric(&scene, "bytes_total", &["way=\"redirected\""])?;
    assert_eq!(counted_still, counted);
    Ok(())
}

#[test]
fn flows_of_blocking_programs_are_told_as_such() -> Result<()> {
    let scene = scene("on")?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let shown = flows(&scene)?;
    let held = hold(&scene.client, &scene.server_a)?;
    for _ in 0..20 {
        goes_on(&held, "again")?;
    }
    wait_until(SOON, "the flow to be refused", || {
        let refused = metric(&scene, "flows_total", &["outcome=\"blocking\""])?;
        Ok((refused == 1).then_some(()))
    })?;
    let short = status(&scene.agent1)?["short_circuit"].clone();
    assert_eq!(
        (&short["flows"], &short["direct_flows"]),
        (&0.into(), &1.into()),
        "{short}"
    );
    let log = scene.agent1.log().mark();
    held.close_stdin();
    let blocking = [("short_circuit", "blocking")];
    let line = scene.agent1.wait_for_access(log, &blocking, SOON)?;
    assert_eq!(line.field("redirected_sent"), None, "{}", line.text);
    let ended = ended(&shown, 1)?;
    assert_eq!(ended[0]["short_circuit"], "blocking", "{}", ended[0]);
    assert!(ended[0].get("redirected_sent").is_none());
    assert_eq!(metric(&scene, "bytes_total", &[])?, 0);
    Ok(())
}

#[test]
fn a_flow_of_few_round_trips_was_brief() -> Result<()> {
    let scene = scene("on")?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let log = scene.agent1.log().mark();
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    let brief = [("path", "direct"), ("short_circuit", "brief")];
    scene.agent1.wait_for_access(log, &brief, SOON).map(drop)
}

/// On at another port is off here.
#[test]
fn where_it_is_off_lines_say_nothing_and_json_says_off() -> Result<()> {
    for word in [None, Some("7001=on")] {
        let scene = word.map_or_else(Scene::new, scene)?;
        let _server = serve(&scene.server_a, "echo")?;
        scene.warm(&scene.client, &scene.server_a)?;
        let shown = flows(&scene)?;
        let log = scene.agent1.log().mark();
        let held = hold(&scene.client, &scene.server_a)?;
        for _ in 0..20 {
            goes_on(&held, "again")?;
        }
        held.close_stdin();
        let line = scene
            .agent1
            .wait_for_access(log, &[("path", "direct")], SOON)?;
        for absent in ["short_circuit", "redirected"] {
            assert!(!line.text.contains(absent), "{}", line.text);
        }
        let ended = ended(&shown, 1)?;
        assert_eq!(ended[0]["short_circuit"], "off", "{word:?} {}", ended[0]);
        assert_eq!(metric(&scene, "flows_total", &[])?, 0);
    }
    Ok(())
}
