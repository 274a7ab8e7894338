//! Twenty thousand direct flows that are open at once: the agent lists and counts them all, answers meanwhile, and takes memory
//! in proportion, which it uses again.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};
use culvert_harness::{Pod, Proc, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, Setting};

use crate::{
    kernel_tables::{quota_of, quotas},
    telemetry::flows,
};

/// Of each of two pods; below the descriptors that a process may have, and below the flows of a pod.
const EACH: usize = 10_000;
/// Enough for three rounds within the minute for which a port is not used again.
const PORTS: &str = "20000 60999";
const A_WHILE: Duration = Duration::from_secs(120);
/// What a flow may cost: a look at all of them, and what is remembered of each, twice over while a table grows.
const BYTES_PER_FLOW: u64 = 3 * 1024;

fn serve_many(pod: &Pod) -> Result<Proc> {
    let serve = ["serve-many", "--port", &PORT.to_string()];
    let server = pod.probe()?.args(serve).stdin().spawn()?;
    server.wait_for_event("listening", SOON)?;
    Ok(server)
}

fn open_many(from: &Pod, to: &Pod) -> Result<Proc> {
    let (to, count) = (to.at(PORT), EACH.to_string());
    let many = ["many", "--to", &to, "--count", &count];
    let many = from.probe()?.args(many).args(["--every-ms", "5000"]);
    let many = many.stdin().spawn()?;
    many.wait_for_event("open", A_WHILE)?;
    Ok(many)
}

/// Bytes of the first node's agent that are in memory.
fn resident(scene: &Scene) -> Result<u64> {
    let path = format!("/proc/{}/status", scene.agent1.process().pid());
    let status = fs::read_to_string(&path)?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context(path)?.parse::<u64>()? * 1024)
}

fn open_flows(scene: &Scene) -> Result<usize> {
    let label = "path=\"direct\"";
    Ok(scene.agent1.metric("culvert_open_flows", &[label])? as usize)
}

fn wait_for_open_flows(scene: &Scene, wanted: usize) -> Result<()> {
    wait_until(A_WHILE, "the flows to be counted", || {
        Ok((open_flows(scene)? == wanted).then_some(()))
    })
}

// Heavy: forty thousand sockets, three times.
#[test]
fn twenty_thousand_open_flows_are_listed_and_counted_in_bounded_memory() -> Result<()> {
    let scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        env: vec![("CULVERT_FLOW_REPORT_INTERVAL", "1s".to_owned())],
        ..Setting::default()
    })?;
    // Two servers, since a process may have no more descriptors than one crowd needs.
    let pairs = [
        (&scene.client, &scene.server_a),
        (&scene.server_a, &scene.intruder),
    ];
    let _servers = (serve_many(&scene.server_a)?, serve_many(&scene.intruder)?);
    for (from, to) in pairs {
        let netns = from.netns();
        netns.set_sysctl("net.ipv4.ip_local_port_range", PORTS)?;
        scene.warm(from, to)?;
    }
    wait_for_open_flows(&scene, 0)?;
    let (before, lines) = (resident(&scene)?, scene.agent1.metrics()?.lines().count());
    let mut after = Vec::new();
    for round in 0..3 {
        let mut crowds = Vec::new();
        for (from, to) in pairs {
            crowds.push(open_many(from, to)?);
        }
        wait_for_open_flows(&scene, 2 * EACH)?;
        for (from, _) in pairs {
            let quota = quotas(&scene.node1)?.get(&quota_of(&scene.node1, from)?, 0)?;
            assert_eq!(quota.flows, EACH as i64, "{}", from.name());
        }
        // Whoever asks is told of open flows at once, and by each look at them.
        let listed = flows(&scene)?;
        wait_until(A_WHILE, "a report of an open flow", || {
            let lines = listed.events("report");
            let is_direct = |line: &serde_json::Value| line["flow"]["path"] == "direct";
            Ok(lines.iter().any(is_direct).then_some(()))
        })?;
        let more = scene.agent1.metrics()?.lines().count() - lines;
        assert!(
            more < 200,
            "{more} more lines of metrics: one for each flow?"
        );
        let resident = resident(&scene)?;
        after.push(resident);
        println!(
            "round {round}: {} flows, the agent has {} KiB, {} bytes a flow more than without",
            2 * EACH,
            resident / 1024,
            resident.saturating_sub(before) / (2 * EACH) as u64
        );
        let most = before + 2 * EACH as u64 * BYTES_PER_FLOW;
        assert!(resident < most, "{resident} bytes, {before} before");
        for crowd in crowds {
            crowd.close_stdin();
            crowd.wait(A_WHILE)?;
        }
        wait_for_open_flows(&scene, 0)?;
    }
    // Which looks coincide differs from round to round, and with it what is taken for a moment; it is used again.
    let grown = after[2].saturating_sub(after[0].max(after[1]));
    let little = 2 * EACH as u64 * BYTES_PER_FLOW / 4;
    assert!(grown < little, "{grown} bytes more in the third round");
    for (from, _) in pairs {
        let quota = quotas(&scene.node1)?.get(&quota_of(&scene.node1, from)?, 0)?;
        assert_eq!(quota.flows, 0, "{}", from.name());
    }
    Ok(())
}
