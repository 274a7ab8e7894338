//! Revocation with 1,000 open flows: exactly those that a change forbids are reset, at both ends, and how long it took.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use culvert_harness::{Namespace, Pod, Policy, Proc, wait_until};
use culvert_tests::scene::{NAMESPACE, PORT, SOON, Scene, Setting, only};
use serde_json::Value;

use crate::kernel_tables::flows;

const FORBIDDEN: usize = 1000;
const ALLOWED: usize = 200;
/// Between two bytes on one connection: the flows are alive, and the processors are free for what is measured.
const EVERY_MS: &str = "1000";
const A_WHILE: Duration = Duration::from_secs(60);

fn both() -> Vec<Policy> {
    let intruder = Policy {
        name: "the-intruder-too".into(),
        ..only("intruder")
    };
    vec![only("client"), intruder]
}

fn many(from: &Pod, to: &Pod, count: usize) -> Result<Proc> {
    let count = count.to_string();
    let crowd = from
        .probe()?
        .args(["many", "--to", &to.at(PORT), "--count", &count])
        .args(["--every-ms", EVERY_MS])
        .stdin()
        .spawn()?;
    crowd.wait_for_event("open", A_WHILE)?;
    Ok(crowd)
}

/// What has become of the connections by now.
fn tally(crowd: &Proc) -> Result<Value> {
    let mark = crowd.log().mark();
    crowd.send_line("")?;
    crowd.wait_for_event_after(mark, "tally", SOON)
}

fn sum(tally: &Value) -> u64 {
    let ends = tally["ends"].as_object();
    ends.map_or(0, |ends| ends.values().filter_map(Value::as_u64).sum())
}

fn resets(tally: &Value) -> u64 {
    ["ECONNRESET", "ECONNABORTED", "EPIPE"]
        .iter()
        .filter_map(|how| tally["ends"][how].as_u64())
        .sum()
}

/// Cuts a crowd, and prints how many milliseconds after the write of the change the two ends saw their first and last reset.
fn revoke_a_crowd(
    what: &str,
    server_of: impl Fn(&Scene) -> Result<&Pod>,
    path: &str,
    namespaces: Vec<Namespace>,
) -> Result<()> {
    let mut scene = Scene::with(Setting {
        policies: Some(both()),
        ..Setting::default()
    })?;
    if !namespaces.is_empty() {
        scene.change_mesh(|mesh| mesh.namespaces = namespaces)?;
    }
    let target = server_of(&scene)?;
    let server = target
        .probe()?
        .args(["serve-many", "--port", &PORT.to_string()])
        .stdin()
        .spawn()?;
    server.wait_for_event("listening", SOON)?;
    for pod in [&scene.client, &scene.intruder] {
        scene.warm(pod, target)?;
    }
    let allowed = many(&scene.client, target, ALLOWED)?;
    let forbidden = many(&scene.intruder, target, FORBIDDEN)?;
    let direct = if path == "direct" {
        FORBIDDEN + ALLOWED
    } else {
        0
    };
    assert_eq!(flows(&scene.node1)?.len(), direct);
    // Through a proxy, the client's end is open before the server's is.
    let ended_before = wait_until(SOON, "all flows to be open at the server", || {
        let tally = tally(&server)?;
        Ok((tally["open"] == FORBIDDEN + ALLOWED).then(|| sum(&tally)))
    })?;
    let bytes_before = tally(&allowed)?["bytes"].as_u64();
    let mut mesh = scene.mesh.clone();
    mesh.policies = vec![only("client")];
    let written = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
    mesh.write(&scene.mesh_file())?;
    let end = forbidden.wait_for_event("all_ended", A_WHILE)?;
    assert_eq!(resets(&end), FORBIDDEN as u64, "{end}");
    let mut last = Value::Null;
    let waited = wait_until(SOON, "the server's ends to be reset", || {
        last = tally(&server)?;
        Ok((sum(&last) - ended_before >= FORBIDDEN as u64).then(|| last.clone()))
    });
    let at_server = waited.with_context(|| last.to_string())?;
    assert_eq!(at_server["open"], ALLOWED, "{at_server}");
    assert_eq!(resets(&at_server), FORBIDDEN as u64, "{at_server}");
    let at_allowed = wait_until(SOON, "the allowed flows to go on", || {
        let tally = tally(&allowed)?;
        Ok((tally["bytes"].as_u64() > bytes_before).then_some(tally))
    })?;
    assert_eq!(at_allowed["open"], ALLOWED, "{at_allowed}");
    assert_eq!(sum(&at_allowed), 0, "{at_allowed}");
    let label = format!("path=\"{path}\"");
    let revoked = || -> Result<f64> {
        let agents = scene.agents().into_iter();
        agents
            .map(|agent| agent.metric("culvert_revoked_flows_total", &[&label]))
            .sum()
    };
    wait_until(SOON, "every cut to be counted", || {
        Ok((revoked()? == FORBIDDEN as f64).then_some(()))
    })?;
    let since = |tally: &Value, field: &str| -> Result<f64> {
        let at = tally[field].as_u64().context("a time")?;
        ensure!(u128::from(at) >= written, "reset before the change");
        Ok((u128::from(at) - written) as f64 / 1000.0)
    };
    println!(
        "{FORBIDDEN} {what} flows, after the write of the change: the first reset at the client {:.1} ms, the last {:.1} ms; the last at the server {:.1} ms",
        since(&end, "first_end_us")?,
        since(&end, "last_end_us")?,
        since(&at_server, "last_end_us")?,
    );
    Ok(())
}

#[test]
fn a_thousand_direct_flows_are_cut_at_both_ends_and_no_other_is_touched() -> Result<()> {
    revoke_a_crowd("direct", |scene| Ok(&scene.server_a), "direct", vec![])
}

#[test]
fn a_thousand_proxied_flows_are_cut_at_both_ends_and_no_other_is_touched() -> Result<()> {
    revoke_a_crowd("proxied", |scene| scene.server_b(), "hbone", vec![])
}

#[test]
fn a_thousand_proxied_flows_of_one_node_are_cut_at_both_ends_and_no_other_is_touched() -> Result<()>
{
    let off = Namespace::annotated(NAMESPACE, "culvert.dev/direct", "off");
    revoke_a_crowd(
        "proxied same-node",
        |scene| Ok(&scene.server_a),
        "hbone",
        vec![off],
    )
}
