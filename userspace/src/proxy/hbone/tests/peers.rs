//! The pool against peers that misbehave, over real sockets and TLS.

use super::*;

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
            let config = tls::server_config(&certificate, &PeerChecks::default()).unwrap();
            let accepted = tls::accept(tcp, config, Some(SOON), &PeerChecks::default())
                .await
                .unwrap();
            connections.spawn(script(number, accepted.stream));
        }
    });
    (address, tasks)
}

fn client_of(ca: &Ca, address: SocketAddr, settings: PoolSettings) -> Client {
    Client {
        pool: Pool::new(settings, PeerChecks::default()),
        certificate: ca.issue("client"),
        key: PoolKey {
            source: "pod-1".into(),
            from: None,
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
        let mut send = respond
            .send_response(http::Response::new(()), false)
            .unwrap();
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
                Some(reason) => connection
                    .accept()
                    .await
                    .unwrap()
                    .unwrap()
                    .1
                    .send_reset(reason),
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
        let limits = Limits {
            max_streams: 2,
            ..Limits::default()
        };
        let settings = ServerSettings {
            limits,
            ..ServerSettings::default()
        };
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
        handshake_deadline: Some(Duration::from_millis(200)),
        answer_deadline: Duration::from_millis(200),
        ..PoolSettings::default()
    };
    // No TLS.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let ca = Ca::new();
    let client = client_of(&ca, listener.local_addr().unwrap(), quick);
    let error = soon(client.connect()).await.unwrap_err();
    assert!(
        matches!(error, HboneError::Deadline { .. } | HboneError::Tls { .. }),
        "{error}"
    );
    // No answer to CONNECT; the tunnel is not used again.
    let (address, _tasks) = scripted(&ca, |_, io| async move {
        let mut connection = h2::server::handshake(io).await.unwrap();
        let _held = connection.accept().await;
        let _ = connection.accept().await;
    })
    .await;
    let client = client_of(&ca, address, quick);
    let error = soon(client.connect()).await.unwrap_err();
    assert!(
        matches!(
            error,
            HboneError::Deadline {
                waited_for: "the answer to CONNECT",
                ..
            }
        ),
        "{error}"
    );
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
    let HboneError::Tls { error, .. } = soon(client.connect()).await.unwrap_err() else {
        panic!()
    };
    assert!(
        matches!(
            *error,
            HandshakeError::Peer(PeerRejection::NotExpected { .. })
        ),
        "{error}"
    );
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
            vec![rcgen::SanType::URI(
                identity("client").to_string().as_str().try_into().unwrap(),
            )],
            crate::identity::Validity {
                not_before: std::time::UNIX_EPOCH,
                not_after: std::time::SystemTime::now() + DAY,
            },
        )
        .unwrap();
    let roots = server.ca.ca.roots().clone();
    client.certificate =
        Arc::new(crate::identity::WorkloadCertificate::new(vec![leaf], key, roots).unwrap());
    let error = soon(client.connect()).await.unwrap_err();
    let HboneError::Tls { error, .. } = error else {
        panic!("{error}")
    };
    assert!(
        matches!(
            *error,
            HandshakeError::Refused(rustls::AlertDescription::UnknownCA)
        ),
        "{error}"
    );
}
