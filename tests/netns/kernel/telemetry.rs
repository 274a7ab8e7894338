//! What is told of direct flows: how they ended, what they carried, and that nothing of it is lost or told twice.

use std::time::Duration;

use anyhow::{Context as _, Result};
use culvert_harness::{AccessLine, Agent, Pod, Proc, TcpState, log::Mark, wait_until};
use culvert_tests::scene::{
    SOON, Scene, Setting, answered, connect, connect_to, echo, hold, only, serve, serve_on, text,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::agent_gone::goes_on;

/// A port on which nobody listens.
const NOBODY: u16 = 7999;

/// The access line of the one direct connection that ended so after `log`.
fn ended(agent: &Agent, log: Mark, end: &str) -> Result<AccessLine> {
    agent.wait_for_access(log, &[("path", "direct"), ("end", end)], SOON)
}

/// A held direct flow.
fn held(scene: &Scene) -> Result<(Proc, Proc)> {
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let held = hold(&scene.client, &scene.server_a)?;
    goes_on(&held, "before")?;
    Ok((server, held))
}

/// Stops a process, and waits until none of its threads runs any more.
pub fn stop(process: &Proc) -> Result<()> {
    process.kill(Signal::SIGSTOP)?;
    let tasks = format!("/proc/{}/task", process.pid());
    wait_until(SOON, "every thread to stand still", || {
        for task in std::fs::read_dir(&tasks)? {
            let stat = std::fs::read_to_string(task?.path().join("stat"))?;
            let state = stat.rsplit(") ").next().unwrap_or_default();
            if !state.starts_with('T') {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })
}

fn bytes(agent: &Agent, name: &str, reporter: &str) -> Result<f64> {
    let reporter = format!("reporter=\"{reporter}\"");
    let labels = [reporter.as_str(), "sa/client\"", "sa/server-a\""];
    agent.metric(&format!("istio_tcp_{name}_total"), &labels)
}

/// Waits until both ends of the direct flows have been counted with so many bytes each way.
fn counted(agent: &Agent, sent: f64, received: f64) -> Result<()> {
    let mut last = String::new();
    let waited = wait_until(SOON, "the bytes to be counted", || {
        let mut found = Vec::new();
        for reporter in ["source", "destination"] {
            found.push(bytes(agent, "sent_bytes", reporter)?);
            found.push(bytes(agent, "received_bytes", reporter)?);
        }
        last = format!("{found:?}");
        Ok((found == [sent, received, sent, received]).then_some(()))
    });
    waited.with_context(|| format!("{last}, not {sent} sent and {received} received"))
}

#[test]
fn a_flow_that_both_ends_close_is_told_with_what_it_cost() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let log = scene.agent1.log().mark();
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    let line = ended(&scene.agent1, log, "fin")?;
    for (field, unit) in [("connect_latency", "us"), ("rtt", "us")] {
        let value = line.field(field).context(field)?;
        let amount: f64 = value.strip_suffix(unit).context(field)?.parse()?;
        assert!(amount > 0.0, "{}", line.text);
    }
    assert_eq!(line.field("retransmits").as_deref(), Some("0"));
    let fields = ["bytes_sent", "bytes_recv"].map(|name| line.field(name));
    assert_eq!(fields, [Some("5".into()), Some("5".into())]);
    let direct = ["path=\"direct\"", "end=\"fin\""];
    let metric = |name: &str, labels: &[&str]| scene.agent1.metric(name, labels);
    assert_eq!(metric("culvert_flows_ended_total", &direct)?, 1.0);
    assert_eq!(metric("culvert_flow_connect_seconds_count", &[])?, 1.0);
    assert_eq!(metric("culvert_flow_rtt_seconds_count", &[])?, 1.0);
    assert_eq!(metric("culvert_open_flows", &["path=\"direct\""])?, 0.0);
    Ok(())
}

/// What a server in the mode `stay` or `farewell` says.
const BANNER: &str = "culvert-probe ready\n";

/// A held flow with such a server of which each end has said something, and the mark before it.
fn of_few_words(scene: &Scene, mode: &str) -> Result<(Proc, Proc, Mark)> {
    let server = serve(&scene.server_a, mode)?;
    connect(
        &scene.client,
        &scene.server_a,
        &["--half-close", "--read", "1"],
    )?;
    let log = scene.agent1.log().mark();
    let client = hold(&scene.client, &scene.server_a)?;
    client.send_line("four")?;
    client.wait_for_event("sent", SOON)?;
    Ok((server, client, log))
}

/// The flow's server said [`BANNER`], its client `sent` bytes.
fn has_counted(line: &AccessLine, sent: &str) {
    let counted = ["bytes_sent", "bytes_recv"].map(|name| line.field(name));
    let expected = [Some(BANNER.len().to_string()), Some(sent.to_owned())];
    assert_eq!(counted, expected, "{}", line.text);
}

/// FIN takes a number, but is no byte: none came here before the end.
#[test]
fn all_that_a_half_closed_flow_received_is_counted_when_it_is_revoked() -> Result<()> {
    let mut scene = Scene::new()?;
    let (_server, client, log) = of_few_words(&scene, "stay")?;
    client.close_stdin();
    let data = client.wait_for_event("data", SOON)?;
    assert_eq!(text(&data, "data"), BANNER);
    scene.change_mesh(|mesh| mesh.policies = vec![only("intruder")])?;
    let line = ended(&scene.agent1, log, "revoked")?;
    has_counted(&line, "5");
    Ok(())
}

/// The client's FIN is never acknowledged: the server remembers no connection that it has closed, and answers with a reset.
#[test]
fn all_that_was_sent_is_counted_when_the_last_fin_is_answered_with_a_reset() -> Result<()> {
    let scene = Scene::new()?;
    let key = "net.ipv4.tcp_max_tw_buckets";
    scene.server_a.netns().set_sysctl(key, "0")?;
    let (server, client, log) = of_few_words(&scene, "farewell")?;
    client.wait_for_event("eof", SOON)?;
    let mark = client.log().mark();
    client.send_line("more")?;
    client.wait_for_event_after(mark, "sent", SOON)?;
    for (pod, state) in [
        (&scene.client, TcpState::CloseWait),
        (&scene.server_a, TcpState::FinWait2),
    ] {
        wait_until(SOON, "everything to be acknowledged and read", || {
            let mut sockets = pod.sockets()?.into_iter();
            let is_idle = sockets.any(|socket| {
                socket.state == state && socket.send_queue == 0 && socket.receive_queue == 0
            });
            Ok(is_idle.then_some(()))
        })?;
    }
    server.kill(Signal::SIGKILL)?;
    server.wait(SOON)?;
    client.kill(Signal::SIGKILL)?;
    let line = ended(&scene.agent1, log, "reset_by_peer")?;
    has_counted(&line, "10");
    Ok(())
}

#[test]
fn a_client_that_closes_without_reading_everything_has_reset_the_flow() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "source")?;
    let read_one = || connect(&scene.client, &scene.server_a, &["--read", "1"]);
    read_one()?;
    let log = scene.agent1.log().mark();
    read_one()?;
    ended(&scene.agent1, log, "reset_by_client").map(drop)
}

#[test]
fn a_server_that_dies_without_reading_everything_has_reset_the_flow() -> Result<()> {
    let scene = Scene::new()?;
    let (server, client) = held(&scene)?;
    let log = scene.agent1.log().mark();
    stop(&server)?;
    let mark = client.log().mark();
    client.send_line("unread")?;
    client.wait_for_event_after(mark, "sent", SOON)?;
    server.kill(Signal::SIGKILL)?;
    let line = ended(&scene.agent1, log, "reset_by_peer")?;
    // The application's business, not a failure of the mesh.
    assert!(line.field("error").is_none(), "{}", line.text);
    Ok(())
}

#[test]
fn a_connection_that_nobody_listens_for_failed_and_was_refused() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    // The first attempt leaves the verdict for this port.
    let nobody = scene.server_a.at(NOBODY);
    connect_to(&scene.client, &nobody, &[])?;
    let log = scene.agent1.log().mark();
    let report = connect_to(&scene.client, &nobody, &[])?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    let line = ended(&scene.agent1, log, "refused")?;
    assert!(line.text.contains("\terror\t"), "{}", line.text);
    assert!(line.field("error").is_some(), "{}", line.text);
    let failed = scene.agent1.metric(
        "istio_tcp_connections_failed_total",
        &["response_flags=\"CONNECT\"", "reporter=\"source\""],
    )?;
    assert!(failed >= 1.0, "{failed}");
    Ok(())
}

#[test]
fn a_long_flow_is_reported_while_it_is_open_and_never_twice() -> Result<()> {
    let scene = Scene::with(Setting {
        env: vec![("CULVERT_FLOW_REPORT_INTERVAL", "1s".to_owned())],
        ..Setting::default()
    })?;
    let (_server, client) = held(&scene)?;
    // Counted so far: the warming connection's byte each way, and `before` with its end of line.
    let word = "before\n".len() as f64;
    counted(&scene.agent1, 1.0 + word, 1.0 + word)?;
    let live = flows(&scene)?;
    let report = wait_until(SOON, "a report", || {
        let lines = live.events("report");
        Ok(lines.into_iter().find(|line| {
            let flow = &line["flow"];
            flow["path"] == "direct" && flow["bytes_sent"] == 7
        }))
    })?;
    assert!(report["flow"]["rtt_us"].is_u64(), "{report}");
    goes_on(&client, "and on")?;
    let more = word + "and on\n".len() as f64;
    counted(&scene.agent1, 1.0 + more, 1.0 + more)?;
    assert_eq!(
        scene
            .agent1
            .metric("culvert_open_flows", &["path=\"direct\""])?,
        1.0
    );
    let log = scene.agent1.log().mark();
    client.close_stdin();
    let line = ended(&scene.agent1, log, "fin")?;
    assert_eq!(line.field("bytes_sent").as_deref(), Some("14"));
    counted(&scene.agent1, 1.0 + more, 1.0 + more)?;
    let labels = ["reporter=\"source\"", "sa/client\""];
    for name in ["opened", "closed"] {
        let name = format!("istio_tcp_connections_{name}_total");
        assert_eq!(scene.agent1.metric(&name, &labels)?, 2.0, "{name}");
    }
    Ok(())
}

/// `culvert flows --json` of the first node's agent.
pub fn flows(scene: &Scene) -> Result<Proc> {
    let socket = scene.agent1.admin_socket().to_string_lossy().into_owned();
    scene
        .node1
        .command(culvert_harness::culvert_binary()?)
        .args(["flows", "--json", "--admin-socket", &socket])
        .spawn()
}

#[test]
fn bytes_beyond_four_gigabytes_are_counted() -> Result<()> {
    const BYTES: u64 = 5 << 30;
    let scene = Scene::new()?;
    let _server = serve_on(&scene.server_a, "sink", 7001)?;
    let to = scene.server_a.at(7001);
    let stream = |bytes: u64| -> Result<Value> {
        let bytes = bytes.to_string();
        scene
            .client
            .probe()?
            .args(["stream", "--to", &to, "--bytes", &bytes])
            .run(Duration::from_secs(60))?
            .json()
    };
    stream(1)?;
    let log = scene.agent1.log().mark();
    let report = stream(BYTES)?;
    assert_eq!(report["ok"], true, "{report}");
    let line = ended(&scene.agent1, log, "fin")?;
    assert_eq!(line.field("bytes_recv"), Some(BYTES.to_string()));
    let received = bytes(&scene.agent1, "received_bytes", "destination")?;
    assert_eq!(received, (BYTES + 1) as f64);
    Ok(())
}

/// Threads that connect: `crowd` is asked for a multiple of this.
const THREADS: u32 = 4;

/// One pod's quick connections, each with a byte there and back.
fn crowd(from: &Pod, to: &Pod, count: u32) -> Result<Value> {
    let count = count.to_string();
    from.probe()?
        .args(["conn", "--to", &to.at(7002), "--count", &count])
        .args(["--threads", &THREADS.to_string()])
        .run(Duration::from_secs(60))?
        .json()
}

#[test]
fn counters_are_right_although_the_events_of_many_ends_were_lost() -> Result<()> {
    const MANY: u32 = 20_000;
    let scene = Scene::new()?;
    let _server = scene
        .server_a
        .probe()?
        .args(["serve", "--port", "7002", "--mode", "once", "--quiet"])
        .spawn()?;
    wait_until(SOON, "the server and its verdict", || {
        let report = crowd(&scene.client, &scene.server_a, THREADS)?;
        Ok((report["errors"] == 0).then_some(()))
    })?;
    // The first of all, which the agent carries.
    let closed = || bytes(&scene.agent1, "connections_closed", "source");
    wait_until(SOON, "them to be counted", || {
        Ok((closed()? == f64::from(THREADS)).then_some(()))
    })?;
    let lost = || scene.agent1.metric("culvert_flow_events_lost_total", &[]);
    // An agent that stands still reads no events: the ring overflows.
    stop(scene.agent1.process())?;
    let report = crowd(&scene.client, &scene.server_a, MANY);
    scene.agent1.process().kill(Signal::SIGCONT)?;
    let report = report?;
    assert_eq!(
        (&report["count"], &report["errors"]),
        (&MANY.into(), &0.into())
    );
    let expected = f64::from(THREADS + MANY);
    let waited = wait_until(SOON, "every connection to be counted", || {
        Ok((closed()? == expected).then_some(()))
    });
    waited.with_context(|| format!("{:?} of {expected}, {:?} events lost", closed(), lost()))?;
    assert!(lost()? > 0.0, "no event was lost: the test shows nothing");
    counted(&scene.agent1, expected, expected)?;
    for reporter in ["source", "destination"] {
        for name in ["connections_opened", "connections_closed"] {
            assert_eq!(bytes(&scene.agent1, name, reporter)?, expected, "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_new_agent_counts_on_where_the_last_one_ended() -> Result<()> {
    let mut scene = Scene::with(Setting {
        env: vec![("CULVERT_FLOW_REPORT_INTERVAL", "1s".to_owned())],
        ..Setting::default()
    })?;
    let (_server, client) = held(&scene)?;
    counted(&scene.agent1, 8.0, 8.0)?;
    scene.agent1.kill()?;
    let mut options = culvert_harness::AgentOptions::default();
    let interval = ("CULVERT_FLOW_REPORT_INTERVAL".to_owned(), "1s".to_owned());
    options.env.extend([interval]);
    scene.agent1 = scene.node1.start_agent(options)?;
    scene.agent1.ready()?;
    let live = flows(&scene)?;
    wait_until(SOON, "the new agent to know the flow", || {
        Ok((!live.events("opened").is_empty()).then_some(()))
    })?;
    goes_on(&client, "and on")?;
    let word = "and on\n".len() as f64;
    counted(&scene.agent1, word, word)?;
    let labels = ["reporter=\"source\"", "sa/client\""];
    let opened = "istio_tcp_connections_opened_total";
    assert_eq!(scene.agent1.metric(opened, &labels)?, 0.0);
    Ok(())
}

#[test]
fn without_telemetry_nothing_is_told_of_direct_flows() -> Result<()> {
    let scene = Scene::with(Setting {
        env: vec![("CULVERT_FLOW_TELEMETRY", "false".to_owned())],
        ..Setting::default()
    })?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let log = scene.agent1.log().mark();
    for _ in 0..3 {
        connect(
            &scene.client,
            &scene.server_a,
            &["--send", "x", "--read", "1"],
        )?;
    }
    // A refusal by the agent itself is told in any case, and after them.
    echo(&scene.intruder, &scene.server_a)?;
    scene
        .agent1
        .wait_for_access(log, &[("src.workload", "intruder")], SOON)?;
    let lines = scene.agent1.access_log();
    assert!(
        !lines
            .iter()
            .any(|line| line.text.contains("path=\"direct\""))
    );
    Ok(())
}

/// A flow that both agents see, of which each counts what happened in its time.
#[test]
fn bytes_of_a_flow_are_counted_by_one_agent_only() -> Result<()> {
    const INTERVAL: (&str, &str) = ("CULVERT_FLOW_REPORT_INTERVAL", "1s");
    let scene = Scene::with(Setting {
        env: vec![(INTERVAL.0, INTERVAL.1.to_owned())],
        ..Setting::default()
    })?;
    let (_server, held) = held(&scene)?;
    let long = "x".repeat(1000);
    goes_on(&held, &long)?;
    wait_until(SOON, "the flow to be reported while it is open", || {
        let sent = bytes(&scene.agent1, "sent_bytes", "source")?;
        Ok((sent >= 1000.0).then_some(()))
    })?;
    scene.agent1.kill()?;
    // The second interval is so long that the flow ends before it is over.
    let agent = scene
        .node1
        .start_agent(culvert_harness::AgentOptions::default())?;
    agent.ready()?;
    goes_on(&held, "the end")?;
    let log = agent.log().mark();
    held.close_stdin();
    held.wait_for_event("end", SOON)?;
    ended(&agent, log, "fin")?;
    for name in ["sent_bytes", "received_bytes"] {
        let counted = bytes(&agent, name, "source")?;
        assert!(counted < 500.0, "{name}: {counted}");
    }
    Ok(())
}
