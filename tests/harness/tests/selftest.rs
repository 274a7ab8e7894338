//! The harness tested by itself, without an agent: what tests rely on when they blame the agent.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use culvert_harness::{
    AgentOptions, ControlPlane, Fabric, FabricOptions, Node, Pod, PodOptions, Proc, TcpState,
    cgroup, clean_stale, probe_binary, sockets_of_process, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);
const PORT: u16 = 8080;

fn serve(pod: &Pod, mode: &str) -> Result<Proc> {
    serve_with(pod, mode, &[])
}

fn serve_with(pod: &Pod, mode: &str, more: &[&str]) -> Result<Proc> {
    let server = pod
        .probe()?
        .args(["serve", "--port", &PORT.to_string(), "--mode", mode])
        .args(more)
        .spawn()?;
    server.wait_for_line("listening", SOON)?;
    Ok(server)
}

fn probe(pod: &Pod, arguments: &[&str]) -> Result<Value> {
    pod.probe()?.args(arguments).run(SOON)?.json()
}

/// Everything in the system whose name has this run's id.
fn traces(run: &str) -> Result<Vec<PathBuf>> {
    let root = cgroup::root()?;
    let directories = [
        Path::new("/run/netns"),
        Path::new("/run"),
        Path::new("/sys/fs/bpf"),
        &root,
    ];
    let entries = directories
        .into_iter()
        .flat_map(|directory| std::fs::read_dir(directory).into_iter().flatten());
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths
        .filter(|path| path.to_string_lossy().contains(run))
        .collect())
}

fn busy_node(fabric: &Fabric) -> Result<(Node, Pod)> {
    let node = fabric.node()?;
    let pod = node.pod("busy")?;
    std::fs::create_dir_all(node.pin_directory())?;
    Ok((node, pod))
}

#[test]
fn pods_of_two_nodes_reach_each_other_and_see_their_addresses() -> Result<()> {
    let fabric = Fabric::new()?;
    let began = Instant::now();
    let first = fabric.node()?;
    let client = first.pod("client")?;
    let neighbour = first.pod("server")?;
    let _third = first.pod("third")?;
    println!("a node with three pods took {:?}", began.elapsed());
    let server = fabric.node()?.pod("server")?;
    for target in [neighbour, server] {
        let running = serve(&target, "collect")?;
        let to = target.at(PORT);
        let result = probe(
            &client,
            &[
                "stream", "--to", &to, "--bytes", "3000001", "--size", "70000", "--verify",
            ],
        )?;
        assert_eq!(result["ok"], true, "{result}");
        assert_eq!(result["sha256_local"], result["sha256_remote"]);
        let accepted = running.wait_for_event("accepted", SOON)?;
        assert!(
            accepted["peer"]
                .as_str()
                .unwrap()
                .starts_with(&format!("{}:", client.address())),
            "{accepted}"
        );
        let closed = running.wait_for_event("closed", SOON)?;
        assert_eq!(
            (&closed["bytes_read"], &closed["end"]),
            (&Value::from(3_000_001), &Value::from("EOF"))
        );
        assert_eq!(closed["sha256"], result["sha256_local"]);
    }
    Ok(())
}

#[test]
fn ipv6_pods_reach_each_other() -> Result<()> {
    let fabric = Fabric::with(FabricOptions { ipv6: true })?;
    let client = fabric.node()?.pod("client")?;
    let server = fabric.node()?.pod("server")?;
    let _running = serve_with(&server, "echo", &["--bind", "::"])?;
    let to = format!(
        "[{}]:{PORT}",
        server.address_v6().context("no IPv6 address")?
    );
    let result = probe(
        &client,
        &["connect", "--to", &to, "--send", "hello", "--read", "5"],
    )?;
    assert_eq!(result["data"], "hello", "{result}");
    Ok(())
}

#[test]
fn programs_run_in_the_cgroup_and_namespace_of_their_place() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let pod = node.pod("client")?;
    let sleeper = pod.command("sleep").arg("60").spawn()?;
    assert_eq!(pod.cgroup().members()?, [sleeper.pid()]);
    let path = pod.cgroup().path().strip_prefix(node.cgroup().path())?;
    assert_eq!(path, Path::new("pods/client"));
    assert_eq!(
        std::fs::read_link(format!("/proc/{}/ns/net", sleeper.pid()))?,
        pod.in_netns(own_netns)??
    );
    let agent = node
        .agent_command("cat")
        .arg("/proc/self/cgroup")
        .run(SOON)?
        .success()?;
    assert!(agent.contains("/n1/agent\n"), "{agent}");
    assert_ne!(pod.netns().cookie()?, node.netns().cookie()?);
    assert_eq!(node.netns().sysctl("net.ipv4.ip_forward")?, "0");
    Ok(())
}

fn own_netns() -> std::io::Result<PathBuf> {
    std::fs::read_link("/proc/thread-self/ns/net")
}

#[test]
fn drop_removes_everything() -> Result<()> {
    let fabric = Fabric::new()?;
    let run = fabric.run_id().to_string();
    let (node, pod) = busy_node(&fabric)?;
    let script = "trap '' TERM; setsid sleep 61 & echo started; wait";
    let stubborn = pod.command("sh").args(["-c", script]).spawn()?;
    stubborn.wait_for_line("started", SOON)?;
    assert_eq!(traces(&run)?.len(), 6, "{:?}", traces(&run)?);
    drop(fabric);
    assert_eq!(traces(&run)?, [] as [PathBuf; 0]);
    assert!(!stubborn.wait(SOON)?.success());
    assert!(
        node.pod("late").is_err(),
        "a handle that outlives its fabric makes nothing"
    );
    Ok(())
}

#[test]
fn panic_removes_everything() -> Result<()> {
    let (send, receive) = std::sync::mpsc::channel();
    let panicked = std::thread::spawn(move || {
        let fabric = Fabric::new().unwrap();
        let (_node, pod) = busy_node(&fabric).unwrap();
        let _sleeper = pod.command("sleep").arg("60").spawn().unwrap();
        send.send(fabric.run_id().to_string()).unwrap();
        panic!("on purpose");
    });
    let run = receive.recv()?;
    assert!(panicked.join().is_err());
    assert_eq!(traces(&run)?, [] as [PathBuf; 0]);
    Ok(())
}

/// The next test runs this one in a process of its own, to be killed.
const HOLD: &str = "CULVERT_HARNESS_HOLD";

#[test]
fn fabric_is_held_when_the_environment_says_so() {
    if std::env::var_os(HOLD).is_none() {
        return;
    }
    let fabric = Fabric::new().unwrap();
    let (_node, pod) = busy_node(&fabric).unwrap();
    let _sleeper = pod.command("sleep").arg("62").spawn().unwrap();
    println!("\nholding {}", fabric.run_id());
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn death_of_the_owner_removes_everything() -> Result<()> {
    for signal in [Signal::SIGKILL, Signal::SIGINT, Signal::SIGTERM] {
        let mut owner = Command::new(std::env::current_exe()?)
            .args([
                "--exact",
                "fabric_is_held_when_the_environment_says_so",
                "--nocapture",
            ])
            .env(HOLD, "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut output = std::io::BufReader::new(owner.stdout.take().context("no output")?);
        let run = loop {
            let mut line = String::new();
            anyhow::ensure!(
                std::io::BufRead::read_line(&mut output, &mut line)? > 0,
                "no fabric was made"
            );
            if let Some(run) = line.trim().strip_prefix("holding ") {
                break run.to_owned();
            }
        };
        assert_eq!(traces(&run)?.len(), 6);
        kill(Pid::from_raw(owner.id().cast_signed()), signal)?;
        owner.wait()?;
        wait_until(SOON * 3, "the supervisor to clean up", || {
            Ok(traces(&run)?.is_empty().then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn stale_runs_are_removed_and_live_ones_are_not() -> Result<()> {
    let fabric = Fabric::new()?;
    let (_node, pod) = busy_node(&fabric)?;
    // No process began one tick after boot.
    let stale = format!("zz_1_{}", std::process::id());
    let group = cgroup::root()?.join(format!("culvert-test-{stale}"));
    std::fs::create_dir_all(group.join("n1/agent"))?;
    std::fs::create_dir_all(format!("/sys/fs/bpf/culvert-test-{stale}/n1"))?;
    std::fs::create_dir_all(format!("/run/culvert-test-{stale}"))?;
    Command::new("ip")
        .args(["netns", "add", &format!("cv-{stale}-n1")])
        .status()?;
    assert_eq!(traces(&stale)?.len(), 4);
    let removed = clean_stale()?;
    assert!(
        removed.iter().any(|run| run.to_string() == stale),
        "{removed:?}"
    );
    assert_eq!(traces(&stale)?, [] as [PathBuf; 0]);
    pod.command("true").run(SOON)?.success()?;
    Ok(())
}

#[test]
fn two_fabrics_do_not_collide() -> Result<()> {
    let fabrics = [Fabric::new()?, Fabric::new()?];
    let pods = fabrics
        .each_ref()
        .map(|fabric| fabric.node().and_then(|node| node.pod("same")));
    let [first, second] = pods.map(Result::unwrap);
    assert_eq!(first.address(), second.address());
    let server = serve(&first, "echo")?;
    let own = probe(&first, &["connect", "--to", &first.at(PORT)])?;
    let other = probe(&second, &["connect", "--to", &first.at(PORT)])?;
    assert_eq!(
        (own["connect"].as_str(), other["connect"].as_str()),
        (Some("ok"), Some("ECONNREFUSED"))
    );
    server.wait_for_event("accepted", SOON)?;
    assert_eq!(server.events("accepted").len(), 1);
    Ok(())
}

#[test]
fn a_pod_that_takes_over_an_address_is_reached_at_once() -> Result<()> {
    let fabric = Fabric::new()?;
    let client = fabric.node()?.pod("client")?;
    let node = fabric.node()?;
    let old = node.pod("old")?;
    let to = old.at(PORT);
    let _server = serve(&old, "echo")?;
    assert_eq!(probe(&client, &["connect", "--to", &to])?["connect"], "ok");
    old.remove()?;
    old.remove()?;
    let std::net::IpAddr::V4(address) = old.address() else {
        unreachable!()
    };
    let new = node.pod_with(
        "new",
        PodOptions {
            address: Some(address),
            ..PodOptions::default()
        },
    )?;
    let server = serve(&new, "echo")?;
    assert_eq!(probe(&client, &["connect", "--to", &to])?["connect"], "ok");
    server.wait_for_event("accepted", SOON)?;
    assert_eq!(server.events("accepted").len(), 1);
    Ok(())
}

#[test]
fn capture_finds_a_marker_and_only_what_passed() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let client = node.pod("client")?;
    let neighbour = node.pod("neighbour")?;
    let remote = fabric.node()?.pod("remote")?;
    let _servers = [serve(&neighbour, "echo")?, serve(&remote, "echo")?];
    let between_nodes = fabric.capture()?;
    let on_node = node.capture()?;
    for (target, marker) in [(&neighbour, "stays-at-home"), (&remote, "goes-abroad")] {
        let size = marker.len().to_string();
        probe(
            &client,
            &[
                "connect",
                "--to",
                &target.at(PORT),
                "--send",
                marker,
                "--read",
                &size,
            ],
        )?;
    }
    // A line of its own packet each: the marker is in none of them.
    let held = client
        .probe()?
        .args(["connect", "--hold", "--to", &remote.at(PORT)])
        .stdin()
        .spawn()?;
    for part in ["split", "up"] {
        let mark = held.log().mark();
        held.send_line(part)?;
        held.wait_for_event_after(mark, "data", SOON)?;
    }
    assert!(between_nodes.contains(b"goes-abroad")?);
    assert!(between_nodes.contains(b"split\nup")?);
    assert!(!between_nodes.contains(b"stays-at-home")?);
    assert!(on_node.contains(b"stays-at-home")?);
    assert!(between_nodes.packets(PORT)? > 0);
    assert_eq!(between_nodes.packets(1)?, 0);
    let found = between_nodes.find(b"goes-abroad")?.context("not found")?;
    assert!(
        found.source.0 == client.address() || found.destination.0 == client.address(),
        "{found:?}"
    );
    Ok(())
}

#[test]
fn the_two_ends_of_a_connection_are_found_in_the_socket_tables() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    let serving = serve(&server, "echo")?;
    let held = client
        .probe()?
        .args(["connect", "--hold", "--to", &server.at(PORT)])
        .stdin()
        .spawn()?;
    held.wait_for_event("connected", SOON)?;
    serving.wait_for_event("accepted", SOON)?;
    let established = |pod: &Pod| -> Result<_> {
        pod.sockets()?
            .into_iter()
            .find(|socket| socket.state == TcpState::Established)
            .context("no connection")
    };
    let (near, far) = (established(&client)?, established(&server)?);
    assert_eq!((near.local, near.peer), (far.peer, far.local));
    assert!(sockets_of_process(held.pid())?.contains(&near.inode));
    assert!(sockets_of_process(serving.pid())?.contains(&far.inode));
    assert!(!sockets_of_process(serving.pid())?.contains(&near.inode));
    assert!(
        server
            .sockets()?
            .iter()
            .any(|socket| socket.state == TcpState::Listen && socket.local.port() == PORT)
    );
    Ok(())
}

#[test]
fn probe_servers_do_what_their_mode_says() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    let to = server.at(PORT);
    let refused = probe(&client, &["connect", "--to", &to])?;
    assert_eq!(refused["connect"], "ECONNREFUSED");
    {
        let _banner = serve(&server, "banner")?;
        let heard = probe(&client, &["connect", "--to", &to, "--read", "20"])?;
        assert_eq!(heard["data"], "culvert-probe ready\n", "{heard}");
    }
    {
        let farewell = serve(&server, "farewell")?;
        let held = client
            .probe()?
            .args(["connect", "--hold", "--to", &to])
            .stdin()
            .spawn()?;
        held.wait_for_event("eof", SOON)?;
        held.send_line("after the end")?;
        held.close_stdin();
        let closed = farewell.wait_for_event("closed", SOON)?;
        assert_eq!(
            (&closed["bytes_read"], &closed["end"]),
            (&Value::from(14), &Value::from("EOF"))
        );
        assert!(held.wait(SOON)?.success());
        assert_eq!(held.wait_for_event("end", SOON)?["how"], "EOF");
    }
    {
        let _source = serve_with(&server, "source", &["--bytes", "1000000"])?;
        let got = probe(&client, &["connect", "--to", &to, "--read-all"])?;
        assert_eq!(
            (&got["read_bytes"], &got["read"]),
            (&Value::from(1_000_000), &Value::from("EOF"))
        );
    }
    {
        let _sink = serve(&server, "sink")?;
        let pushed = probe(&client, &["stream", "--to", &to, "--bytes", "5000000"])?;
        assert_eq!(
            (&pushed["ok"], &pushed["sha256_remote"]),
            (&Value::from(true), &Value::Null),
            "{pushed}"
        );
    }
    {
        let _once = serve_with(&server, "once", &["--quiet"])?;
        let connected = probe(
            &client,
            &["conn", "--to", &to, "--count", "200", "--threads", "2"],
        )?;
        assert_eq!(
            (&connected["count"], &connected["errors"]),
            (&Value::from(200), &Value::from(0)),
            "{connected}"
        );
    }
    Ok(())
}

#[test]
fn probe_clients_report_load_addresses_and_resets() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    let to = server.at(PORT);
    let serving = serve(&server, "echo")?;
    let load = [
        "rr",
        "--to",
        &to,
        "--size",
        "1024",
        "--count",
        "100",
        "--connections",
        "2",
        "--warmup",
        "5",
    ];
    let measured = probe(&client, &load)?;
    assert_eq!(
        (&measured["count"], &measured["errors"]),
        (&Value::from(200), &Value::from(0)),
        "{measured}"
    );
    assert!(measured["p50_us"].as_f64() <= measured["p99_us"].as_f64());
    let own = client.address().to_string();
    let bound = [
        "connect",
        "--to",
        &to,
        "--bind-ip",
        &own,
        "--bind-port",
        "40000",
        "--reuse",
        "--half-close",
        "--read-all",
    ];
    let result = probe(&client, &bound)?;
    assert_eq!(
        (result["local"].as_str(), result["peer"].as_str()),
        (Some(client.at(40000).as_str()), Some(to.as_str()))
    );
    let held = client
        .probe()?
        .args(["connect", "--hold", "--to", &to])
        .stdin()
        .spawn()?;
    held.send_line("hello")?;
    assert_eq!(held.wait_for_event("data", SOON)?["data"], "hello\n");
    // A server that is stopped leaves the next line unread, and its death then resets the connection.
    serving.kill(Signal::SIGSTOP)?;
    wait_until(SOON, "the server to stop", || {
        Ok(all_threads_stopped(serving.pid())?.then_some(()))
    })?;
    held.send_line("unread")?;
    wait_until(SOON, "the line to arrive", || {
        Ok(server
            .sockets()?
            .iter()
            .any(|socket| socket.state == TcpState::Established && socket.receive_queue > 0)
            .then_some(()))
    })?;
    serving.kill(Signal::SIGKILL)?;
    assert_eq!(held.wait_for_event("end", SOON)?["how"], "ECONNRESET");
    Ok(())
}

/// The signal stops each thread when it gets there: one may still read what comes meanwhile.
fn all_threads_stopped(pid: u32) -> Result<bool> {
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        if !std::fs::read_to_string(thread?.path().join("stat"))?.contains(") T ") {
            return Ok(false);
        }
    }
    Ok(true)
}

#[test]
fn a_handshake_by_hand_works_with_the_own_and_a_spoofed_address() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let (client, server) = (node.pod("client")?, fabric.node()?.pod("server")?);
    let serving = serve(&server, "echo")?;
    let to = server.at(PORT);
    for source in [client.at(41000), "10.77.1.200:41001".to_owned()] {
        let mark = serving.log().mark();
        let handshake = [
            "raw-handshake",
            "--src",
            &source,
            "--dst",
            &to,
            "--seq",
            "4294967290",
            "--data",
            "by hand",
        ];
        let result = probe(&client, &handshake)?;
        assert_eq!(
            (&result["syn_ack"], &result["rst"], &result["acked"]),
            (&true.into(), &false.into(), &true.into()),
            "{result}"
        );
        assert_eq!(result["received"], "by hand", "{result}");
        assert_eq!(
            serving.wait_for_event_after(mark, "accepted", SOON)?["peer"],
            source
        );
        assert_eq!(
            serving.wait_for_event_after(mark, "closed", SOON)?["end"],
            "ECONNRESET"
        );
    }
    let rules = client
        .command("ip")
        .args(["rule", "list"])
        .run(SOON)?
        .success()?;
    assert!(!rules.contains("prohibit"), "{rules}");
    let closed = probe(
        &client,
        &[
            "raw-handshake",
            "--src",
            &client.at(41002),
            "--dst",
            &server.at(9),
            "--seq",
            "1",
        ],
    )?;
    assert_eq!(
        (&closed["syn_ack"], &closed["rst"]),
        (&false.into(), &true.into()),
        "{closed}"
    );
    Ok(())
}

#[test]
fn a_raw_syn_arrives_with_its_spoofed_source() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let (client, server) = (node.pod("client")?, node.pod("server")?);
    let capture = server.capture()?;
    let to = server.at(PORT);
    let sent = probe(
        &client,
        &[
            "raw-syn",
            "--src",
            "10.77.1.201:42001",
            "--dst",
            &to,
            "--seq",
            "7",
            "--count",
            "3",
        ],
    )?;
    assert_eq!(
        (&sent["sent"], &sent["outcome"]),
        (&Value::from(3), &Value::from("ok"))
    );
    wait_until(SOON, "the SYNs to arrive", || {
        Ok((capture.packets(42001)? >= 3).then_some(()))
    })
}

#[test]
fn waiting_for_a_line_ends_with_the_program() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let process = node
        .command("sh")
        .args(["-c", "echo first; echo second >&2; exit 3"])
        .spawn()?;
    let began = Instant::now();
    let error = process
        .wait_for_line("never", Duration::from_secs(60))
        .unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(30));
    let text = format!("{error:#}");
    assert!(text.contains("first") && text.contains("second"), "{text}");
    assert_eq!(process.wait(SOON)?.code(), Some(3));
    let error = node.command("/does/not/exist").spawn().unwrap_err();
    assert!(
        format!("{error:#}").contains("does the program exist"),
        "{error:#}"
    );
    Ok(())
}

#[test]
fn an_agent_is_told_what_it_needs_and_its_end_is_noticed() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let pod = node.pod("client")?;
    let binary = fabric.directory().join("agent");
    std::fs::write(
        &binary,
        "#!/bin/sh\necho \"args $*\"\n[ \"$1\" = node ] || exit 0\nenv\nsleep 0.5; exit 7\n",
    )?;
    std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o700))?;
    let options = AgentOptions {
        binary: Some(binary),
        args: vec!["--more".into()],
        ..AgentOptions::default()
    };
    let agent = node.start_agent(options)?;
    let expected = [
        format!(
            "args node --dev-ca {}/dev-ca --more",
            fabric.directory().display()
        ),
        "NODE_NAME=n1".to_owned(),
        format!("CULVERT_CGROUP_ROOT={}", node.cgroup().path().display()),
        format!(
            "CULVERT_PIN_DIR=/sys/fs/bpf/culvert-test-{}/n1",
            fabric.run_id()
        ),
        format!("LOCAL_XDS_PATH={}/mesh.yaml", fabric.directory().display()),
        format!("CULVERT_ADMIN_SOCKET={}", agent.admin_socket().display()),
    ];
    for line in expected {
        agent.process().wait_for_line(&line, SOON)?;
    }
    agent.enrol(&pod, "u1", "demo", "client", "sa")?;
    let listed = agent.cli(["pod", "list"])?.success()?;
    assert_eq!(
        listed,
        format!(
            "args pod list --admin-socket {}\n",
            agent.admin_socket().display()
        )
    );
    let error = format!("{:#}", agent.ready().unwrap_err());
    assert!(
        error.contains("the agent ended (exit status: 7)"),
        "{error}"
    );
    Ok(())
}

#[test]
fn agents_are_given_everything_by_the_control_plane_of_their_fabric() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let fabric = Fabric::new()?;
    let nodes = [fabric.node()?, fabric.node()?];
    let binary = fabric.directory().join("agent");
    let listening =
        r#"{"event":"listening","address":"10.77.1.1:4321","root":"/ca/root-cert.pem"}"#;
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = node ] || {{ echo \"args $*\"; echo '{listening}'; sleep 60; }}\necho \"args $*\"\nenv\n"
    );
    std::fs::write(&binary, script)?;
    std::fs::set_permissions(&binary, PermissionsExt::from_mode(0o700))?;
    let plane = ControlPlane::of_fabric(&nodes[0], &binary)?;
    let token = nodes[0].directory().join("token");
    let shared = fabric.directory().display();
    for node in &nodes {
        let agent = node.start_agent(AgentOptions {
            binary: Some(binary.clone()),
            ..AgentOptions::default()
        })?;
        for line in [
            "args node".to_owned(),
            "XDS_ADDRESS=https://10.77.1.1:4321".to_owned(),
            "CA_ADDRESS=https://10.77.1.1:4321".to_owned(),
            "XDS_ROOT_CA=/ca/root-cert.pem".to_owned(),
            "CA_ROOT_CA=/ca/root-cert.pem".to_owned(),
            format!("AUTH_TOKEN={}", token.display()),
            format!("CULVERT_ANNOTATIONS_PATH={shared}/mesh.annotations.yaml"),
        ] {
            agent.process().wait_for_line(&line, SOON)?;
        }
        assert!(!agent.log().contains("LOCAL_XDS_PATH="));
    }
    // Who names files reads them.
    let agent = nodes[0].start_agent(AgentOptions {
        binary: Some(binary.clone()),
        mesh_file: Some("/mesh.yaml".into()),
        ..AgentOptions::default()
    })?;
    agent
        .process()
        .wait_for_line("LOCAL_XDS_PATH=/mesh.yaml", SOON)?;
    let arguments = plane.process().wait_for_line("args", SOON)?;
    for argument in [
        "--listen 10.77.1.1:0".to_owned(),
        format!("--mesh {shared}/mesh.yaml"),
        format!("--dev-ca {shared}/dev-ca"),
        format!("--token {}", token.display()),
    ] {
        assert!(arguments.contains(&argument), "{arguments}");
    }
    Ok(())
}

#[test]
fn the_probe_is_found_beside_the_test() -> Result<()> {
    assert_eq!(
        probe_binary()?,
        PathBuf::from(env!("CARGO_BIN_EXE_culvert-probe"))
    );
    Ok(())
}
