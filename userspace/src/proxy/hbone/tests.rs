//! Pool and server against each other, and each against an h2 peer that misbehaves, over real sockets and TLS.

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
use crate::proxy::tls::{self, ExpectedServer, HandshakeError, PeerRejection, TestKnobs};

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
    let sent: Vec<u8> = (0..12_000_000_u32).map(|index| (index % 251) as u8).collect();
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    timeout(Duration::from_secs(60), reader.read_to_end(&mut got)).await.unwrap().unwrap();
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
    let other = Client { key: PoolKey { source: "pod-2".into(), ..client.key.clone() }, ..client };
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
    let streams = timeout(Duration::from_secs(60), tasks.join_all()).await.unwrap();
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
    timeout(Duration::from_secs(30), reader.read_exact(&mut got)).await.unwrap().unwrap();
    assert!(got.iter().enumerate().all(|(index, byte)| *byte == index as u8));
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
            stream.write_all(&u64::try_from(got.len()).unwrap().to_le_bytes()).await.unwrap();
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
        let error = soon(client.connect_to(&format!("10.0.0.1:{port}"))).await.unwrap_err();
        assert!(
            matches!(error, HboneError::Refused { status, .. } if status.as_u16() == expected),
            "{port}: {error}"
        );
    }
    assert_eq!(server.handshakes(), 1);
    let error = soon(client.connect_to("name.example:80")).await.unwrap_err();
    assert!(matches!(error, HboneError::Refused { status: StatusCode::BAD_REQUEST, .. }), "{error}");
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
    let error = soon(async { loop { if let Err(error) = stream.write_all(b"x").await { return error } } }).await;
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
            let _ = told.send(stream.read_to_end(&mut rest).await.map_err(|error| error.kind()));
        }
    })
    .await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    stream.write_all(b"half").await.unwrap();
    drop(stream);
    assert_eq!(soon(seen.recv()).await.unwrap(), Err(io::ErrorKind::ConnectionReset));
    let mut stream = client.connect().await.unwrap();
    stream.abort();
    assert!(stream.read(&mut [0; 1]).await.is_err());
    assert_eq!(soon(seen.recv()).await.unwrap(), Err(io::ErrorKind::ConnectionReset));
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
    assert!(matches!(soon(server.ends.recv()).await, Some(ServeEnd::Drained)));
}

#[tokio::test]
async fn a_drain_ends_with_the_grace_time() {
    let settings = ServerSettings { grace: Duration::from_millis(200), ..ServerSettings::default() };
    let mut server = Server::echo(settings).await;
    let client = server.client(PoolSettings::default());
    let mut stream = client.connect().await.unwrap();
    round_trip(&mut stream, b"x").await;
    server.stop.drain.cancel();
    assert!(soon(stream.read(&mut [0; 1])).await.is_err());
    assert!(matches!(soon(server.ends.recv()).await, Some(ServeEnd::Drained)));
}

/// Accepts TLS connections and gives each, with its number, to `script` as an h2 server.
async fn scripted<H, F>(ca: &Ca, script: H) -> (SocketAddr, JoinSet<()>)
where
    H: Fn(usize, tokio_rustls::server::TlsStream<TcpStream>) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let certificate = ca.issue("server");
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        for number in 0.. {
            let (tcp, _) = listener.accept().await.unwrap();
            let config = tls::server_config(&certificate, TestKnobs::default()).unwrap();
            let accepted = tls::accept(tcp, config, SOON, TestKnobs::default()).await.unwrap();
            connections.spawn(script(number, accepted.stream));
        }
    });
    (address, tasks)
}

fn client_of(ca: &Ca, address: SocketAddr, settings: PoolSettings) -> Client {
    Client {
        pool: Pool::new(settings, TestKnobs::default()),
        certificate: ca.issue("client"),
        key: PoolKey {
            source: "pod-1".into(),
            identity: identity("client"),
            destination: address,
            expected: ExpectedServer::one(identity("server")),
        },
    }
}

async fn serve_echo(io: tokio_rustls::server::TlsStream<TcpStream>) {
    serve(io, ServerSettings::default(), Stop::default(), echo).await;
}

#[tokio::test]
async fn a_pooled_tunnel_that_died_quietly_is_replaced() {
    let ca = Ca::new();
    let (address, _tasks) = scripted(&ca, |number, io| async move {
        if number > 0 {
            return serve_echo(io).await;
        }
        // Serves one stream, then stops reading: the next request meets a connection that is closed under it.
        let mut connection = h2::server::handshake(io).await.unwrap();
        let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
        let mut send = respond.send_response(http::Response::new(()), false).unwrap();
        send.send_data(Bytes::new(), true).unwrap();
        let _ = connection.accept().await;
    })
    .await;
    let client = client_of(&ca, address, PoolSettings::default());
    drop(soon(client.connect()).await.unwrap());
    round_trip(&mut soon(client.connect()).await.unwrap(), b"x").await;
}

#[tokio::test]
async fn a_stream_the_peer_did_not_process_is_tried_once_more() {
    for reason in [None, Some(Reason::REFUSED_STREAM)] {
        let ca = Ca::new();
        let (address, _tasks) = scripted(&ca, move |number, io| async move {
            if number > 0 {
                return serve_echo(io).await;
            }
            let mut connection = h2::server::handshake(io).await.unwrap();
            match reason {
                // GOAWAY for a tunnel that never took a stream.
                None => connection.abrupt_shutdown(Reason::NO_ERROR),
                Some(reason) => connection.accept().await.unwrap().unwrap().1.send_reset(reason),
            }
            let _ = timeout(Duration::from_secs(1), connection.accept()).await;
        })
        .await;
        let client = client_of(&ca, address, PoolSettings::default());
        round_trip(&mut soon(client.connect()).await.unwrap(), b"x").await;
    }
}

#[tokio::test]
async fn a_peer_that_refuses_every_stream_is_tried_twice_only() {
    let ca = Ca::new();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let (address, _tasks) = scripted(&ca, move |_, io| {
        let counted = counted.clone();
        async move {
            let mut connection = h2::server::handshake(io).await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                respond.send_reset(Reason::REFUSED_STREAM);
            }
        }
    })
    .await;
    let client = client_of(&ca, address, PoolSettings::default());
    assert!(soon(client.connect()).await.is_err());
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_peer_that_allows_fewer_streams_gets_fewer() {
    let ca = Ca::new();
    let (address, _tasks) = scripted(&ca, |_, io| async move {
        let limits = Limits { max_streams: 2, ..Limits::default() };
        let settings = ServerSettings { limits, ..ServerSettings::default() };
        serve(io, settings, Stop::default(), echo).await;
    })
    .await;
    let client = client_of(&ca, address, PoolSettings::default());
    let mut streams = Vec::new();
    for _ in 0..7 {
        let mut stream = soon(client.connect()).await.unwrap();
        round_trip(&mut stream, b"x").await;
        streams.push(stream);
    }
    assert!(client.pool.tunnels() >= 4);
}

#[tokio::test]
async fn a_peer_that_never_answers_runs_into_the_deadlines() {
    let quick = PoolSettings {
        handshake_deadline: Duration::from_millis(200),
        answer_deadline: Duration::from_millis(200),
        ..PoolSettings::default()
    };
    // No TLS.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ca = Ca::new();
    let client = client_of(&ca, listener.local_addr().unwrap(), quick);
    let error = soon(client.connect()).await.unwrap_err();
    assert!(matches!(error, HboneError::Deadline { .. } | HboneError::Tls { .. }), "{error}");
    // No answer to CONNECT; the tunnel is not used again.
    let (address, _tasks) = scripted(&ca, |_, io| async move {
        let mut connection = h2::server::handshake(io).await.unwrap();
        let _held = connection.accept().await;
        let _ = connection.accept().await;
    })
    .await;
    let client = client_of(&ca, address, quick);
    let error = soon(client.connect()).await.unwrap_err();
    assert!(matches!(error, HboneError::Deadline { waited_for: "the answer to CONNECT", .. }), "{error}");
}

#[tokio::test]
async fn a_destination_that_cannot_be_dialled_or_verified_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let ca = Ca::new();
    let client = client_of(&ca, address, PoolSettings::default());
    let error = soon(client.connect()).await.unwrap_err();
    assert!(matches!(error, HboneError::Dial { .. }), "{error}");
    assert!(client.pool.keys().is_empty());

    let server = Server::echo(ServerSettings::default()).await;
    let mut client = server.client(PoolSettings::default());
    client.key.expected = ExpectedServer::one(identity("another"));
    let HboneError::Tls { error, .. } = soon(client.connect()).await.unwrap_err() else { panic!() };
    assert!(matches!(*error, HandshakeError::Peer(PeerRejection::NotExpected { .. })), "{error}");
}

#[tokio::test]
async fn a_client_whose_certificate_the_server_refuses_learns_why() {
    let server = Server::echo(ServerSettings::default()).await;
    let foreign = Ca::new();
    let mut client = server.client(PoolSettings::default());
    // Its chain is foreign to the server, while it trusts the server's root itself.
    let (leaf, key) = foreign
        .ca
        .issue_names(
            vec![rcgen::SanType::URI(identity("client").to_string().as_str().try_into().unwrap())],
            crate::identity::Validity { not_before: std::time::UNIX_EPOCH, not_after: std::time::SystemTime::now() + DAY },
        )
        .unwrap();
    let roots = server.ca.ca.roots().clone();
    client.certificate = Arc::new(crate::identity::WorkloadCertificate::new(vec![leaf], key, roots).unwrap());
    let error = soon(client.connect()).await.unwrap_err();
    let HboneError::Tls { error, .. } = error else { panic!("{error}") };
    assert!(matches!(*error, HandshakeError::Refused(rustls::AlertDescription::UnknownCA)), "{error}");
}

#[tokio::test]
async fn idle_tunnels_are_closed_and_busy_ones_kept() {
    let settings = PoolSettings { idle: Duration::from_millis(100), ..PoolSettings::default() };
    let mut server = Server::echo(ServerSettings::default()).await;
    let client = server.client(settings);
    let mut stream = client.connect().await.unwrap();
    tokio::time::sleep(Duration::from_millis(400)).await;
    round_trip(&mut stream, b"x").await;
    assert_eq!(client.pool.tunnels(), 1);
    drop(stream);
    until(|| client.pool.keys().is_empty()).await;
    assert!(matches!(soon(server.ends.recv()).await, Some(ServeEnd::Closed)));
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
    let other = Client { key: PoolKey { source: "pod-2".into(), ..one.key.clone() }, ..one };
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
    assert!(matches!(soon(server.ends.recv()).await, Some(ServeEnd::Closed)));
}

// The server against raw HTTP/2 clients, without TLS: TLS is not what is tested.

async fn raw(settings: ServerSettings) -> (h2::client::SendRequest<Bytes>, JoinSet<()>, tokio::task::JoinHandle<ServeEnd>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let serving = tokio::spawn(serve(near, settings, Stop::default(), echo));
    let (send, connection) = h2::client::handshake(far).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { drop(connection.await) });
    (send, tasks, serving)
}

/// END_STREAM may come on an empty frame.
async fn no_more_bytes(body: &mut h2::RecvStream) {
    while let Some(frame) = soon(body.data()).await {
        assert!(frame.unwrap().is_empty());
    }
}

#[tokio::test]
async fn what_is_not_a_connect_to_an_address_is_a_bad_request() {
    let (send, _tasks, _serving) = raw(ServerSettings::default()).await;
    let connect = |authority: &str| Request::builder().method(Method::CONNECT).uri(authority).body(()).unwrap();
    let get = Request::builder().uri("https://10.0.0.1:80/").body(()).unwrap();
    let post = Request::builder().method(Method::POST).uri("https://10.0.0.1:80/").body(()).unwrap();
    for request in [get, post, connect("name.example:80"), connect("10.0.0.1:0"), connect("u@10.0.0.1:80")] {
        let what = format!("{request:?}");
        let mut send = send.clone().ready().await.unwrap();
        let (answer, _) = send.send_request(request, false).unwrap();
        assert_eq!(soon(answer).await.unwrap().status(), StatusCode::BAD_REQUEST, "{what}");
    }
    let mut send = send.clone().ready().await.unwrap();
    let (answer, _) = send.send_request(connect("10.0.0.1:80"), false).unwrap();
    assert_eq!(soon(answer).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn headers_over_the_limit_are_refused_and_the_tunnel_lives() {
    let (send, _tasks, _serving) = raw(ServerSettings::default()).await;
    for (size, expected) in [(40_000, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE), (8_000, StatusCode::OK)] {
        let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").header("baggage", "x".repeat(size));
        let mut send = send.clone().ready().await.unwrap();
        let (answer, _stream) = send.send_request(request.body(()).unwrap(), false).unwrap();
        assert_eq!(soon(answer).await.unwrap().status(), expected);
    }
}

#[tokio::test]
async fn a_client_that_opens_and_resets_without_end_is_bounded() {
    let running = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let (near, far) = tokio::io::duplex(1 << 20);
    let handler = {
        let (running, most) = (running.clone(), most.clone());
        move |incoming: Incoming| {
            let (running, most) = (running.clone(), most.clone());
            async move {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                // A handler that is slow to notice.
                tokio::time::sleep(Duration::from_secs(1)).await;
                running.fetch_sub(1, Ordering::SeqCst);
                drop(incoming);
            }
        }
    };
    let settings = ServerSettings::default();
    let _serving = tokio::spawn(serve(near, settings, Stop::default(), handler));
    let (send, connection) = h2::client::Builder::new().initial_max_send_streams(100).handshake::<_, Bytes>(far).await.unwrap();
    let _driving = tokio::spawn(connection);
    for _ in 0..5_000 {
        let Ok(mut send) = send.clone().ready().await else { break };
        let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
        let Ok((_, mut stream)) = send.send_request(request, false) else { break };
        tokio::task::yield_now().await;
        stream.send_reset(Reason::CANCEL);
    }
    assert!(most.load(Ordering::SeqCst) <= 2 * 200);
}

#[tokio::test]
async fn a_client_that_sends_nothing_is_closed() {
    let settings = ServerSettings { handshake_deadline: Duration::from_millis(50), ..ServerSettings::default() };
    let (near, _far): (DuplexStream, _) = tokio::io::duplex(1024);
    let end = soon(serve(near, settings, Stop::default(), echo)).await;
    assert!(matches!(end, ServeEnd::Deadline("HTTP/2 preface", _)), "{end}");
    let (_send, _tasks, serving) = raw(settings).await;
    let end = soon(serving).await.unwrap();
    assert!(matches!(end, ServeEnd::Deadline("request", _)), "{end}");
}

#[tokio::test]
async fn a_tunnel_without_streams_is_closed_by_the_server_too() {
    let settings = ServerSettings { idle: Duration::from_millis(50), ..ServerSettings::default() };
    let (send, _tasks, serving) = raw(settings).await;
    let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
    let (answer, mut stream) = send.clone().send_request(request, false).unwrap();
    let mut body = soon(answer).await.unwrap().into_body();
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert!(!serving.is_finished());
    stream.send_data(Bytes::new(), true).unwrap();
    no_more_bytes(&mut body).await;
    drop((body, stream));
    let end = soon(serving).await.unwrap();
    assert!(matches!(end, ServeEnd::Idle), "{end}");
}

#[tokio::test]
async fn noise_instead_of_http2_ends_the_tunnel() {
    let (near, mut far) = tokio::io::duplex(1024);
    far.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let end = soon(serve(near, ServerSettings::default(), Stop::default(), echo)).await;
    assert!(matches!(end, ServeEnd::Failed(_)), "{end}");
}

#[tokio::test]
async fn trailers_end_a_stream() {
    let (send, _tasks, _serving) = raw(ServerSettings::default()).await;
    let request = Request::builder().method(Method::CONNECT).uri("10.0.0.1:80").body(()).unwrap();
    let (answer, mut stream) = send.clone().send_request(request, false).unwrap();
    let mut body = soon(answer).await.unwrap().into_body();
    stream.send_data(Bytes::from_static(b"x"), false).unwrap();
    stream.send_trailers(http::HeaderMap::new()).unwrap();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "x");
    no_more_bytes(&mut body).await;
}
