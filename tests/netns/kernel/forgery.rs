//! Forged claims: an intruder who uses, by hand, what the kernel part recorded for somebody else's connection.

use anyhow::Result;
use culvert_harness::{Pod, Proc, wait_until};
use culvert_tests::scene::{
    PORT, SOON, Scene, answered, connect, connect_to, echo, serve, text, unplug,
};
use serde_json::Value;

use crate::{
    ipv6::{dual_stack_without, serve_both},
    kernel_tables::{claims, decisions, flows, wait_for_claim, wait_for_no_claims},
};

const SOURCE: u16 = 40001;
const FORGED: &str = "forged";

/// By which addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn scene(self, knobs: &'static str) -> Result<Scene> {
        match self {
            Self::V4 => Scene::without(knobs),
            Self::V6 => dual_stack_without(knobs),
        }
    }

    fn at(self, pod: &Pod, port: u16) -> Result<String> {
        match self {
            Self::V4 => Ok(pod.at(port)),
            Self::V6 => pod.at_v6(port),
        }
    }

    /// A server of the scene, and a verdict that lets the client connect to it.
    fn serve_and_warm(self, scene: &Scene) -> Result<Proc> {
        let server = match self {
            Self::V4 => serve(&scene.server_a, "echo")?,
            Self::V6 => serve_both(&scene.server_a, "echo")?,
        };
        let to = self.at(&scene.server_a, PORT)?;
        connect_to(&scene.client, &to, &["--send", "x", "--read", "1"])?;
        Ok(server)
    }
}

/// What the intruder got who sent a handshake as the client.
pub struct Forgery {
    pub wire: Value,
    server: Proc,
    pub peer: String,
    /// The client, whose connect goes on meanwhile.
    _client: Option<Proc>,
}

impl Forgery {
    /// Shakes hands with the server in the name of the client's address and port.
    fn attempt(scene: &Scene, family: Family, server: Proc) -> Result<Self> {
        let peer = family.at(&scene.client, SOURCE)?;
        let to = family.at(&scene.server_a, PORT)?;
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

    pub fn was_answered(&self) -> bool {
        text(&self.wire, "received") == FORGED
    }

    /// The application may have seen a connection come and go, but nothing of what was sent.
    pub fn was_not_read(&self) {
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
fn unanswered(scene: &Scene, family: Family) -> Result<Proc> {
    wait_for_no_claims(&scene.node1)?;
    unplug(&scene.client)?;
    let (to, port) = (family.at(&scene.server_a, PORT)?, SOURCE.to_string());
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
pub fn race_a_lost_syn(scene: &Scene, family: Family) -> Result<Forgery> {
    let server = family.serve_and_warm(scene)?;
    let client = unanswered(scene, family)?;
    Ok(Forgery {
        _client: Some(client),
        ..Forgery::attempt(scene, family, server)?
    })
}

/// What a spoofed source with another sequence number gets.
pub fn is_not_read(family: Family) -> Result<()> {
    let scene = family.scene("")?;
    let log = scene.agent1.log().mark();
    let forgery = race_a_lost_syn(&scene, family)?;
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
fn a_spoofed_source_with_another_sequence_number_is_not_read() -> Result<()> {
    is_not_read(Family::V4)
}

#[test]
fn twin_without_sequence_numbers_a_spoofed_source_is_read() -> Result<()> {
    let forgery = race_a_lost_syn(&Scene::without("skip-sequence")?, Family::V4)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

/// The same with nobody there to destroy what was isolated.
pub fn race_without_the_agent(scene: &Scene) -> Result<Forgery> {
    let server = Family::V4.serve_and_warm(scene)?;
    let client = unanswered(scene, Family::V4)?;
    scene.agent1.kill()?;
    Ok(Forgery {
        _client: Some(client),
        ..Forgery::attempt(scene, Family::V4, server)?
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
    let forgery = race_a_lost_syn(&Scene::without("skip-isolation")?, Family::V4)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

/// The intruder uses the client's address and port again when the client's connection is over.
pub fn reuse_after_close(scene: &Scene, family: Family) -> Result<Forgery> {
    let server = family.serve_and_warm(scene)?;
    let (to, port) = (family.at(&scene.server_a, PORT)?, SOURCE.to_string());
    let hello = ["--bind-port", &port, "--send", "hello", "--read", "5"];
    let report = connect_to(&scene.client, &to, &hello)?;
    assert!(answered(&report), "{report}");
    wait_until(SOON, "the flow to end", || {
        Ok(flows(&scene.node1)?.is_empty().then_some(()))
    })?;
    Forgery::attempt(scene, family, server)
}

/// What a tuple is worth whose connection is over.
pub fn is_worth_nothing(family: Family) -> Result<()> {
    let scene = family.scene("")?;
    let forgery = reuse_after_close(&scene, family)?;
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
fn a_tuple_that_was_closed_is_worth_nothing() -> Result<()> {
    is_worth_nothing(Family::V4)
}

#[test]
fn twin_with_claims_kept_a_closed_tuple_is_admitted() -> Result<()> {
    let scene = Scene::without("keep-claims,skip-sequence")?;
    let forgery = reuse_after_close(&scene, Family::V4)?;
    assert!(forgery.was_answered(), "{}", forgery.wire);
    Ok(())
}

/// The intruder uses the port of the client's outstanding claim, from its own address.
fn bind_the_same_port(scene: &Scene) -> Result<(Value, Proc)> {
    let server = Family::V4.serve_and_warm(scene)?;
    let _connecting = unanswered(scene, Family::V4)?;
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
