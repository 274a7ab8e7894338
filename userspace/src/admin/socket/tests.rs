//! What the admin socket promises, over real sockets.

use std::net::SocketAddr;

use super::super::client::{Client, ClientError};
use super::super::protocol::PodState;
use super::*;
use crate::telemetry::FlowRecord;
use crate::telemetry::{Feed, FlowEvent};

#[derive(Default)]
struct Node {
    feed: Feed,
}

fn pod(uid: &str) -> PodInfo {
    PodInfo {
        uid: uid.to_owned(),
        namespace: "ns".to_owned(),
        name: "pod".to_owned(),
        identity: None,
        addresses: Vec::new(),
        netns_cookie: 7,
        state: PodState::Active,
        reason: None,
    }
}

impl AdminHandler for Node {
    async fn pod_add(&self, pod_add: PodAdd) -> Result<PodInfo, AdminError> {
        match pod_add.uid.as_str() {
            "hang" => std::future::pending().await,
            "panic" => panic!("a bug in the handler"),
            uid => Ok(pod(uid)),
        }
    }
    async fn pod_remove(&self, remove: PodRemove) -> Result<(), AdminError> {
        let message = format!("there is no pod with uid {}", remove.uid);
        Err(AdminError::new(ErrorKind::NotFound, message))
    }
    async fn pod_list(&self) -> Vec<PodInfo> {
        vec![pod("one"), pod("two")]
    }
    async fn status(&self) -> Status {
        serde_json::from_value(serde_json::json!({
            "version": "1", "pid": 1, "node": "n", "uptime_seconds": 0, "pending": [], "pods": 0, "workloads": 0,
            "services": 0, "policies": 0, "mesh": "", "certificates": [], "warnings": []
        }))
        .unwrap()
    }
    fn flows(&self, query: FlowsQuery) -> Follower {
        self.feed.follow(query.recent)
    }
}

struct Served {
    directory: tempfile::TempDir,
    node: Arc<Node>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Served {
    fn new(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let node = Arc::new(Node::default());
        let shutdown = CancellationToken::new();
        let socket = AdminSocket::bind(&directory.path().join("run/admin.sock"), limits).unwrap();
        let task = tokio::spawn(socket.serve(node.clone(), shutdown.clone()));
        Self {
            directory,
            node,
            shutdown,
            task,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("run/admin.sock")
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path()).await.unwrap()
    }

    /// Sends bytes, ends the sending side, and returns all that comes back.
    async fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }
}

fn quick() -> Limits {
    Limits {
        read: Duration::from_millis(200),
        handle: Duration::from_millis(200),
        write: Duration::from_millis(200),
        uid: nix::unistd::geteuid().as_raw(),
        ..Limits::default()
    }
}

fn patient() -> Limits {
    Limits {
        uid: nix::unistd::geteuid().as_raw(),
        ..Limits::default()
    }
}

fn flow(port: u16) -> FlowEvent {
    let at = SocketAddr::from(([10, 0, 0, 1], port));
    FlowEvent::Closed {
        time_ms: 1,
        flow: FlowRecord::new(at, at),
    }
}

#[tokio::test]
async fn requests_on_one_connection_are_answered_in_turn() {
    let served = Served::new(patient());
    let requests = b"{\"pod_list\":{}}\n{\"status\":{}}\n{\"pod_remove\":{\"uid\":\"x\"}}\n";
    let answer = served.exchange(requests).await;
    let lines: Vec<_> = answer.lines().collect();
    assert_eq!(lines.len(), 3, "{answer}");
    assert!(lines[0].starts_with("{\"ok\":[{\"uid\":\"one\""));
    assert!(lines[1].starts_with("{\"ok\":{\"version\":\"1\""));
    assert_eq!(
        lines[2],
        "{\"error\":{\"kind\":\"not_found\",\"message\":\"there is no pod with uid x\"}}"
    );
}

#[tokio::test]
async fn malformed_requests_are_told_what_is_wrong_and_harm_nobody() {
    let served = Served::new(patient());
    let nested = "[".repeat(60_000) + "\n";
    for (request, problem) in [
        ("nonsense\n", "malformed request"),
        ("\n", "malformed request"),
        ("{}\n", "malformed request"),
        ("{\"pod_list\":{\"x\":1}}\n", "unknown field `x`"),
        ("{\"pod_burn\":{}}\n", "unknown variant `pod_burn`"),
        ("{\"pod_add\":{\"uid\":\"a\"}}\n", "missing field `netns`"),
        (
            "{\"pod_add\":{\"uid\":\"a\",\"netns\":\"b\"}}\n",
            "absolute path",
        ),
        (
            "{\"pod_add\":{\"uid\":\"a\\n\",\"netns\":\"/b\"}}\n",
            "uid must be",
        ),
        (
            "{\"pod_add\":{\"uid\":\"\",\"netns\":\"/b\"}}\n",
            "uid must be",
        ),
        ("{\"flows\":{\"recent\":-1}}\n", "malformed request"),
        ("{\"status\":{}}", "without a newline"),
        ("{\"status\":{}}{\"status\":{}}\n", "malformed request"),
        (nested.as_str(), "malformed request"),
    ] {
        let answer = served.exchange(request.as_bytes()).await;
        assert!(
            answer.contains("\"kind\":\"bad_request\""),
            "{request:.40} -> {answer}"
        );
        assert!(answer.contains(problem), "{request:.40} -> {answer}");
    }
    let answer = served.exchange(b"\xff\xfe\x00\n").await;
    assert!(answer.contains("malformed request"), "{answer}");
    // The connection survives a malformed request.
    let answer = served.exchange(b"nonsense\n{\"pod_list\":{}}\n").await;
    assert_eq!(answer.lines().count(), 2);
}

#[tokio::test]
async fn an_oversized_request_is_refused() {
    let served = Served::new(patient());
    let mut stream = served.connect().await;
    let endless = vec![b'x'; MAX_REQUEST + 1];
    stream.write_all(&endless).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("longer than 65536 bytes"), "{answer}");
    // The largest that fits is read.
    let mut largest = b"{\"pod_list\":{}}".to_vec();
    largest.resize(MAX_REQUEST - 1, b' ');
    largest.push(b'\n');
    assert!(served.exchange(&largest).await.starts_with("{\"ok\":"));
}

#[tokio::test]
async fn a_slow_request_is_cut_off() {
    let served = Served::new(quick());
    let mut slow = served.connect().await;
    slow.write_all(b"{\"status\"").await.unwrap();
    let mut silent = served.connect().await;
    let mut answer = String::new();
    slow.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("did not come in time"), "{answer}");
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_handler_that_hangs_or_panics_costs_one_answer_only() {
    let served = Served::new(quick());
    let add = |uid| format!("{{\"pod_add\":{{\"uid\":\"{uid}\",\"netns\":\"/n\"}}}}\n");
    let answer = served.exchange(add("hang").as_bytes()).await;
    assert!(answer.contains("did not finish in time"), "{answer}");
    assert_eq!(served.exchange(add("panic").as_bytes()).await, "");
    assert!(
        served
            .exchange(add("fine").as_bytes())
            .await
            .starts_with("{\"ok\":")
    );
}

#[tokio::test]
async fn connections_beyond_the_bound_are_refused_until_one_ends() {
    let served = Served::new(Limits {
        connections: 2,
        ..patient()
    });
    let mut first = served.connect().await;
    let second = served.connect().await;
    first.write_all(b"{\"pod_list\":{}}\n").await.unwrap();
    first.read_u8().await.unwrap();
    let answer = served.exchange(b"").await;
    assert!(answer.contains("too many admin connections"), "{answer}");
    drop(second);
    loop {
        let answer = served.exchange(b"{\"pod_list\":{}}\n").await;
        if answer.starts_with("{\"ok\":") {
            break;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn another_user_is_refused_whatever_the_file_modes_say() {
    let served = Served::new(Limits {
        uid: nix::unistd::geteuid().as_raw() + 1,
        ..Limits::default()
    });
    let answer = served.exchange(b"").await;
    assert!(answer.contains("\"kind\":\"forbidden\""), "{answer}");
    let answer = served.exchange(b"{\"pod_list\":{}}\n").await;
    assert!(!answer.contains("\"ok\""), "{answer}");
}

#[tokio::test]
async fn only_the_owner_can_reach_the_socket_file() {
    let served = Served::new(patient());
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&served.path()), 0o600);
    assert_eq!(mode(served.path().parent().unwrap()), 0o700);
    // A directory where others could put their own socket is not used.
    let open = served.directory.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
    let refused = AdminSocket::bind(&open.join("admin.sock"), patient()).unwrap_err();
    assert!(
        matches!(refused, SocketError::OpenDirectory { mode: 0o777, .. }),
        "{refused}"
    );
    let file = served.directory.path().join("run/file.sock");
    std::fs::write(&file, "x").unwrap();
    let refused = AdminSocket::bind(&file, patient()).unwrap_err();
    assert!(
        matches!(refused, SocketError::NotASocket { .. }),
        "{refused}"
    );
}

#[tokio::test]
async fn a_newer_agent_takes_the_path_over_and_the_older_leaves_it_alone() {
    let served = Served::new(patient());
    let newer = AdminSocket::bind(&served.path(), patient()).unwrap();
    served.shutdown.cancel();
    served.task.await.unwrap();
    let path = served.directory.path().join("run/admin.sock");
    UnixStream::connect(&path).await.unwrap();
    drop(newer);
    assert!(!path.exists());
}

#[tokio::test]
async fn flows_are_streamed_until_the_client_hangs_up() {
    let served = Served::new(patient());
    served.node.feed.publish(flow(1));
    let mut stream = served.connect().await;
    stream
        .write_all(b"{\"flows\":{\"recent\":1}}\n")
        .await
        .unwrap();
    let mut lines = BufReader::new(&mut stream).lines();
    let first = lines.next_line().await.unwrap().unwrap();
    assert_eq!(
        serde_json::from_str::<Reply<()>>(&first).unwrap(),
        Reply::Flow(Box::new(flow(1)))
    );
    served.node.feed.publish(flow(2));
    let second = lines.next_line().await.unwrap().unwrap();
    assert_eq!(
        serde_json::from_str::<Reply<()>>(&second).unwrap(),
        Reply::Flow(Box::new(flow(2)))
    );
}

#[tokio::test]
async fn a_follower_that_does_not_read_is_let_go() {
    let served = Served::new(Limits {
        connections: 1,
        ..quick()
    });
    let mut stuck = served.connect().await;
    stuck.write_all(b"{\"flows\":{}}\n").await.unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        (0..500).for_each(|port| served.node.feed.publish(flow(port)));
        if served
            .exchange(b"{\"pod_list\":{}}\n")
            .await
            .starts_with("{\"ok\":")
        {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "still held");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_gets_answers_refusals_and_events() {
    let served = Served::new(patient());
    served.node.feed.publish(flow(9));
    let path = served.path();
    let asked = tokio::task::spawn_blocking(move || {
        let mut client = Client::connect(&path).unwrap();
        let pods: Vec<PodInfo> = client.ask(&Request::PodList {}).unwrap();
        assert_eq!(pods.len(), 2);
        let remove = Request::PodRemove(PodRemove {
            uid: "x".to_owned(),
        });
        let refused = client.ask::<()>(&remove).unwrap_err();
        assert!(
            matches!(&refused, ClientError::Refused(error) if error.kind == ErrorKind::NotFound)
        );
        let query = Request::Flows(FlowsQuery { recent: 5 });
        let mut stream = client.follow(&query).unwrap();
        assert_eq!(
            stream.next().unwrap().unwrap(),
            Reply::Flow(Box::new(flow(9)))
        );
        let absent = Client::connect(Path::new("/nonexistent/admin.sock")).unwrap_err();
        let text = absent.to_string();
        assert!(
            text.contains("/nonexistent/admin.sock") && text.contains("culvert node"),
            "{text}"
        );
    });
    asked.await.unwrap();
}
