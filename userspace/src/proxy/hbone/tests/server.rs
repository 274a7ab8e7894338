//! The server against raw HTTP/2 clients, without TLS, which is not what is tested here.

use super::*;

async fn raw(
    settings: ServerSettings,
) -> (
    h2::client::SendRequest<Bytes>,
    JoinSet<()>,
    tokio::task::JoinHandle<ServeEnd>,
) {
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
    let connect = |authority: &str| {
        Request::builder()
            .method(Method::CONNECT)
            .uri(authority)
            .body(())
            .unwrap()
    };
    let get = Request::builder()
        .uri("https://10.0.0.1:80/")
        .body(())
        .unwrap();
    let post = Request::builder()
        .method(Method::POST)
        .uri("https://10.0.0.1:80/")
        .body(())
        .unwrap();
    for request in [
        get,
        post,
        connect("name.example:80"),
        connect("10.0.0.1:0"),
        connect("u@10.0.0.1:80"),
    ] {
        let what = format!("{request:?}");
        let mut send = send.clone().ready().await.unwrap();
        let (answer, _) = send.send_request(request, false).unwrap();
        assert_eq!(
            soon(answer).await.unwrap().status(),
            StatusCode::BAD_REQUEST,
            "{what}"
        );
    }
    let mut send = send.clone().ready().await.unwrap();
    let (answer, _) = send.send_request(connect("10.0.0.1:80"), false).unwrap();
    assert_eq!(soon(answer).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn headers_over_the_limit_are_refused_and_the_tunnel_lives() {
    let (send, _tasks, _serving) = raw(ServerSettings::default()).await;
    for (size, expected) in [
        (40_000, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        (8_000, StatusCode::OK),
    ] {
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri("10.0.0.1:80")
            .header("baggage", "x".repeat(size));
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
    let (send, connection) = h2::client::Builder::new()
        .initial_max_send_streams(100)
        .handshake::<_, Bytes>(far)
        .await
        .unwrap();
    let _driving = tokio::spawn(connection);
    for _ in 0..5_000 {
        let Ok(mut send) = send.clone().ready().await else {
            break;
        };
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri("10.0.0.1:80")
            .body(())
            .unwrap();
        let Ok((_, mut stream)) = send.send_request(request, false) else {
            break;
        };
        tokio::task::yield_now().await;
        stream.send_reset(Reason::CANCEL);
    }
    assert!(most.load(Ordering::SeqCst) <= 2 * 200);
}

#[tokio::test]
async fn a_client_that_sends_nothing_is_closed() {
    let settings = ServerSettings {
        handshake_deadline: Some(Duration::from_millis(50)),
        ..ServerSettings::default()
    };
    let (near, _far): (DuplexStream, _) = tokio::io::duplex(1024);
    let end = soon(serve(near, settings, Stop::default(), echo)).await;
    assert!(
        matches!(end, ServeEnd::Deadline("HTTP/2 preface", _)),
        "{end}"
    );
    let endless = ServerSettings {
        handshake_deadline: None,
        idle: Duration::from_millis(50),
        ..settings
    };
    // Also without a deadline for handshakes the first request has one.
    for settings in [settings, endless] {
        let (_send, _tasks, serving) = raw(settings).await;
        let end = soon(serving).await.unwrap();
        assert!(matches!(end, ServeEnd::Deadline("request", _)), "{end}");
    }
}

#[tokio::test]
async fn a_tunnel_without_streams_is_closed_by_the_server_too() {
    let settings = ServerSettings {
        idle: Duration::from_millis(50),
        ..ServerSettings::default()
    };
    let (send, _tasks, serving) = raw(settings).await;
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri("10.0.0.1:80")
        .body(())
        .unwrap();
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
    far.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let end = soon(serve(
        near,
        ServerSettings::default(),
        Stop::default(),
        echo,
    ))
    .await;
    assert!(matches!(end, ServeEnd::Failed(_)), "{end}");
}

#[tokio::test]
async fn trailers_end_a_stream() {
    let (send, _tasks, _serving) = raw(ServerSettings::default()).await;
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri("10.0.0.1:80")
        .body(())
        .unwrap();
    let (answer, mut stream) = send.clone().send_request(request, false).unwrap();
    let mut body = soon(answer).await.unwrap().into_body();
    stream.send_data(Bytes::from_static(b"x"), false).unwrap();
    stream.send_trailers(http::HeaderMap::new()).unwrap();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "x");
    no_more_bytes(&mut body).await;
}
