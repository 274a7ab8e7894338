//! What the HTTP endpoints promise, over real sockets.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

#[derive(Default)]
struct Node {
    ready: AtomicBool,
    quit: AtomicBool,
}

impl HttpState for Node {
    fn metrics(&self) -> String {
        "m 1\n# EOF\n".to_owned()
    }
    fn pending(&self) -> Vec<String> {
        match self.ready.load(Ordering::Relaxed) {
            true => Vec::new(),
            false => vec!["the mesh file".to_owned(), "pod a".to_owned()],
        }
    }
    fn config_dump(&self) -> serde_json::Value {
        serde_json::json!({"config": {"nodeName": "n"}, "pods": []})
    }
    fn log_levels(&self) -> String {
        "info".to_owned()
    }
    fn change_log_levels(&self, levels: &str, reset: bool) -> Result<String, LevelError> {
        match levels {
            "loud" => Err(LevelError::Directive(levels.to_owned())),
            _ => Ok(format!("{levels} {reset}")),
        }
    }
    fn quit(&self) {
        self.quit.store(true, Ordering::Relaxed);
    }
}

fn serve(limits: Limits) -> (Addresses, Arc<Node>, CancellationToken) {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let wanted = Addresses {
        stats: any,
        readiness: any,
        admin: any,
    };
    let servers = HttpServers::bind(wanted, limits).unwrap();
    let addresses = servers.addresses().unwrap();
    let node = Arc::new(Node::default());
    let shutdown = CancellationToken::new();
    tokio::spawn(servers.serve(node.clone(), shutdown.clone()));
    (addresses, node, shutdown)
}

#[tokio::test]
async fn what_is_logged_is_asked_for_and_changed() {
    let (at, ..) = serve(Limits::default());
    for (query, said) in [
        ("", "200 info"),
        ("?level=debug", "200 debug false"),
        (
            "?level=a%3A%3Ab:trace,warn&reset",
            "200 a::b:trace,warn true",
        ),
        ("?reset=", "200  true"),
        ("?level=loud", "400"),
        ("?level=%ff", "400"),
        ("?loud", "400"),
    ] {
        let answer = ask(at.admin, "POST", &format!("/logging{query}")).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let (status, text) = said.split_once(' ').unwrap_or((said, ""));
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        if status == "200" {
            assert_eq!(body, format!("current log level is {text}\n"));
        }
    }
    let answer = ask(at.admin, "GET", "/logging").await;
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    let answer = ask(at.stats, "POST", "/logging?level=debug").await;
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
}

/// Sends bytes and returns all that comes until the server closes.
async fn exchange(to: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(to).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

async fn ask(to: SocketAddr, method: &str, path: &str) -> String {
    let request = format!("{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    exchange(to, request.as_bytes()).await
}

#[tokio::test]
async fn each_port_serves_its_own_paths() {
    let (at, node, _) = serve(Limits::default());
    for path in ["/metrics", "/stats/prometheus"] {
        let answer = ask(at.stats, "GET", path).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(
            answer.contains("content-type: application/openmetrics-text"),
            "{answer}"
        );
        assert!(answer.ends_with("m 1\n# EOF\n"));
    }
    let dump = ask(at.admin, "GET", "/config_dump").await;
    let (_, body) = dump.split_once("\r\n\r\n").unwrap();
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(body["config"]["nodeName"], "n");
    for (to, path) in [
        (at.stats, "/config_dump"),
        (at.readiness, "/metrics"),
        (at.admin, "/healthz/ready"),
    ] {
        assert!(
            ask(to, "GET", path).await.starts_with("HTTP/1.1 404"),
            "{path}"
        );
    }
    assert!(
        ask(at.stats, "POST", "/metrics")
            .await
            .starts_with("HTTP/1.1 405")
    );
    assert!(
        ask(at.admin, "GET", "/quitquitquit")
            .await
            .starts_with("HTTP/1.1 405")
    );
    assert!(!node.quit.load(Ordering::Relaxed));
    assert!(
        ask(at.stats, "POST", "/quitquitquit")
            .await
            .starts_with("HTTP/1.1 405")
    );
    assert!(!node.quit.load(Ordering::Relaxed));
    assert!(
        ask(at.admin, "POST", "/quitquitquit")
            .await
            .starts_with("HTTP/1.1 200")
    );
    assert!(node.quit.load(Ordering::Relaxed));
}

#[tokio::test]
async fn readiness_lists_what_is_pending() {
    let (at, node, _) = serve(Limits::default());
    let answer = ask(at.readiness, "GET", "/healthz/ready").await;
    assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
    assert!(
        answer.ends_with("not ready:\nthe mesh file\npod a\n"),
        "{answer}"
    );
    node.ready.store(true, Ordering::Relaxed);
    assert!(
        ask(at.readiness, "GET", "/healthz/ready")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

#[tokio::test]
async fn a_client_that_does_not_finish_is_cut_off() {
    let (at, _, _) = serve(Limits {
        headers: Duration::from_millis(100),
        life: Duration::from_millis(300),
        ..Limits::default()
    });
    let begun = Instant::now();
    for bytes in [
        &b""[..],
        b"GET /metrics HT",
        b"GET /metrics HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\nx",
    ] {
        exchange(at.stats, bytes).await;
    }
    assert!(begun.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn malformed_and_oversized_requests_harm_nobody() {
    let (at, _, _) = serve(Limits::default());
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000));
    let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(10_000));
    for bytes in [
        &b"\x16\x03\x01\x00\xff"[..],
        b"\r\n\r\n\0\0\0",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        long.as_bytes(),
        many.as_bytes(),
    ] {
        let answer = exchange(at.stats, bytes).await;
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    assert!(
        ask(at.stats, "GET", "/metrics")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

#[tokio::test]
async fn a_full_metrics_port_does_not_keep_probes_out() {
    let (at, node, _) = serve(Limits {
        connections: 2,
        ..Limits::default()
    });
    node.ready.store(true, Ordering::Relaxed);
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(at.stats).await.unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        stream.read_u8().await.unwrap();
        held.push(stream);
    }
    assert_eq!(ask(at.stats, "GET", "/metrics").await, "");
    assert!(
        ask(at.readiness, "GET", "/healthz/ready")
            .await
            .starts_with("HTTP/1.1 200")
    );
}

#[tokio::test]
async fn an_address_that_cannot_be_had_is_named_with_its_setting() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let wanted = Addresses {
        stats: taken.local_addr().unwrap(),
        readiness: any,
        admin: any,
    };
    let error = HttpServers::bind(wanted, Limits::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains(&wanted.stats.to_string()), "{error}");
    assert!(error.contains("CULVERT_STATS_ADDRESS"), "{error}");
}
