//! Handshakes out of the ordinary: segments that are lost, a change of policy in the middle, both ends connecting at once, ports
//! that are used again and ports that are used twice.

use anyhow::{Context as _, Result};
use culvert_harness::{Pod, Proc, TcpState, wait_until};
use culvert_tests::scene::{
    PORT, SOON, Scene, Setting, answered, connect, connect_to, echo, only, plug_in, serve, text,
    unplug,
};
use serde_json::Value;

use crate::{
    agent_gone::goes_on,
    kernel_tables::{claims, decisions, flows, steered, wait_for_claim, wait_for_no_claims},
};

const SOURCE: u16 = 40001;

/// Sends a word from [`SOURCE`] and waits for it to come back, with patience for what is sent again.
fn connecting(from: &Pod, to: &str) -> Result<Proc> {
    let port = SOURCE.to_string();
    let words = ["connect", "--to", to, "--bind-port", &port];
    let probe = from.probe()?.args(words);
    let probe = probe.args(["--send", "hello", "--read", "5"]);
    probe.args(["--timeout-ms", "12000"]).spawn()
}

fn outcome(process: &Proc) -> Result<Value> {
    process.wait(SOON)?;
    let lines = process.log().lines();
    Ok(serde_json::from_str(
        &lines.last().context("a report")?.text,
    )?)
}

/// The application has accepted so many connections of this peer, and no more.
fn accepted_from(server: &Proc, peer: &str, count: usize) -> Result<()> {
    let accepted = || {
        let events = server.events("accepted");
        events
            .iter()
            .filter(|one| text(one, "peer") == peer)
            .count()
    };
    wait_until(SOON, "the application to accept", || {
        Ok((accepted() >= count).then_some(()))
    })?;
    assert_eq!(accepted(), count);
    Ok(())
}

#[test]
fn a_syn_that_is_sent_again_makes_one_direct_flow() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    wait_for_no_claims(&scene.node1)?;
    let before = steered(&scene.agent1)?;
    unplug(&scene.server_a)?;
    let client = connecting(&scene.client, &scene.server_a.at(PORT))?;
    let first = wait_for_claim(&scene.node1, SOURCE)?;
    wait_until(SOON, "the SYN to be sent again", || {
        let retransmitted = scene
            .client
            .sockets()?
            .into_iter()
            .any(|socket| socket.local.port() == SOURCE && socket.state == TcpState::SynSent);
        assert_eq!(claims(&scene.node1)?.len(), 1);
        Ok(retransmitted.then_some(()))
    })?;
    plug_in(&scene.server_a)?;
    let report = outcome(&client)?;
    assert!(answered(&report), "{report}");
    assert_eq!(first.admitted, 0);
    accepted_from(&server, &scene.client.at(SOURCE), 1)?;
    assert_eq!(steered(&scene.agent1)?, before);
    wait_for_no_claims(&scene.node1)
}

/// The server's answers to the client go astray until the returned change is undone.
fn misdirect(server: &Pod, client: &Pod) -> Result<()> {
    let to = client.address().to_string();
    let wrong = ["neigh", "replace", &to, "lladdr", "02:00:00:00:00:01"];
    let neigh = server.command("ip").args(wrong);
    let neigh = neigh.args(["nud", "permanent", "dev", "eth0"]);
    neigh.run(SOON)?.success().map(drop)
}

fn find_again(server: &Pod, client: &Pod) -> Result<()> {
    let to = client.address().to_string();
    let neigh = ["neigh", "del", &to, "dev", "eth0"];
    server.command("ip").args(neigh).run(SOON)?.success()?;
    Ok(())
}

/// A client whose SYN has been admitted, and whose SYN-ACK is lost.
fn half_open(scene: &Scene, server: &str) -> Result<(Proc, Proc)> {
    let server = serve(&scene.server_a, server)?;
    scene.warm(&scene.client, &scene.server_a)?;
    wait_for_no_claims(&scene.node1)?;
    misdirect(&scene.server_a, &scene.client)?;
    let client = connecting(&scene.client, &scene.server_a.at(PORT))?;
    wait_until(SOON, "the SYN to be admitted", || {
        let found = claims(&scene.node1)?.into_iter();
        let mut found = found.filter(|(key, _)| key.client_port == SOURCE);
        Ok(found.any(|(_, claim)| claim.admitted != 0).then_some(()))
    })?;
    Ok((client, server))
}

#[test]
fn a_syn_ack_that_is_sent_again_makes_one_direct_flow() -> Result<()> {
    for cookies in ["1", "2"] {
        let scene = Scene::new()?;
        let key = "net.ipv4.tcp_syncookies";
        scene.server_a.netns().set_sysctl(key, cookies)?;
        let before = steered(&scene.agent1)?;
        let (client, server) = half_open(&scene, "echo")?;
        find_again(&scene.server_a, &scene.client)?;
        let report = outcome(&client)?;
        assert!(answered(&report), "{report}");
        accepted_from(&server, &scene.client.at(SOURCE), 1)?;
        assert_eq!(steered(&scene.agent1)?, before + 1, "the first one");
        wait_for_no_claims(&scene.node1)?;
    }
    Ok(())
}

/// Policy forbids the client while its handshake is on.
fn forbidden_meanwhile(knobs: &'static str, cookies: &str) -> Result<(Value, Proc, Scene)> {
    let mut scene = Scene::without(knobs)?;
    let key = "net.ipv4.tcp_syncookies";
    scene.server_a.netns().set_sysctl(key, cookies)?;
    let (client, server) = half_open(&scene, "echo")?;
    scene.change_mesh(|mesh| mesh.policies = vec![only("nobody")])?;
    // The change is in force when the verdicts of before have gone.
    wait_until(SOON, "the change to bind", || {
        connect(&scene.client, &scene.server_a, &["--read", "1"])?;
        let denied = decisions(&scene.agent1, "refused_by_policy")? > 0;
        Ok((denied || knobs.contains("skip-generation")).then_some(()))
    })?;
    find_again(&scene.server_a, &scene.client)?;
    Ok((outcome(&client)?, server, scene))
}

#[test]
fn a_policy_that_changes_during_the_handshake_binds_it() -> Result<()> {
    for cookies in ["1", "2"] {
        let (report, server, scene) = forbidden_meanwhile("", cookies)?;
        assert!(!answered(&report), "{report}");
        let peer = scene.client.at(SOURCE);
        for closed in server.events("closed") {
            if text(&closed, "peer") == peer {
                assert_eq!(closed["bytes_read"], 0, "{closed}");
            }
        }
        wait_until(SOON, "the flow to be nowhere", || {
            let flows = flows(&scene.node1)?;
            Ok((!flows.iter().any(|(key, _)| key.client_port == SOURCE)).then_some(()))
        })?;
        wait_for_no_claims(&scene.node1)?;
    }
    Ok(())
}

#[test]
fn twin_without_generations_a_handshake_outlives_its_policy() -> Result<()> {
    let (report, _server, _scene) = forbidden_meanwhile("skip-generation", "1")?;
    assert!(answered(&report), "{report}");
    Ok(())
}

/// The port that the other end of a simultaneous open connects from.
const OTHER: u16 = 40002;

/// Client and server connect to each other, and each SYN meets a socket that has sent its own.
fn both_at_once(
    policies: Vec<culvert_harness::Policy>,
    meanwhile: impl FnOnce(&mut Scene) -> Result<()>,
) -> Result<([Value; 2], Scene)> {
    let mut scene = Scene::with(Setting {
        policies: Some(policies),
        ..Setting::default()
    })?;
    let ends = [(&scene.client, SOURCE), (&scene.server_a, OTHER)];
    // The verdicts, for ports on which nobody listens.
    for ((from, _), (to, port)) in [(ends[0], ends[1]), (ends[1], ends[0])] {
        connect_to(from, &to.at(port), &["--read", "1"])?;
    }
    wait_for_no_claims(&scene.node1)?;
    unplug(&scene.server_a)?;
    let words = ["--send", "hello", "--read", "5", "--timeout-ms", "12000"];
    let mut processes = Vec::new();
    for ((from, own), (to, port)) in [(ends[0], ends[1]), (ends[1], ends[0])] {
        let (to, own) = (to.at(port), own.to_string());
        let probe = from.probe()?.args(["connect", "--to", &to]);
        processes.push(probe.args(["--bind-port", &own]).args(words).spawn()?);
    }
    for port in [SOURCE, OTHER] {
        wait_for_claim(&scene.node1, port)?;
    }
    meanwhile(&mut scene)?;
    plug_in(&scene.server_a)?;
    let reports = [outcome(&processes[0])?, outcome(&processes[1])?];
    wait_for_no_claims(&scene.node1)?;
    wait_until(SOON, "every flow to end", || {
        Ok(flows(&scene.node1)?.is_empty().then_some(()))
    })?;
    Ok((reports, scene))
}

#[test]
fn two_pods_that_connect_to_each_other_at_once_are_both_verified() -> Result<()> {
    let (reports, scene) = both_at_once(Vec::new(), |_| Ok(()))?;
    // One end's SYN may still come first; what must not be is that only one of them believes in it.
    assert_eq!(answered(&reports[0]), answered(&reports[1]), "{reports:?}");
    assert_eq!(decisions(&scene.agent1, "isolation_failed")?, 0);
    Ok(())
}

#[test]
fn two_pods_that_connect_at_once_are_refused_when_policy_changes_meanwhile() -> Result<()> {
    let (reports, _scene) = both_at_once(Vec::new(), |scene| {
        scene.change_mesh(|mesh| mesh.policies = vec![only("nobody")])
    })?;
    assert!(!reports.iter().any(answered), "{reports:?}");
    Ok(())
}

/// The client waits for an answer of a server that has lost its link, and the intruder sends a SYN in the server's name: the
/// handshake of two that connect at once.
fn met_by_a_stranger(knobs: &'static str) -> Result<(Value, Scene)> {
    let scene = Scene::without(knobs)?;
    let server = serve(&scene.server_a, "sink")?;
    scene.warm(&scene.client, &scene.server_a)?;
    wait_for_no_claims(&scene.node1)?;
    drop(server);
    unplug(&scene.server_a)?;
    let _client = connecting(&scene.client, &scene.server_a.at(PORT))?;
    wait_for_claim(&scene.node1, SOURCE)?;
    let (src, dst) = (scene.server_a.at(PORT), scene.client.at(SOURCE));
    let forged = ["raw-handshake", "--src", &src, "--dst", &dst, "--seq", "7"];
    let forged = scene.intruder.probe()?.args(forged);
    let wire = forged.args(["--wait-ms", "700"]).run(SOON)?.json()?;
    Ok((wire, scene))
}

#[test]
fn a_stranger_that_connects_to_who_is_connecting_gets_nothing() -> Result<()> {
    let (wire, scene) = met_by_a_stranger("")?;
    assert_eq!(wire["syn_ack"], true, "or this proves nothing: {wire}");
    assert_eq!(text(&wire, "received"), "", "{wire}");
    assert_eq!(decisions(&scene.agent1, "isolated_no_claim")?, 1);
    Ok(())
}

#[test]
fn twin_without_isolation_the_stranger_is_told() -> Result<()> {
    let (wire, _scene) = met_by_a_stranger("skip-isolation")?;
    assert_eq!(text(&wire, "received"), "hello", "{wire}");
    Ok(())
}

#[test]
fn a_port_that_the_server_still_remembers_can_be_used_again() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_a, "once")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let before = steered(&scene.agent1)?;
    let port = SOURCE.to_string();
    let again = ["--bind-port", &port, "--reuse", "--send", "x", "--read-all"];
    for attempt in 0..5 {
        let report = connect(&scene.client, &scene.server_a, &again)?;
        assert_eq!(text(&report, "data"), "x", "{attempt}: {report}");
        let left = scene.server_a.sockets()?.into_iter();
        let mut left = left.filter(|socket| socket.peer.port() == SOURCE);
        assert!(
            left.any(|socket| socket.state == TcpState::TimeWait),
            "{attempt}: or this proves nothing"
        );
    }
    accepted_from(&server, &scene.client.at(SOURCE), 5)?;
    assert_eq!(steered(&scene.agent1)?, before);
    wait_for_no_claims(&scene.node1)
}

#[test]
fn one_port_has_a_direct_and_a_steered_connection_at_once() -> Result<()> {
    let scene = Scene::new()?;
    let servers = [
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    ];
    for server in [&scene.server_a, scene.server_b()?] {
        scene.warm(&scene.client, server)?;
    }
    let (before, direct) = (steered(&scene.agent1)?, decisions(&scene.agent1, "direct")?);
    let port = SOURCE.to_string();
    let mut held = Vec::new();
    for server in [scene.server_b()?, &scene.server_a] {
        let to = server.at(PORT);
        let words = ["connect", "--to", &to, "--bind-port", &port];
        let probe = scene.client.probe()?.args(words);
        let process = probe.args(["--reuse", "--hold"]).stdin().spawn()?;
        let connected = process.wait_for_event("connected", SOON)?;
        assert_eq!(text(&connected, "local"), scene.client.at(SOURCE));
        held.push(process);
    }
    for round in ["once", "twice"] {
        for process in &held {
            goes_on(process, round)?;
        }
    }
    assert_eq!(steered(&scene.agent1)?, before + 1);
    assert_eq!(decisions(&scene.agent1, "direct")?, direct + 1);
    for server in &servers {
        accepted_from(server, &scene.client.at(SOURCE), 1)?;
    }
    // Each ends alone.
    held.remove(0).close_stdin();
    goes_on(&held[0], "alone")?;
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    Ok(())
}
