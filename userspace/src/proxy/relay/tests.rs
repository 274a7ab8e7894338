//! The relay between real sockets: over plain TCP, and over two relays with a tunnel between them.

use std::net::SocketAddr;
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::super::hbone::fixture::{Client, Server, dial};
use super::super::hbone::{Incoming, Limits, PoolSettings, ServerSettings};
use super::*;

const SOON: Duration = Duration::from_secs(20);

async fn soon<F: Future>(future: F) -> F::Output {
    timeout(SOON, future).await.expect("took too long")
}

/// Both ends of a relayed connection, the relay nearest the client, and what keeps it running.
struct Path {
    client: TcpStream,
    server: TcpStream,
    relay: JoinHandle<RelayOutcome>,
    counters: Arc<RelayCounters>,
    cancel: CancellationToken,
    _tunnel: Option<(Server, Client)>,
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn spawn<U>(
    near: TcpStream,
    upstream: U,
) -> (
    JoinHandle<RelayOutcome>,
    Arc<RelayCounters>,
    CancellationToken,
)
where
    U: IntoSide + Send + 'static,
    U::Side: Send,
{
    let (counters, cancel) = (Arc::<RelayCounters>::default(), CancellationToken::new());
    let relay = tokio::spawn({
        let (counters, cancel) = (counters.clone(), cancel.clone());
        async move { relay(near, upstream, &counters, &cancel).await.0 }
    });
    (relay, counters, cancel)
}

async fn plain() -> Path {
    let ((front, front_address), (back, back_address)) = (listen().await, listen().await);
    let client = dial(front_address).await.unwrap();
    let (near, _) = front.accept().await.unwrap();
    let far = dial(back_address).await.unwrap();
    let (server, _) = back.accept().await.unwrap();
    let (relay, counters, cancel) = spawn(near, far);
    Path {
        client,
        server,
        relay,
        counters,
        cancel,
        _tunnel: None,
    }
}

/// A server whose streams are relayed to `app`, and a client of it.
async fn tunnel_to(app: SocketAddr, limits: Limits) -> (Server, Client) {
    let settings = ServerSettings {
        limits,
        ..ServerSettings::default()
    };
    let server = Server::start(settings, move |incoming: Incoming| async move {
        let socket = TcpSocket::new_v4().unwrap();
        // Small, so that an application that does not read is felt soon.
        socket.set_send_buffer_size(16 * 1024).unwrap();
        let app = socket.connect(app).await.unwrap();
        app.set_nodelay(true).unwrap();
        let stream = incoming.accept().unwrap();
        drop(relay(stream, app, &Arc::default(), &CancellationToken::new()).await);
    })
    .await;
    let client = server.client(PoolSettings::default());
    (server, client)
}

async fn tunnelled() -> Path {
    let ((front, front_address), (back, back_address)) = (listen().await, listen().await);
    let (tunnel, pool) = tunnel_to(back_address, Limits::default()).await;
    let client = dial(front_address).await.unwrap();
    let (near, _) = front.accept().await.unwrap();
    let far = pool.connect().await.unwrap();
    let (server, _) = back.accept().await.unwrap();
    let (relay, counters, cancel) = spawn(near, far);
    Path {
        client,
        server,
        relay,
        counters,
        cancel,
        _tunnel: Some((tunnel, pool)),
    }
}

async fn path(through_tunnel: bool) -> Path {
    if through_tunnel {
        tunnelled().await
    } else {
        plain().await
    }
}

#[tokio::test]
async fn one_byte_goes_there_and_back_and_is_counted_while_open() {
    for through_tunnel in [false, true] {
        let mut path = path(through_tunnel).await;
        for round in 1..=100 {
            path.client.write_u8(7).await.unwrap();
            assert_eq!(soon(path.server.read_u8()).await.unwrap(), 7);
            path.server.write_u16(9).await.unwrap();
            assert_eq!(soon(path.client.read_u16()).await.unwrap(), 9);
            assert_eq!(
                (path.counters.sent(), path.counters.received()),
                (round, 2 * round)
            );
        }
        drop((path.client, path.server));
        let outcome = soon(path.relay).await.unwrap();
        assert!(matches!(outcome.end, RelayEnd::Closed), "{outcome:?}");
        assert_eq!((outcome.sent, outcome.received), (100, 200));
    }
}

#[tokio::test]
async fn a_half_close_leaves_the_other_direction_open() {
    for through_tunnel in [false, true] {
        let mut path = path(through_tunnel).await;
        path.client.write_all(b"question").await.unwrap();
        path.client.shutdown().await.unwrap();
        let mut got = Vec::new();
        soon(path.server.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got, b"question");
        tokio::time::sleep(Duration::from_millis(50)).await;
        path.server.write_all(b"answer").await.unwrap();
        path.server.shutdown().await.unwrap();
        got.clear();
        soon(path.client.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got, b"answer");
        let outcome = soon(path.relay).await.unwrap();
        assert!(matches!(outcome.end, RelayEnd::Closed), "{outcome:?}");
        assert_eq!((outcome.sent, outcome.received), (8, 6));
    }
}

#[tokio::test]
async fn a_reset_of_one_end_is_a_reset_of_the_other() {
    for (through_tunnel, by_client) in [(false, false), (false, true), (true, false), (true, true)]
    {
        let mut path = path(through_tunnel).await;
        path.client.write_u8(1).await.unwrap();
        path.server.read_u8().await.unwrap();
        path.server.write_u8(1).await.unwrap();
        path.client.read_u8().await.unwrap();
        let (gone, mut left) = if by_client {
            (path.client, path.server)
        } else {
            (path.server, path.client)
        };
        gone.set_zero_linger().unwrap();
        drop(gone);
        let error = soon(left.read_u8()).await.unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::ConnectionReset,
            "{through_tunnel} {by_client}"
        );
        let outcome = soon(path.relay).await.unwrap();
        match (by_client, &outcome.end) {
            (true, RelayEnd::ClientReset(_)) | (false, RelayEnd::UpstreamReset(_)) => {}
            _ => panic!("{outcome:?}"),
        }
    }
}

#[tokio::test]
async fn a_reset_after_a_half_close_is_noticed_without_traffic() {
    for (through_tunnel, by_client) in [(false, false), (false, true), (true, false), (true, true)]
    {
        let mut path = path(through_tunnel).await;
        let (gone, left) = if by_client {
            (&mut path.client, &mut path.server)
        } else {
            (&mut path.server, &mut path.client)
        };
        gone.shutdown().await.unwrap();
        assert_eq!(soon(left.read(&mut [0; 1])).await.unwrap(), 0);
        gone.set_zero_linger().unwrap();
        drop(if by_client { path.client } else { path.server });
        let outcome = soon(path.relay).await.unwrap();
        match (by_client, &outcome.end) {
            (true, RelayEnd::ClientReset(_)) | (false, RelayEnd::UpstreamReset(_)) => {}
            _ => panic!("{through_tunnel} {by_client} {outcome:?}"),
        }
    }
}

#[tokio::test]
async fn an_answer_that_was_complete_is_delivered_although_its_sender_is_gone() {
    for through_tunnel in [false, true] {
        let mut path = path(through_tunnel).await;
        // The server answers in full and closes without having read: more from the client then meets a reset.
        path.server.write_all(b"go away").await.unwrap();
        path.server.shutdown().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(path.server);
        path.client.write_all(b"more").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let _ = path.client.write_all(b"and more").await;
        let mut got = Vec::new();
        soon(path.client.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got, b"go away");
        soon(path.relay).await.unwrap();
    }
}

#[tokio::test]
async fn a_cancelled_relay_resets_both_ends() {
    for through_tunnel in [false, true] {
        let mut path = path(through_tunnel).await;
        path.client.write_u8(1).await.unwrap();
        path.server.read_u8().await.unwrap();
        path.cancel.cancel();
        for end in [&mut path.client, &mut path.server] {
            assert_eq!(
                soon(end.read_u8()).await.unwrap_err().kind(),
                io::ErrorKind::ConnectionReset
            );
        }
        let outcome = soon(path.relay).await.unwrap();
        assert!(matches!(outcome.end, RelayEnd::Cancelled), "{outcome:?}");
        assert_eq!((outcome.sent, outcome.received), (1, 0));
    }
}

#[tokio::test]
async fn a_server_that_does_not_read_stops_the_client_and_gets_everything_later() {
    for through_tunnel in [false, true] {
        let mut path = path(through_tunnel).await;
        let chunk = vec![7; 64 * 1024];
        let mut written = 0;
        while let Ok(result) = timeout(Duration::from_millis(300), path.client.write(&chunk)).await
        {
            written += result.unwrap();
            assert!(written < 64 << 20, "not bounded");
        }
        path.client.shutdown().await.unwrap();
        let mut got = Vec::new();
        soon(path.server.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got.len(), written);
    }
}

#[tokio::test]
async fn small_frames_for_a_server_that_does_not_read_do_not_kill_the_tunnel() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 * 1024).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let back = socket.listen(1).unwrap();
    // A budget that without prefetching would be spent after some 4,000 unread frames.
    let limits = Limits {
        small_frame_budget: 1 << 20,
        ..Limits::default()
    };
    let (tunnel, pool) = tunnel_to(back.local_addr().unwrap(), limits).await;
    let mut stream = pool.connect().await.unwrap();
    let (mut server, _) = back.accept().await.unwrap();
    // More than the sockets take, less than the stream's window: from here on the relay cannot write.
    soon(stream.write_all(&vec![1; 1 << 20])).await.unwrap();
    for _ in 0..20_000 {
        soon(stream.write_u8(2)).await.unwrap();
        tokio::task::yield_now().await;
    }
    soon(stream.shutdown()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut got = Vec::new();
    soon(server.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got.len(), (1 << 20) + 20_000);
    assert_eq!(tunnel.handshakes(), 1);
}

#[tokio::test]
async fn a_client_that_dies_while_the_server_does_not_read_is_noticed() {
    for through_tunnel in [false, true] {
        let mut path = path(through_tunnel).await;
        let chunk = vec![7; 64 * 1024];
        while let Ok(written) = timeout(Duration::from_millis(300), path.client.write(&chunk)).await
        {
            written.unwrap();
        }
        path.client.set_zero_linger().unwrap();
        drop(path.client);
        let outcome = soon(path.relay).await.unwrap();
        assert!(
            matches!(outcome.end, RelayEnd::ClientReset(_)),
            "{outcome:?}"
        );
    }
}

#[tokio::test]
async fn a_reset_that_meets_a_write_is_not_taken_for_an_end() {
    for _ in 0..100 {
        let path = plain().await;
        let (of_client, of_server) = (
            Script {
                chunks: vec![1, 1],
                reset: false,
            },
            Script {
                chunks: vec![1],
                reset: true,
            },
        );
        let (client, _) = tokio::join!(
            play(path.client, of_client, 0),
            play(path.server, of_server, 1)
        );
        assert!(!(client.wrote_all && client.ended == Some(true)));
        assert!(matches!(
            soon(path.relay).await.unwrap().end,
            RelayEnd::UpstreamReset(_)
        ));
    }
}

#[derive(Debug, Clone)]
struct Script {
    chunks: Vec<usize>,
    reset: bool,
}

impl Script {
    fn bytes(&self, seed: u8) -> Vec<u8> {
        let total: usize = self.chunks.iter().sum();
        (0..total).map(|index| (index % 251) as u8 ^ seed).collect()
    }
}

fn script() -> impl Strategy<Value = Script> {
    let size = prop_oneof![4 => 1_usize..100, 2 => 1_000_usize..20_000, 1 => 60_000_usize..400_000];
    let reset = prop_oneof![3 => Just(false), 1 => Just(true)];
    (prop::collection::vec(size, 0..12), reset).prop_map(|(chunks, reset)| Script { chunks, reset })
}

/// What one end saw: the bytes, and whether it saw the end. None after it has reset the connection itself.
struct Seen {
    bytes: Vec<u8>,
    ended: Option<bool>,
    wrote_all: bool,
}

async fn play(mut stream: TcpStream, script: Script, seed: u8) -> Seen {
    let mut bytes = Vec::new();
    let (wrote_all, ended) = exchange(&mut stream, &script, &script.bytes(seed), &mut bytes).await;
    if script.reset {
        stream.set_zero_linger().unwrap();
    }
    Seen {
        bytes,
        ended,
        wrote_all,
    }
}

async fn exchange(
    stream: &mut TcpStream,
    script: &Script,
    outgoing: &[u8],
    got: &mut Vec<u8>,
) -> (bool, Option<bool>) {
    let (mut reader, mut writer) = stream.split();
    let mut writing = pin!(async {
        let mut rest = outgoing;
        for size in &script.chunks {
            let (chunk, after) = rest.split_at(*size);
            if writer.write_all(chunk).await.is_err() {
                return false;
            }
            rest = after;
            tokio::task::yield_now().await;
        }
        script.reset || writer.shutdown().await.is_ok()
    });
    let mut reading = pin!(async {
        loop {
            match reader.read_buf(got).await {
                Ok(0) => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    });
    if !script.reset {
        let (wrote_all, ended) = tokio::join!(writing, reading);
        return (wrote_all, Some(ended));
    }
    let wrote_all = tokio::select! {
        wrote_all = &mut writing => wrote_all,
        _ = &mut reading => writing.await,
    };
    (wrote_all, None)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_one_end_sends_the_other_gets_and_a_cut_stream_never_ends(
        through_tunnel: bool,
        of_client in script(),
        of_server in script(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let path = path(through_tunnel).await;
            let (client, server) = soon(async {
                tokio::join!(
                    play(path.client, of_client.clone(), 0x00),
                    play(path.server, of_server.clone(), 0xff)
                )
            }).await;
            let outcome = soon(path.relay).await.unwrap();
            for (seen, sent, script) in [
                (&server, of_client.bytes(0x00), &of_client),
                (&client, of_server.bytes(0xff), &of_server),
            ] {
                prop_assert!(sent.starts_with(&seen.bytes), "bytes changed or out of order");
                // The kernel tells a reset once: to a write, after which a read sees an end.
                if seen.ended == Some(true) && seen.wrote_all {
                    prop_assert!(!script.reset && seen.bytes == sent, "an end that nobody sent: {:?}", outcome);
                }
            }
            if !of_client.reset && !of_server.reset {
                prop_assert!(client.wrote_all && server.wrote_all);
                prop_assert_eq!((client.ended, server.ended), (Some(true), Some(true)));
                prop_assert!(matches!(outcome.end, RelayEnd::Closed), "{:?}", outcome);
                prop_assert_eq!(outcome.sent, server.bytes.len() as u64);
                prop_assert_eq!(outcome.received, client.bytes.len() as u64);
            }
            Ok(())
        })?;
    }
}
