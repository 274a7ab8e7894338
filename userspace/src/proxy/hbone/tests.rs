//! Pool and server against each other, over real sockets and TLS.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http::{Method, Request, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::fixture::*;
use super::*;
use crate::proxy::tls::{self, ExpectedServer, HandshakeError, PeerChecks, PeerRejection};

mod peers;
mod server;

const SOON: Duration = Duration::from_secs(10);

async fn soon<F: Future>(future: F) -> F::Output {
    timeout(SOON, future).await.expect("took too long")
}

async fn until(mut condition: impl FnMut() -> bool) {
    soon(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn round_trip(stream: &mut HboneStream, text: &[u8]) {
    stream.write_all(text).await.unwrap();
    let mut got = vec![0; text.len()];
    soon(stream.read_exact(&mut got)).await.unwrap();
    assert_eq!(got, text);
}

#[tokio::test]
async fn bytes_and_half_closes_go_through() {
    let server = Server::echo(ServerSettings::default()).await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    round_trip(&mut stream, b"hello").await;
    stream.write_all(b"bye").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    soon(stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"bye");
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_huge_write_arrives_whole() {
    let server = Server::echo(ServerSettings::default()).await;
    let client = server.client(PoolSettings::default());
    let (mut reader, mut writer) = tokio::io::split(client.connect().await.unwrap());
    let sent: Vec<u8> = (0..12_000_000_u32)
        .map(|index| (index % 251) as u8)
        .collect();
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    timeout(Duration::from_secs(60), reader.read_to_end(&mut got))
        .await
        .unwrap()
        .unwrap();
    writing.await.unwrap();
    assert!(got == expected);
}

#[tokio::test]
async fn connections_of_one_key_share_a_tunnel_and_other_keys_do_not() {
    let server = Server::echo(ServerSettings::default()).await;
    let client = server.client(PoolSettings::default());
    let mut first = client.connect().await.unwrap();
    let mut second = client.connect().await.unwrap();
    round_trip(&mut first, b"1").await;
    round_trip(&mut second, b"2").await;
    assert_eq!(server.handshakes(), 1);
    let other = Client {
        key: PoolKey {
            source: "pod-2".into(),
            ..client.key.clone()
        },
        ..client
    };
    round_trip(&mut other.connect().await.unwrap(), b"3").await;
    assert_eq!(server.handshakes(), 2);
}

#[tokio::test]
async fn those_who_come_to_a_cold_key_at_once_share_one_handshake() {
    let server = Server::echo(ServerSettings::default()).await;
    let client = Arc::new(server.client(PoolSettings::default()));
    let mut tasks = JoinSet::new();
    for _ in 0..100 {
        let client = client.clone();
        tasks.spawn(async move {
            let mut stream = client.connect().await.unwrap();
            round_trip(&mut stream, b"x").await;
            stream
        });
    }
    let streams = soon(tasks.join_all()).await;
    assert_eq!(streams.len(), 100);
    assert_eq!(server.handshakes(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_spread_over_tunnels_that_are_not_overfilled() {
    let server = Server::echo(ServerSettings::default()).await;
    let client = Arc::new(server.client(PoolSettings::default()));
    let mut tasks = JoinSet::new();
    for index in 0..1000_u32 {
        let client = client.clone();
        tasks.spawn(async move {
            let mut stream = client.connect().await.unwrap();
            round_trip(&mut stream, &index.to_le_bytes()).await;
            stream
        });
    }
    let streams = timeout(Duration::from_secs(60), tasks.join_all())
        .await
        .unwrap();
    assert_eq!(streams.len(), 1000);
    let handshakes = server.handshakes();
    assert!((10..=20).contains(&handshakes), "{handshakes}");
}

#[tokio::test]
async fn giving_up_the_first_connection_does_not_fail_the_others() {
    let server = Server::echo(ServerSettings::default()).await;
    let client = Arc::new(server.client(PoolSettings::default()));
    let first = tokio::spawn({
        let client = client.clone();
        async move { client.connect().await.map(drop) }
    });
    tokio::task::yield_now().await;
    let second = tokio::spawn({
        let client = client.clone();
        async move { client.connect().await.map(drop) }
    });
    tokio::task::yield_now().await;
    first.abort();
    soon(second).await.unwrap().unwrap();
    assert_eq!(server.handshakes(), 1);
}

#[tokio::test]
async fn many_small_frames_do_not_kill_a_tunnel() {
    let server = Server::echo(ServerSettings::default()).await;
    let client = server.client(PoolSettings::default());
    let mut other = client.connect().await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(client.connect().await.unwrap());
    let writing = tokio::spawn(async move {
        for index in 0..20_000_u32 {
            writer.write_all(&[index as u8]).await.unwrap();
        }
        writer
    });
    let mut got = vec![0; 20_000];
    timeout(Duration::from_secs(30), reader.read_exact(&mut got))
        .await
        .unwrap()
        .unwrap();
    assert!(
        got.iter()
            .enumerate()
            .all(|(index, byte)| *byte == index as u8)
    );
    writing.await.unwrap();
    round_trip(&mut other, b"alive").await;
    assert_eq!(server.handshakes(), 1);
}

#[tokio::test]
async fn small_frames_for_a_reader_that_does_not_read_do_not_kill_a_tunnel() {
    let (hold, release) = tokio::sync::watch::channel(());
    let server = Server::start(ServerSettings::default(), move |incoming: Incoming| {
        let mut release = release.clone();
        async move {
            if incoming.connect().target.port() == 80 {
                return echo(incoming).await;
            }
            let mut stream = incoming.accept().unwrap();
            let _ = release.changed().await;
            let mut got = Vec::new();
            stream.read_to_end(&mut got).await.unwrap();
            stream
                .write_all(&u64::try_from(got.len()).unwrap().to_le_bytes())
                .await
                .unwrap();
            stream.shutdown().await.unwrap();
        }
    })
    .await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect_to("10.0.0.1:81").await.unwrap();
    for _ in 0..20_000 {
        stream.write_all(b"x").await.unwrap();
    }
    stream.shutdown().await.unwrap();
    let mut other = client.connect().await.unwrap();
    round_trip(&mut other, b"alive").await;
    drop(hold);
    assert_eq!(soon(stream.read_u64_le()).await.unwrap(), 20_000);
    assert_eq!(server.handshakes(), 1);
}

#[tokio::test]
async fn a_reader_that_does_not_read_stops_the_writer() {
    let server = Server::start(ServerSettings::default(), |incoming: Incoming| async move {
        let _stream = incoming.accept().unwrap();
        std::future::pending::<()>().await;
    })
    .await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    let chunk = vec![0; 64 * 1024];
    let mut written = 0;
    while let Ok(result) = timeout(Duration::from_millis(300), stream.write(&chunk)).await {
        written += result.unwrap();
        assert!(written < 8 << 20, "not bounded");
    }
    assert!(written >= 4 << 20, "{written}");
}

#[tokio::test]
async fn a_refusal_carries_its_status() {
    let server = Server::start(ServerSettings::default(), |incoming: Incoming| async move {
        match incoming.connect().target.port() {
            1 => incoming.refuse(Refusal::BadRequest),
            2 => incoming.refuse(Refusal::Denied),
            3 => incoming.refuse(Refusal::Unavailable),
            _ => drop(incoming),
        }
    })
    .await;
    let client = server.client(PoolSettings::default());
    for (port, expected) in [(1, 400), (2, 401), (3, 503), (4, 503)] {
        let error = soon(client.connect_to(&format!("10.0.0.1:{port}")))
            .await
            .unwrap_err();
        assert!(
            matches!(error, HboneError::Refused { status, .. } if status.as_u16() == expected),
            "{port}: {error}"
        );
    }
    assert_eq!(server.handshakes(), 1);
    let error = soon(client.connect_to("name.example:80"))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            HboneError::Refused {
                status: StatusCode::BAD_REQUEST,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_stream_reset_by_the_server_is_an_error_not_an_end() {
    let server = Server::start(ServerSettings::default(), |incoming: Incoming| async move {
        let mut stream = incoming.accept().unwrap();
        stream.write_all(b"half").await.unwrap();
        let _ = stream.read_u8().await;
        // Dropped without a shutdown.
    })
    .await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    let mut got = [0; 4];
    soon(stream.read_exact(&mut got)).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    for _ in 0..2 {
        let error = soon(stream.read(&mut got)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    }
    let error = soon(async {
        loop {
            if let Err(error) = stream.write_all(b"x").await {
                return error;
            }
        }
    })
    .await;
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
}

#[tokio::test]
async fn a_stream_dropped_by_the_client_is_reset_at_the_server() {
    let (told, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let server = Server::start(ServerSettings::default(), move |incoming: Incoming| {
        let told = told.clone();
        async move {
            let mut stream = incoming.accept().unwrap();
            let mut rest = Vec::new();
            let _ = told.send(
                stream
                    .read_to_end(&mut rest)
                    .await
                    .map_err(|error| error.kind()),
            );
        }
    })
    .await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    stream.write_all(b"half").await.unwrap();
    drop(stream);
    assert_eq!(
        soon(seen.recv()).await.unwrap(),
        Err(io::ErrorKind::ConnectionReset)
    );
    let mut stream = client.connect().await.unwrap();
    stream.abort();
    assert!(stream.read(&mut [0; 1]).await.is_err());
    assert_eq!(
        soon(seen.recv()).await.unwrap(),
        Err(io::ErrorKind::ConnectionReset)
    );
}

#[tokio::test]
async fn a_tunnel_that_dies_is_an_error_not_an_end() {
    let server = Server::echo(ServerSettings::default()).await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    round_trip(&mut stream, b"x").await;
    server.stop.close.cancel();
    let error = soon(stream.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{error}");
}

#[tokio::test]
async fn a_drained_server_lets_streams_finish_on_a_tunnel_that_takes_no_new_ones() {
    let mut server = Server::echo(ServerSettings::default()).await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    round_trip(&mut stream, b"x").await;
    server.stop.drain.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    round_trip(&mut stream, b"still here").await;
    assert_eq!(server.handshakes(), 1);
    // Whether a server that drains takes another tunnel is up to its listener; the old one is not used.
    drop(soon(client.connect()).await);
    assert!(server.handshakes() > 1);
    round_trip(&mut stream, b"still here").await;
    stream.shutdown().await.unwrap();
    assert_eq!(soon(stream.read(&mut [0; 1])).await.unwrap(), 0);
    drop(stream);
    until(|| client.pool.keys().is_empty()).await;
    assert!(matches!(
        soon(server.ends.recv()).await,
        Some(ServeEnd::Drained)
    ));
}

#[tokio::test]
async fn a_drain_ends_with_the_grace_time() {
    let settings = ServerSettings {
        grace: Duration::from_millis(200),
        ..ServerSettings::default()
    };
    let mut server = Server::echo(settings).await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    round_trip(&mut stream, b"x").await;
    server.stop.drain.cancel();
    assert!(soon(stream.read(&mut [0; 1])).await.is_err());
    assert!(matches!(
        soon(server.ends.recv()).await,
        Some(ServeEnd::Drained)
    ));
}

#[tokio::test]
async fn idle_tunnels_are_closed_and_busy_ones_kept() {
    let settings = PoolSettings {
        idle: Duration::from_millis(100),
        ..PoolSettings::default()
    };
    let mut server = Server::echo(ServerSettings::default()).await;
    let client = server.client(settings);
    let mut stream = client.connect().await.unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    round_trip(&mut stream, b"x").await;
    assert_eq!(client.pool.tunnels(), 1);
    drop(stream);
    until(|| client.pool.keys().is_empty()).await;
    assert!(matches!(
        soon(server.ends.recv()).await,
        Some(ServeEnd::Closed)
    ));
    round_trip(&mut client.connect().await.unwrap(), b"x").await;
    assert_eq!(server.handshakes(), 2);
}

#[tokio::test]
async fn a_renewed_certificate_gets_a_new_tunnel_and_old_streams_go_on() {
    let server = Server::echo(ServerSettings::default()).await;
    let mut client = server.client(PoolSettings::default());
    let mut old = client.connect().await.unwrap();
    client.certificate = server.ca.issue("client");
    let mut new = client.connect().await.unwrap();
    round_trip(&mut old, b"old").await;
    round_trip(&mut new, b"new").await;
    assert_eq!(server.handshakes(), 2);
    assert_eq!(client.pool.tunnels(), 1);
    // The drained one is still known, so that it can be closed.
    client.pool.close_where(|_| true);
    assert!(soon(old.read(&mut [0; 1])).await.is_err());
    assert!(soon(new.read(&mut [0; 1])).await.is_err());
}

#[tokio::test]
async fn closing_cuts_the_streams_of_those_keys_only() {
    let server = Server::echo(ServerSettings::default()).await;
    let one = server.client(PoolSettings::default());
    let mut first = one.connect().await.unwrap();
    let other = Client {
        key: PoolKey {
            source: "pod-2".into(),
            ..one.key.clone()
        },
        ..one
    };
    let mut second = other.connect().await.unwrap();
    other.pool.close_where(|key| &*key.source == "pod-1");
    assert!(soon(first.read(&mut [0; 1])).await.is_err());
    round_trip(&mut second, b"x").await;
    assert_eq!(other.pool.keys(), std::slice::from_ref(&other.key));
}

#[tokio::test]
async fn a_pool_that_shuts_down_lets_streams_finish_until_the_deadline() {
    let server = Server::echo(ServerSettings::default()).await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    let begun = std::time::Instant::now();
    let (_, error) = tokio::join!(client.pool.shutdown(Duration::from_millis(300)), async {
        round_trip(&mut stream, b"x").await;
        stream.read(&mut [0; 1]).await.unwrap_err()
    });
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    assert!(matches!(client.connect().await, Err(HboneError::Closed(_))));
}

#[tokio::test]
async fn a_dropped_pool_drains() {
    let mut server = Server::echo(ServerSettings::default()).await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    drop(client);
    round_trip(&mut stream, b"x").await;
    drop(stream);
    assert!(matches!(
        soon(server.ends.recv()).await,
        Some(ServeEnd::Closed)
    ));
}
