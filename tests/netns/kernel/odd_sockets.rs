//! Sockets out of the ordinary: made early, handed on, bound, connected by io_uring or with the first write, Multipath TCP.

use anyhow::Result;
use culvert_harness::{Launch, Pod, Proc, Workload, probe_binary, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, answered, connect_to, only, serve, text, unplug,
};
use serde_json::Value;

use crate::{
    ipv6::{dual_stack, serve_both, wait_for_accepted},
    kernel_tables::{decisions, wait_for_claim, wait_for_no_claims},
};

const HELLO: [&str; 4] = ["--send", "hello", "--read", "5"];

/// The servers of both nodes, at addresses of both families.
struct Targets {
    to: Vec<String>,
    _servers: [Proc; 2],
}

impl Targets {
    fn of(scene: &Scene) -> Result<Self> {
        let pods = [&scene.server_a, scene.server_b()?];
        let servers = [serve_both(pods[0], "echo")?, serve_both(pods[1], "echo")?];
        let mut to = Vec::new();
        for pod in pods {
            to.extend([pod.at(PORT), pod.at_v6(PORT)?]);
        }
        // From here on the kernel part knows the verdicts.
        for to in &to {
            assert!(answered(&connect_to(&scene.client, to, &HELLO)?));
            assert!(!answered(&connect_to(&scene.intruder, to, &HELLO)?));
        }
        Ok(Self {
            to,
            _servers: servers,
        })
    }

    /// The client gets its answer at each, the intruder at none.
    fn try_all(&self, scene: &Scene, how: &[&str]) -> Result<()> {
        let (direct, refused) = ("admitted_direct", "refused_by_policy");
        let before = (
            decisions(&scene.agent1, direct)?,
            decisions(&scene.agent1, refused)?,
        );
        let arguments = [how, &HELLO[..]].concat();
        for to in &self.to {
            let report = connect_to(&scene.client, to, &arguments)?;
            assert!(answered(&report), "{how:?} to {to}: {report}");
            let report = connect_to(&scene.intruder, to, &arguments)?;
            assert!(!answered(&report), "{how:?} to {to}: {report}");
        }
        // Two of them are on this node.
        assert_eq!(decisions(&scene.agent1, direct)?, before.0 + 2, "{how:?}");
        assert_eq!(decisions(&scene.agent1, refused)?, before.1 + 2, "{how:?}");
        Ok(())
    }
}

#[test]
fn every_way_to_connect_is_decided_alike() -> Result<()> {
    let scene = dual_stack()?;
    let targets = Targets::of(&scene)?;
    for how in ["poll", "block", "uring"] {
        targets.try_all(&scene, &["--how", how])?;
    }
    wait_for_no_claims(&scene.node1)
}

#[test]
fn what_goes_with_the_syn_is_decided_alike() -> Result<()> {
    let scene = dual_stack()?;
    // Clients send data with the SYN without having been given a cookie for it.
    for pod in [&scene.client, &scene.intruder] {
        pod.netns().set_sysctl("net.ipv4.tcp_fastopen", "5")?;
    }
    let targets = Targets::of(&scene)?;
    for how in ["fast-open", "fast-open-connect"] {
        targets.try_all(&scene, &["--how", how])?;
    }
    wait_for_no_claims(&scene.node1)
}

#[test]
fn sockets_bound_before_they_connect_are_decided_alike() -> Result<()> {
    let scene = dual_stack()?;
    let targets = Targets::of(&scene)?;
    targets.try_all(&scene, &["--bind-port", "40002", "--reuse"])?;
    targets.try_all(&scene, &["--device", "eth0"])?;
    for (index, to) in targets.to.iter().enumerate() {
        let own = scene.client.addresses()[index % 2].to_string();
        let bound = ["--bind-ip", &own, "--bind-port", "40003", "--reuse"];
        let report = connect_to(&scene.client, to, &[&bound, &HELLO[..]].concat())?;
        assert!(answered(&report), "{to}: {report}");
    }
    Ok(())
}

#[test]
fn multipath_tcp_on_both_ends_takes_the_same_ways() -> Result<()> {
    let scene = dual_stack()?;
    let targets = Targets::of(&scene)?;
    targets.try_all(&scene, &["--mptcp"])?;
    drop(targets);
    let mut servers = Vec::new();
    for pod in [&scene.server_a, scene.server_b()?] {
        let serve = ["serve", "--bind", "::", "--port", "7000", "--mptcp"];
        let server = pod.probe()?.args(serve).spawn()?;
        server.wait_for_line("listening", SOON)?;
        servers.push(server);
    }
    for pod in [&scene.server_a, scene.server_b()?] {
        for to in [pod.at(PORT), pod.at_v6(PORT)?] {
            for how in [&["--mptcp"][..], &[]] {
                let arguments = [how, &HELLO[..]].concat();
                let report = connect_to(&scene.client, &to, &arguments)?;
                assert!(answered(&report), "{how:?} to {to}: {report}");
                let report = connect_to(&scene.intruder, &to, &arguments)?;
                assert!(!answered(&report), "{how:?} to {to}: {report}");
            }
        }
    }
    wait_for_no_claims(&scene.node1)
}

/// A program that has a socket already, and waits before it connects it.
fn paused(pod: &Pod, to: &str) -> Result<Proc> {
    let probe = pod.probe()?.args(["connect", "--to", to, "--pause"]);
    let process = probe.args(HELLO).stdin().spawn()?;
    process.wait_for_event("paused", SOON)?;
    Ok(process)
}

fn go_on(process: &Proc) -> Result<Value> {
    process.send_line("")?;
    process.wait(SOON)?;
    let lines = process.log().lines();
    Ok(serde_json::from_str(&lines.last().expect("a report").text)?)
}

#[test]
fn a_socket_made_before_enrolment_is_in_the_mesh() -> Result<()> {
    let mut scene = dual_stack()?;
    let targets = Targets::of(&scene)?;
    let early = scene.node1.pod("early")?;
    let workload = Workload::of_pod(&early, NAMESPACE, "client");
    let stranger = scene.node1.pod("stranger")?;
    let other = Workload::of_pod(&stranger, NAMESPACE, "stranger");
    scene.change_mesh(|mesh| mesh.workloads.extend([workload.clone(), other.clone()]))?;
    let waiting = targets.to.iter();
    let waiting: Vec<_> = waiting
        .map(|to| Ok((paused(&early, to)?, paused(&stranger, to)?)))
        .collect::<Result<_>>()?;
    scene.agent1.enrol_as(&early, &workload)?;
    scene.agent1.enrol_as(&stranger, &other)?;
    for ((allowed, denied), to) in waiting.iter().zip(&targets.to) {
        let report = go_on(allowed)?;
        assert!(answered(&report), "{to}: {report}");
        let report = go_on(denied)?;
        assert!(!answered(&report), "{to}: {report}");
    }
    Ok(())
}

/// A process of `user` connects a socket that a process of `maker` made.
fn with_a_socket_of(scene: &Scene, maker: Launch, user: &Pod, to: &str) -> Result<Value> {
    let path = scene.fabric.directory().join("offer.sock");
    let path = path.to_string_lossy().into_owned();
    let ipv6: &[&str] = if to.starts_with('[') {
        &["--ipv6"]
    } else {
        &[]
    };
    let giver = maker.args(["offer", "--at", &path]).args(ipv6).spawn()?;
    giver.wait_for_event("offered", SOON)?;
    let report = connect_to(user, to, &[&["--socket-from", &path], &HELLO[..]].concat());
    giver.wait(SOON)?;
    std::fs::remove_file(&path)?;
    report
}

#[test]
fn a_socket_that_is_handed_on_stays_its_makers() -> Result<()> {
    let scene = dual_stack()?;
    let targets = Targets::of(&scene)?;
    let (client, intruder) = (&scene.client, &scene.intruder);
    for to in &targets.to {
        let report = with_a_socket_of(&scene, client.probe()?, intruder, to)?;
        assert!(answered(&report), "{to}: {report}");
        let report = with_a_socket_of(&scene, intruder.probe()?, client, to)?;
        assert!(!answered(&report), "{to}: {report}");
    }
    Ok(())
}

#[test]
fn a_process_of_the_node_is_left_alone() -> Result<()> {
    let scene = dual_stack()?;
    let outsider = scene.node1.pod("outsider")?;
    let server = serve_both(&outsider, "echo")?;
    for to in [outsider.at(PORT), outsider.at_v6(PORT)?] {
        let probe = scene.node1.command(probe_binary()?);
        let report = probe.args(["connect", "--to", &to]).args(HELLO);
        let report = report.run(SOON)?.json()?;
        assert!(answered(&report), "{to}: {report}");
    }
    wait_for_accepted(&server, 2)?;
    for reason in ["direct", "steered_remote", "to_outbound"] {
        assert_eq!(decisions(&scene.agent1, reason)?, 0, "{reason}");
    }
    Ok(())
}

/// The SYN leaves with the first write, long after the verdict.
fn a_late_syn(scene: &mut Scene) -> Result<(Proc, Proc)> {
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    // A server that has given a cookie, or a client that needs none: otherwise nothing is deferred.
    let key = "net.ipv4.tcp_fastopen";
    scene.client.netns().set_sysctl(key, "5")?;
    let to = scene.server_a.at(PORT);
    let deferred = [
        "connect",
        "--to",
        &to,
        "--how",
        "fast-open-connect",
        "--hold",
    ];
    let held = scene.client.probe()?.args(deferred).stdin().spawn()?;
    let connected = held.wait_for_event("connected", SOON)?;
    assert_eq!(
        text(&connected, "peer"),
        "ENOTCONN",
        "deferred: {connected}"
    );
    Ok((held, server))
}

#[test]
fn a_deferred_connection_is_judged_when_it_begins() -> Result<()> {
    let mut scene = Scene::new()?;
    let (held, server) = a_late_syn(&mut scene)?;
    held.send_line("late")?;
    let data = held.wait_for_event("data", SOON)?;
    assert_eq!(text(&data, "data"), "late\n");
    wait_for_accepted(&server, 2)?;

    let mut scene = Scene::new()?;
    let (held, server) = a_late_syn(&mut scene)?;
    scene.change_mesh(|mesh| mesh.policies = vec![only("nobody")])?;
    held.send_line("too late")?;
    held.wait_for_event("end", SOON)?;
    assert!(held.events("data").is_empty());
    assert_eq!(server.events("accepted").len(), 1, "only the one before");
    Ok(())
}

/// What became of data that went with a SYN.
struct EarlyData {
    /// By the server's kernel.
    taken: bool,
    /// Bytes, by the server's application.
    read: u64,
    /// The sysctl, while the server was enrolled.
    fast_open: String,
}

/// The client's SYN is lost, and the intruder sends one in its name, with data, to a pod that takes such data without more ado.
fn early_data(knobs: &'static str) -> Result<EarlyData> {
    const SOURCE: u16 = 40001;
    let scene = Scene::without(knobs)?;
    let workload = scene.workload(&scene.server_a)?;
    scene.agent1.unenrol(&workload.uid)?;
    let key = "net.ipv4.tcp_fastopen";
    // As client and server, without cookies, for all listeners.
    scene.server_a.netns().set_sysctl(key, "1539")?;
    let server = serve(&scene.server_a, "sink")?;
    scene.agent1.enrol_as(&scene.server_a, workload)?;
    let to = scene.server_a.at(PORT);
    connect_to(&scene.client, &to, &["--half-close", "--read-all"])?;
    wait_for_no_claims(&scene.node1)?;

    unplug(&scene.client)?;
    let (peer, port) = (scene.client.at(SOURCE), SOURCE.to_string());
    let patient = ["connect", "--to", &to, "--timeout-ms", "60000"];
    let probe = scene.client.probe()?.args(patient);
    let _connecting = probe.args(["--bind-port", &port]).spawn()?;
    wait_for_claim(&scene.node1, SOURCE)?;
    let forged = ["raw-handshake", "--src", &peer, "--dst", &to, "--seq", "7"];
    let data = ["--data", "forged", "--syn-data", "--wait-ms", "500"];
    let forged = scene.intruder.probe()?.args(forged).args(data);
    let wire = forged.run(SOON)?.json()?;
    assert_eq!(wire["syn_ack"], true, "{wire}");
    let fast_open = scene.server_a.netns().sysctl(key)?;
    let closed = wait_until(SOON, "the forged connection's end", || {
        let ends = server.events("closed");
        Ok(ends.into_iter().find(|end| text(end, "peer") == peer))
    })?;
    scene.agent1.unenrol(&workload.uid)?;
    assert_eq!(scene.server_a.netns().sysctl(key)?, "1539", "given back");
    Ok(EarlyData {
        taken: wire["early"] == true,
        read: closed["bytes_read"].as_u64().unwrap_or(u64::MAX),
        fast_open,
    })
}

#[test]
fn a_pod_of_the_mesh_takes_no_data_from_a_syn() -> Result<()> {
    let outcome = early_data("")?;
    assert_eq!(outcome.fast_open, "1537");
    assert!(!outcome.taken);
    assert_eq!(outcome.read, 0);
    Ok(())
}

#[test]
fn twin_with_fast_open_data_from_a_forged_syn_is_taken_and_thrown_away() -> Result<()> {
    let outcome = early_data("keep-fast-open")?;
    assert_eq!(outcome.fast_open, "1539");
    assert!(outcome.taken);
    assert_eq!(outcome.read, 0, "what is isolated is not read");
    Ok(())
}

#[test]
fn twin_with_fast_open_and_without_sequence_numbers_it_is_read() -> Result<()> {
    let outcome = early_data("keep-fast-open,skip-sequence")?;
    assert!(outcome.read >= 6, "{}", outcome.read);
    Ok(())
}
