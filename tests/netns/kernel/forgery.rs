//! Forged claims: an intruder who uses, by hand, what the kernel part recorded for somebody else's connection.

use anyhow::Result;
use culvert_harness::{Proc, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, answered, connect, echo, serve, text, unplug};
use serde_json::Value;

use crate::kernel_tables::{claims, decisions, flows, wait_for_claim, wait_for_no_claims};

const SOURCE: u16 = 40001;
const FORGED: &str = "forged";

/// What the intruder got who sent a handshake as the client.
pub struct Forgery {
    pub wire: Value,
    server: Proc,
    pub peer: String,
    /// The client, whose connect goes on meanwhile.
    _client: Option<Proc>,
}

impl Forgery {
    /// Shakes hands with `port` of the server in the name of the client's address and port.
    fn attempt(scene: &Scene, server: Proc, port: u16) -> Result<Self> {
        let (peer, to) = (scene.client.at(SOURCE), scene.server_a.at(port));
        let arguments = [
            "raw-handshake",
            "--src",
            &peer,
            "--dst",
            &to,
            "--seq",
            "305419896",
            "--data",
            FORGED,
        ];
        let wire = scene
            .intruder
            .probe()?
            .args(arguments)
            .args(["--wait-ms", "700"])
            .run(SOON)?
            .json()?;
        Ok(Self {
            wire,
            server,
            peer,
            _client: None,
        })
    }

    fn was_answered(&self) -> bool {
        text(&self.wire, "received") == FORGED
    }

    /// The application may have seen a connection come and go, but nothing of what was sent.
    fn was_not_read(&self) {
        assert_eq!(text(&self.wire, "received"), "", "{}", self.wire);
        for closed in self
            .server
            .events("closed")
            .iter()
            .filter(|event| text(event, "peer") == self.peer)
        {
            assert_eq!(closed["bytes_read"], 0, "{closed}");
        }
    }
}

/// A connect of the client that gets no answer, with its claim outstanding.
fn unanswered(scene: &Scene) -> Result<Proc> {
    scene.warm(&scene.client, &scene.server_a)?;
    wait_for_no_claims(&scene.node1)?;
    unplug(&scene.client)?;
    let (to, port) = (scene.server_a.at(PORT), SOURCE.to_string());
    let arguments = [
        "connect",
        "--to",
        &to,
        "--bind-port",
        &port,
        "--timeout-ms",
        "60000",
    ];
    let connecting = scene.client.probe()?.args(arguments).spawn()?;
    wait_for_claim(&scene.node1, SOURCE)?;
    Ok(connecting)
}

/// The client's SYN is lost, and the intruder sends one with its address and port, but cannot know its number.
pub fn race_a_lost_syn(scene: &Scene) -> Result<Forgery> {
    let server = serve(&scene.server_a, "echo")?;
    let client = unanswered(scene)?;
    Ok(Forgery {
        _client: Some(client),
        ..Forgery::attempt(scene, server, PORT)?
    })
}

#[test]
fn a_spoofed_source_with_another_sequence_number_is_not_read() -> Result<()> {
    let scene = Scene::new()?;
    let log = scene.agent1.log().mark();
    let forgery = race_a_lost_syn(&scene)?;
    assert_eq!(
        forgery.wire["syn_ack"], true,
        "the claim let the SYN pass, or this proves nothing: {}",
        forgery.wire
    );
    forgery.was_not_read();
    scene
        .agent1
        .process()
        .wait_for_line_after(log, "isolated_sequence", SOON)?;
    assert_eq!(decisions(&scene.agent1, "isolated_sequence")?, 1);
    assert_eq!(decisions(&scene.agent1, "isolation_failed")?, 0);
    wait_until(SOON, "the forged connection's socket to be gone", || {
        let sockets = scene.server_a.sockets()?;
        Ok((!sockets
            .iter()
            .any(|socket| socket.peer.to_string() == forgery.peer))
        .then_some(()))
    })?;
    assert!(
        flows(&scene.node1)?
            .iter()
            .all(|(key, _)| key.client_port != SOURCE)
    );
    assert!(
        claims(&scene.node1)?
            .iter()
            .any(|(key, _)| key.client_port == SOURCE),
        "the claim is still its owner's"
    );
    Ok(())
}

#[test]
fn twin_without_sequence_numbers_a_spoofed_source_is_read() -> Result<()> {
    let forgery = race_a_lost_syn(&Scene::without("skip-sequence")?)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

/// The same with nobody there to destroy what was isolated.
fn race_without_the_agent(scene: &Scene) -> Result<Forgery> {
    let server = serve(&scene.server_a, "echo")?;
    let client = unanswered(scene)?;
    scene.agent1.kill()?;
    Ok(Forgery {
        _client: Some(client),
        ..Forgery::attempt(scene, server, PORT)?
    })
}

#[test]
fn an_isolated_connection_is_mute_without_the_agent_too() -> Result<()> {
    let forgery = race_without_the_agent(&Scene::new()?)?;
    assert_eq!(forgery.wire["syn_ack"], true, "{}", forgery.wire);
    forgery.was_not_read();
    Ok(())
}

#[test]
fn twin_without_isolation_and_agent_a_spoofed_source_is_read() -> Result<()> {
    let forgery = race_without_the_agent(&Scene::without("skip-isolation")?)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

#[test]
fn twin_without_isolation_a_spoofed_source_is_read() -> Result<()> {
    let forgery = race_a_lost_syn(&Scene::without("skip-isolation")?)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

/// The intruder uses the client's address and port again when the client's connection is over.
fn reuse_after_close(scene: &Scene) -> Result<Forgery> {
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let port = SOURCE.to_string();
    let report = connect(
        &scene.client,
        &scene.server_a,
        &["--bind-port", &port, "--send", "hello", "--read", "5"],
    )?;
    assert!(answered(&report), "{report}");
    wait_until(SOON, "the flow to end", || {
        Ok(flows(&scene.node1)?.is_empty().then_some(()))
    })?;
    Forgery::attempt(scene, server, PORT)
}

#[test]
fn a_tuple_that_was_closed_is_worth_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let forgery = reuse_after_close(&scene)?;
    assert_eq!(text(&forgery.wire, "received"), "", "{}", forgery.wire);
    let accepted = forgery.server.events("accepted");
    let count = accepted
        .iter()
        .filter(|event| text(event, "peer") == forgery.peer)
        .count();
    assert_eq!(
        count, 1,
        "only the client's own connection reached the application: {accepted:?}"
    );
    Ok(())
}

#[test]
fn twin_with_claims_kept_a_closed_tuple_is_admitted() -> Result<()> {
    let forgery = reuse_after_close(&Scene::without("keep-claims,skip-sequence")?)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

/// The intruder uses the port of the client's outstanding claim, from its own address.
fn bind_the_same_port(scene: &Scene) -> Result<(Value, Proc)> {
    let server = serve(&scene.server_a, "echo")?;
    let _connecting = unanswered(scene)?;
    let port = SOURCE.to_string();
    let own = ["--bind-port", &port, "--send", "hello", "--read", "5"];
    Ok((connect(&scene.intruder, &scene.server_a, &own)?, server))
}

#[test]
fn another_pod_with_the_same_port_is_judged_as_itself() -> Result<()> {
    let scene = Scene::new()?;
    let (report, server) = bind_the_same_port(&scene)?;
    assert!(!answered(&report), "{report}");
    let intruder = format!("{}:", scene.intruder.address());
    assert!(
        server
            .events("accepted")
            .iter()
            .all(|event| !text(event, "peer").starts_with(&intruder))
    );
    assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    Ok(())
}

#[test]
fn twin_without_verdicts_another_pod_with_the_same_port_is_admitted() -> Result<()> {
    let (report, _server) = bind_the_same_port(&Scene::without("unknown-verdict-allows")?)?;
    assert!(answered(&report), "{report}");
    Ok(())
}
