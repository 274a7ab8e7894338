//! What the command line promises.

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::path::Path;

use clap::CommandFactory;
use std::io::{BufRead, BufReader, Write};

use super::*;
use crate::admin::{PodInfo, PodState};
use crate::config::{Config, Environment};
use crate::telemetry::{FlowEvent, FlowRecord};

fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("culvert").chain(args.iter().copied()))
}

fn client(args: &[&str]) -> ClientCommand {
    match parse(args).unwrap().command {
        Command::Client(command) => command,
        other => panic!("{other:?}"),
    }
}

fn environment(socket: &Path) -> Environment {
    let variable = ("CULVERT_ADMIN_SOCKET".to_owned(), OsString::from(socket));
    Environment {
        variables: [variable].into(),
        ..Environment::default()
    }
}

/// An agent that answers the first line it is sent with `answer`; returns what the command printed, and the line.
fn ask(args: &[&str], answer: &str) -> (Result<String, CliError>, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let answer = answer.to_owned();
    let agent = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap())
            .read_line(&mut line)
            .unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
        line
    });
    let mut out = Vec::new();
    let result = run(&client(args), &environment(&path), &mut out);
    let printed = result.map(|()| String::from_utf8(out).unwrap());
    (printed, agent.join().unwrap())
}

fn pod() -> PodInfo {
    PodInfo {
        uid: "u-1".to_owned(),
        namespace: "shop".to_owned(),
        name: "web\u{1b}[2J".to_owned(),
        identity: Some("spiffe://cluster.local/ns/shop/sa/web".to_owned()),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        netns_cookie: 4,
        state: PodState::Active,
        reason: None,
    }
}

#[test]
fn the_definitions_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_setting_with_a_flag_is_a_flag_of_node() {
    let Command::Node(node) = parse(&[
        "node",
        "--config",
        "/etc/culvert.yaml",
        "--dev-ca",
        "/tmp/ca",
        "--packet-mark=0x539",
        "--print-config",
    ])
    .unwrap()
    .command
    else {
        panic!("not node");
    };
    assert!(node.print_config);
    assert_eq!(
        node.flags.config.as_deref(),
        Some(Path::new("/etc/culvert.yaml"))
    );
    let given: Vec<_> = node
        .flags
        .values
        .iter()
        .map(|(s, value)| (s.key, value.as_str()))
        .collect();
    assert_eq!(given, [("devCa", "/tmp/ca"), ("packetMark", "0x539")]);
    assert!(parse(&["node", "--auth-token", "x"]).is_err());
    assert!(parse(&["node", "--unknown", "x"]).is_err());
}

#[test]
fn node_flags_reach_the_configuration() {
    let Command::Node(node) = parse(&["node", "--threads", "-1", "--node-name", "a b"])
        .unwrap()
        .command
    else {
        panic!("not node");
    };
    let errors = Config::load(&node.flags, &Environment::default())
        .unwrap_err()
        .to_string();
    assert!(
        errors.contains("threads: \"-1\" (flag --threads)"),
        "{errors}"
    );
    assert!(
        errors.contains("nodeName: \"a b\" (flag --node-name)"),
        "{errors}"
    );
}

#[test]
fn a_pod_is_added_by_what_is_said() {
    let answer = format!("{{\"ok\":{}}}\n", serde_json::to_string(&pod()).unwrap());
    let args = [
        "pod",
        "add",
        "--netns",
        "/run/netns/a",
        "--uid",
        "u-1",
        "--namespace",
        "shop",
        "--service-account",
        "web",
    ];
    let (printed, request) = ask(&args, &answer);
    assert_eq!(
        request,
        "{\"pod_add\":{\"netns\":\"/run/netns/a\",\"uid\":\"u-1\",\"namespace\":\"shop\",\"service_account\":\"web\"}}\n"
    );
    let printed = printed.unwrap();
    assert!(printed.starts_with("enrolled u-1 (shop/web"), "{printed}");
    assert!(!printed.contains('\u{1b}'));
    assert!(parse(&["pod", "add", "--uid", "u-1"]).is_err());
}

#[test]
fn a_namespace_of_this_process_is_named_so_that_the_agent_finds_it() {
    let (_, request) = ask(
        &["pod", "add", "--netns", "/proc/self/ns/net", "--uid", "u"],
        "",
    );
    let netns = format!("\"netns\":\"/proc/{}/ns/net\"", std::process::id());
    assert!(request.contains(&netns), "{request}");
}

#[test]
fn the_socket_can_be_a_flag_behind_the_command() {
    let ClientCommand::Pod(PodCommand::Remove(remove)) =
        client(&["pod", "remove", "u", "--admin-socket", "/run/a.sock"])
    else {
        panic!("not remove");
    };
    assert_eq!(remove.agent.admin_socket.as_deref(), Some("/run/a.sock"));
}

#[test]
fn pods_are_listed_as_a_table_that_a_terminal_cannot_be_fooled_by() {
    let answer = format!("{{\"ok\":[{}]}}\n", serde_json::to_string(&pod()).unwrap());
    let (printed, request) = ask(&["pod", "list"], &answer);
    assert_eq!(request, "{\"pod_list\":{}}\n");
    let printed = printed.unwrap();
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0].starts_with("UID  NAMESPACE  NAME"), "{printed}");
    assert!(
        lines[1].contains("web\\u{1b}[2J")
            && lines[1].contains("active")
            && lines[1].contains("10.0.0.1")
    );
    assert_eq!(lines[0].find("NAMESPACE"), lines[1].find("shop"));
    let (json, _) = ask(&["pod", "list", "--json"], &answer);
    assert_eq!(
        serde_json::from_str::<Vec<PodInfo>>(&json.unwrap()).unwrap(),
        [pod()]
    );
    let (none, _) = ask(&["pod", "list"], "{\"ok\":[]}\n");
    assert!(none.unwrap().contains("culvert pod add"));
}

#[test]
fn the_status_names_what_is_pending() {
    let answer = "{\"ok\":{\"version\":\"0.1.0\",\"pid\":7,\"node\":\"n1\",\"uptime_seconds\":90,\"pending\":[\"the mesh file\"],\
        \"pods\":2,\"workloads\":3,\"services\":1,\"policies\":4,\"mesh\":\"file /m.yaml\",\"certificates\":[],\"warnings\":[\"w\"]}}\n";
    let (printed, _) = ask(&["status"], answer);
    let printed = printed.unwrap();
    assert!(
        printed.contains("no, waiting for the mesh file"),
        "{printed}"
    );
    assert!(
        printed.contains("version 0.1.0, pid 7, up 90s"),
        "{printed}"
    );
    assert!(printed.contains("warning  w"), "{printed}");
    assert!(!printed.contains("short-circuit"), "{printed}");
}

#[test]
fn the_status_has_the_share_of_short_circuited_flows_or_why_there_is_none() {
    let status = |short: serde_json::Value| {
        let answer = serde_json::json!({"ok": {
            "version": "0.1.0", "pid": 7, "node": "n1", "uptime_seconds": 90, "pending": [], "pods": 2, "workloads": 3,
            "services": 1, "policies": 4, "mesh": "", "certificates": [], "short_circuit": short, "warnings": [],
        }});
        ask(&["status"], &format!("{answer}\n")).0.unwrap()
    };
    let share = status(serde_json::json!({
        "on": true, "auto": false, "reason": null, "flows": 2, "direct_flows": 5, "unfit_pods": 1,
    }));
    let expected = "short-circuit  2 of 5 open direct flows; on this kernel `auto` means off; never for 1 pods, by how they read\n";
    assert!(share.contains(expected), "{share}");
    let none = status(serde_json::json!({
        "on": false, "auto": false, "reason": "no BTF", "flows": 0, "direct_flows": 5, "unfit_pods": 0,
    }));
    assert!(
        none.contains("short-circuit  off everywhere on this kernel: no BTF\n"),
        "{none}"
    );
}

#[test]
fn a_flow_is_printed_with_its_short_circuit_unless_that_is_off() {
    let printed = |word: &'static str, redirected| {
        let flow = FlowRecord {
            short_circuit: Some(word.into()),
            redirected_sent: redirected,
            redirected_received: redirected,
            ..FlowRecord::default()
        };
        let event = FlowEvent::Closed { time_ms: 0, flow };
        let answer = format!("{{\"flow\":{}}}\n", serde_json::to_string(&event).unwrap());
        ask(&["flows"], &answer).0.unwrap()
    };
    assert!(printed("yes", Some(3)).ends_with("  short_circuit=yes  redirected=3/3\n"));
    assert!(printed("blocking", None).ends_with("  short_circuit=blocking\n"));
    assert!(!printed("off", None).contains("short_circuit"));
}

#[test]
fn flows_are_printed_until_the_agent_ends() {
    let flow = FlowRecord {
        error: Some("refused\nby policy".to_owned()),
        policy: Some("shop/deny".to_owned()),
        ..FlowRecord::new(
            "10.0.0.1:1".parse().unwrap(),
            "10.0.0.2:80".parse().unwrap(),
        )
    };
    let time_ms = u64::MAX;
    let event = FlowEvent::Closed { time_ms, flow };
    let answer = format!(
        "{{\"flow\":{}}}\n{{\"lost\":3}}\n",
        serde_json::to_string(&event).unwrap()
    );
    let (printed, request) = ask(&["flows", "--recent", "5"], &answer);
    assert_eq!(request, "{\"flows\":{\"recent\":5}}\n");
    let printed = printed.unwrap();
    let lines: Vec<_> = printed.lines().collect();
    assert_eq!(lines.len(), 3, "{printed}");
    assert!(lines[1].contains("failed  plaintext  10.0.0.1:1 -> 10.0.0.2:80  0/0  0us  policy=shop/deny  error=refused\\u{a}by policy"), "{printed}");
    assert!(lines[2].contains("3 events lost"));
    let (json, _) = ask(&["flows", "--json"], &answer);
    let json = json.unwrap();
    let lines: Vec<_> = json.lines().collect();
    assert_eq!(serde_json::from_str::<FlowEvent>(lines[0]).unwrap(), event);
    assert_eq!(lines[1], "{\"lost\":3}");
}

#[test]
fn failures_have_their_own_exit_status_and_say_what_to_do() {
    let absent = run(
        &client(&["status"]),
        &environment(Path::new("/nonexistent/a.sock")),
        &mut Vec::new(),
    )
    .unwrap_err();
    assert_eq!(absent.exit_status(), EXIT_NO_AGENT);
    let text = absent.to_string();
    assert!(
        text.contains("/nonexistent/a.sock") && text.contains("culvert node"),
        "{text}"
    );
    let (refused, _) = ask(
        &["pod", "remove", "x"],
        "{\"error\":{\"kind\":\"not_found\",\"message\":\"there is no pod x\"}}\n",
    );
    let refused = refused.unwrap_err();
    assert_eq!(refused.exit_status(), EXIT_FAILED);
    assert_eq!(refused.to_string(), "there is no pod x");
    for strange in ["nonsense\n", "{\"ok\":5}\n", "{\"lost\":1}\n", ""] {
        let (result, _) = ask(&["pod", "list"], strange);
        assert_eq!(result.unwrap_err().exit_status(), EXIT_FAILED, "{strange}");
    }
    let relative = run(
        &client(&["status", "--admin-socket", "a"]),
        &Environment::default(),
        &mut Vec::new(),
    );
    assert_eq!(relative.unwrap_err().exit_status(), EXIT_CONFIG);
}
