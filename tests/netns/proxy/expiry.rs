//! A tunnel takes streams for as long as the certificate it was opened with is valid.

use std::{
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use culvert::identity::Validity;
use culvert_tests::scene::{PORT, Scene, Setting, serve};
use h2::{RecvStream, SendStream};

use super::peer::{
    TUNNEL_PORT, connect_request, handshake, in_pod, mesh_ca, proof, spiffe, valid_now,
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
    let _server = serve(&scene.server_b, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    let tunnel = SocketAddr::new(scene.server_b.address(), TUNNEL_PORT);
    let authority = scene.server_b.at(PORT);
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
