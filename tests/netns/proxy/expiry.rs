//! A tunnel takes streams for as long as the certificate it was opened with is valid, and nobody presents one that has expired.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use culvert::identity::Validity;
use culvert_harness::{Pod, Proc, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, Setting, answered, echo, hold, serve, status, text};
use h2::{RecvStream, SendStream};

use super::peer::{
    TUNNEL_PORT, connect_request, genuine, handshake, in_pod, mesh_ca, proof, server_leaf, spiffe,
    valid_now, validity_of,
};

const LIFE: Duration = Duration::from_secs(3);
/// Certificates count in whole seconds.
const PAST: Duration = Duration::from_secs(1);

pub async fn echoes(body: &mut SendStream<Bytes>, answer: &mut RecvStream) -> Result<()> {
    body.send_data(Bytes::from_static(b"hello"), false)?;
    let mut data = Vec::new();
    while data.len() < 5 {
        let chunk = answer.data().await.context("the stream ended")??;
        answer.flow_control().release_capacity(chunk.len())?;
        data.extend_from_slice(&chunk);
    }
    ensure!(data == b"hello");
    Ok(())
}

/// Opens a tunnel with a certificate that expires while a stream is open, which must go on. Tells whether the tunnel still
/// takes streams then.
fn takes_streams_when_expired(knobs: &'static str) -> Result<bool> {
    let scene = Scene::with(Setting {
        knobs,
        ..Setting::default()
    })?;
    let _server = serve(scene.server_b()?, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    let tunnel = SocketAddr::new(scene.server_b()?.address(), TUNNEL_PORT);
    let authority = scene.server_b()?.at(PORT);
    let not_after = SystemTime::now() + LIFE;
    let validity = Validity {
        not_after,
        ..valid_now()
    };
    let proof = proof(&mesh_ca(&scene)?, &[&spiffe("client")], validity)?;
    in_pod(&stranger, async move {
        let (send, connection) = h2::client::handshake(handshake(tunnel, proof).await?).await?;
        let _driver = tokio::spawn(connection);
        let mut send = send.ready().await?;
        let (response, mut body) = send.send_request(connect_request(&authority)?, false)?;
        let mut answer = response.await?.into_body();
        echoes(&mut body, &mut answer).await?;

        tokio::time::sleep(not_after.duration_since(SystemTime::now())? + PAST).await;
        echoes(&mut body, &mut answer).await?;
        let mut send = send.ready().await?;
        let (response, _body) = send.send_request(connect_request(&authority)?, false)?;
        match response.await?.status().as_u16() {
            200 => Ok(true),
            401 => Ok(false),
            status => bail!("answered {status}"),
        }
    })?
}

#[test]
fn a_tunnel_takes_no_streams_when_its_clients_certificate_has_expired() -> Result<()> {
    assert!(!takes_streams_when_expired("")?);
    Ok(())
}

#[test]
fn twin_an_expired_tunnel_takes_streams_when_nobody_looks_at_the_clock() -> Result<()> {
    assert!(takes_streams_when_expired("keep-expired-tunnels")?);
    Ok(())
}

/// Certificates that live for so long are renewed every few seconds: they are back-dated by a minute.
const BRIEF: &str = "10s";

pub fn says(held: &Proc, word: &str) -> Result<()> {
    let mark = held.log().mark();
    held.send_line(word)?;
    let answer = held.wait_for_event_after(mark, "data", SOON)?;
    ensure!(text(&answer, "data").contains(word), "{answer}");
    Ok(())
}

/// Lets the certificates of both nodes expire. Tells whether one is presented that has.
fn presents_what_has_expired(knobs: &'static str) -> Result<bool> {
    let scene = Scene::with(Setting {
        knobs,
        env: vec![("SECRET_TTL", BRIEF.to_owned())],
        control_plane: true,
        ..Setting::default()
    })?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    let stranger = scene.node1.pod("stranger")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let direct = hold(&scene.client, &scene.server_a)?;
    says(&direct, "before")?;
    let reaches = |to: &Pod| -> Result<bool> { Ok(answered(&echo(&scene.client, to)?)) };
    assert!(reaches(scene.server_b()?)?);
    let shown = || server_leaf(&stranger, scene.server_b()?, genuine(&scene, "client")?);
    let plane = scene.control_plane.as_ref().context("a control plane")?;

    plane.misbehave_now("ca: [refuse]")?;
    let mut not_after = validity_of(&shown()?)?.not_after;
    let presented = wait_until(SOON * 2, "the certificate to expire", || {
        let began = SystemTime::now();
        let Ok(leaf) = shown() else {
            return Ok(Some(false));
        };
        not_after = validity_of(&leaf)?.not_after;
        Ok((not_after <= began).then_some(true))
    })?;
    if presented {
        return Ok(true);
    }
    assert!(SystemTime::now() >= not_after, "given up before it expired");
    wait_until(SOON, "requests not to be answered", || {
        Ok((!reaches(scene.server_b()?)?).then_some(()))
    })?;
    for _ in 0..5 {
        assert!(shown().is_err());
        assert!(!reaches(scene.server_b()?)?);
        says(&direct, "meanwhile")?;
    }
    for agent in [&scene.agent1, scene.agent2()?] {
        let said = status(agent)?;
        let certificates = said["certificates"].to_string();
        assert!(certificates.contains(": expired"), "{certificates}");
        let warnings = said["warnings"].to_string();
        assert!(warnings.contains("told to refuse"), "{warnings}");
    }

    plane.misbehave_now("")?;
    // Attempts are half a minute apart by now.
    wait_until(SOON * 4, "requests to be answered", || {
        Ok(reaches(scene.server_b()?)?.then_some(()))
    })?;
    assert!(validity_of(&shown()?)?.not_after > not_after);
    let mark = scene.agent1.log().mark();
    says(&direct, "after")?;
    direct.close_stdin();
    let fields = [("path", "direct"), ("dst.workload", "server-a")];
    scene.agent1.wait_for_access(mark, &fields, SOON)?;
    Ok(false)
}

#[test]
fn a_certificate_that_has_expired_is_not_presented() -> Result<()> {
    assert!(!presents_what_has_expired("")?);
    Ok(())
}

#[test]
fn twin_a_certificate_that_has_expired_is_presented_when_nobody_looks_at_the_clock() -> Result<()> {
    assert!(presents_what_has_expired("present-expired")?);
    Ok(())
}
