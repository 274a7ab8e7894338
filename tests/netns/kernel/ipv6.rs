//! IPv6: the same ways, the same refusals and the same protections as IPv4.

use anyhow::{Context as _, Result};
use culvert_harness::{Pod, PodOptions, Proc, Workload, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect_to, text, unplug,
};
use serde_json::Value;

use crate::kernel_tables::{decisions, wait_for_claim, wait_for_no_claims};

const HELLO: [&str; 4] = ["--send", "hello", "--read", "5"];
const MARKER: &str = "culvert-ipv6-marker";
const SOURCE: u16 = 40001;

pub fn dual_stack() -> Result<Scene> {
    dual_stack_without("")
}

pub fn dual_stack_without(knobs: &'static str) -> Result<Scene> {
    Scene::with(Setting {
        ipv6: true,
        knobs,
        ..Setting::default()
    })
}

/// A server for both families.
pub fn serve_both(pod: &Pod, mode: &str) -> Result<Proc> {
    let port = PORT.to_string();
    let arguments = ["serve", "--bind", "::", "--port", &port, "--mode", mode];
    let server = pod.probe()?.args(arguments).spawn()?;
    server.wait_for_line("listening", SOON)?;
    Ok(server)
}

/// Waits until the server has accepted so many connections. It tells of one after the client may have had its answer.
pub fn wait_for_accepted(server: &Proc, count: usize) -> Result<()> {
    wait_until(SOON, "the server to accept", || {
        Ok((server.events("accepted").len() == count).then_some(()))
    })
}

fn hello(from: &Pod, to: &Pod) -> Result<Value> {
    connect_to(from, &to.at_v6(PORT)?, &HELLO)
}

#[test]
fn a_pair_on_one_node_becomes_direct() -> Result<()> {
    let scene = dual_stack()?;
    let server = serve_both(&scene.server_a, "echo")?;
    let mark = scene.agent1.log().mark();
    for attempt in 0..3 {
        let report = hello(&scene.client, &scene.server_a)?;
        assert!(answered(&report), "attempt {attempt}: {report}");
        assert_eq!(text(&report, "peer"), scene.server_a.at_v6(PORT)?);
    }
    wait_for_accepted(&server, 3)?;
    let client = scene.client.address_v6().context("IPv6")?;
    for accepted in server.events("accepted") {
        let peer = text(&accepted, "peer");
        assert!(peer.starts_with(&format!("[{client}]:")), "{accepted}");
    }
    let to = scene.server_a.at_v6(PORT)?;
    let fields = [
        ("path", "direct"),
        ("src.workload", "client"),
        ("dst.addr", to.as_str()),
        ("bytes_sent", "5"),
    ];
    scene.agent1.wait_for_access(mark, &fields, SOON)?;
    assert_eq!(decisions(&scene.agent1, "direct")?, 2);
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 2);
    wait_for_no_claims(&scene.node1)
}

#[test]
fn a_pair_on_two_nodes_goes_through_a_tunnel_of_ipv6() -> Result<()> {
    let scene = dual_stack()?;
    let server = serve_both(scene.server_b()?, "echo")?;
    let capture = scene.fabric.capture()?;
    let mark = scene.agent1.log().mark();
    let to = scene.server_b()?.at_v6(PORT)?;
    let length = MARKER.len().to_string();
    let say = ["--send", MARKER, "--read", &length];
    let report = connect_to(&scene.client, &to, &say)?;
    assert_eq!(text(&report, "data"), MARKER, "{report}");
    assert!(!capture.contains(MARKER.as_bytes())?, "in clear");
    let accepted = server.wait_for_event("accepted", SOON)?;
    assert_eq!(
        text(&accepted, "peer"),
        text(&report, "local"),
        "the server sees the client's address and port"
    );
    let tunnel = scene.server_b()?.at_v6(15008)?;
    let fields = [
        ("path", "hbone"),
        ("dst.addr", tunnel.as_str()),
        ("dst.workload", "server-b"),
    ];
    scene.agent1.wait_for_access(mark, &fields, SOON)?;
    Ok(())
}

#[test]
fn outside_the_mesh_it_stays_plain_tcp() -> Result<()> {
    let scene = dual_stack()?;
    let outsider = scene.node2.pod("outsider")?;
    let server = serve_both(&outsider, "echo")?;
    let mark = scene.agent1.log().mark();
    let report = hello(&scene.client, &outsider)?;
    assert!(answered(&report), "{report}");
    let to = outsider.at_v6(PORT)?;
    let fields = [("path", "plaintext"), ("dst.addr", to.as_str())];
    scene.agent1.wait_for_access(mark, &fields, SOON)?;
    wait_for_accepted(&server, 1)?;
    // The other way nobody vouches for the outsider.
    let _server = serve_both(scene.server_b()?, "echo")?;
    let report = hello(&outsider, scene.server_b()?)?;
    assert!(!answered(&report), "{report}");
    Ok(())
}

#[test]
fn who_is_not_allowed_is_reset_once_and_then_refused() -> Result<()> {
    let scene = dual_stack()?;
    let server = serve_both(&scene.server_a, "echo")?;
    for _ in 0..2 {
        let report = hello(&scene.intruder, &scene.server_a)?;
        assert!(!answered(&report), "{report}");
    }
    let report = hello(&scene.intruder, &scene.server_a)?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    assert_eq!(decisions(&scene.agent1, "refused_by_policy")?, 2);
    assert!(server.events("accepted").is_empty());
    Ok(())
}

#[test]
fn a_dual_stack_server_and_a_mapped_client_meet_on_every_way() -> Result<()> {
    let scene = dual_stack()?;
    let servers = [&scene.server_a, scene.server_b()?];
    let _running = (
        serve_both(&scene.server_a, "echo")?,
        serve_both(scene.server_b()?, "echo")?,
    );
    for server in servers {
        let mapped = format!("[::ffff:{}]:{PORT}", server.address());
        for _ in 0..2 {
            for to in [&server.at(PORT), &server.at_v6(PORT)?, &mapped] {
                let report = connect_to(&scene.client, to, &HELLO)?;
                assert!(answered(&report), "{to}: {report}");
                let report = connect_to(&scene.intruder, to, &HELLO)?;
                assert!(!answered(&report), "{to}: {report}");
            }
        }
    }
    // The first to IPv4 and the first to IPv6 were steered.
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 4);
    Ok(())
}

#[test]
fn a_pod_with_ipv6_only_is_a_client_and_a_server() -> Result<()> {
    let mut scene = Scene::with(Setting {
        ipv6: true,
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let options = PodOptions {
        only_ipv6: true,
        ..PodOptions::default()
    };
    let six = scene.node1.pod_with("six", options)?;
    let workload = Workload::of_pod(&six, NAMESPACE, "six");
    scene.agent1.enrol_as(&six, &workload)?;
    scene.change_mesh(|mesh| mesh.workloads.push(workload))?;
    let _servers = (
        serve_both(&six, "echo")?,
        serve_both(&scene.server_a, "echo")?,
        serve_both(scene.server_b()?, "echo")?,
    );
    for _ in 0..2 {
        for (from, to) in [
            (&six, &scene.server_a),
            (&six, scene.server_b()?),
            (&scene.client, &six),
            (scene.server_b()?, &six),
            (&six, &six),
        ] {
            let report = hello(from, to)?;
            assert!(
                answered(&report),
                "{} to {}: {report}",
                from.name(),
                to.name()
            );
        }
    }
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 2);
    // Without an address there is no way, but not into the open either.
    let capture = six.capture()?;
    let send = ["--send", MARKER, "--read", "5"];
    let report = connect_to(&six, &scene.server_b()?.at(PORT), &send)?;
    assert!(!answered(&report), "{report}");
    assert!(!capture.contains(MARKER.as_bytes())?);
    Ok(())
}

#[test]
fn a_pod_without_ipv6_learns_at_once_that_there_is_no_way() -> Result<()> {
    let scene = Scene::new()?;
    let report = connect_to(&scene.client, "[fd77::1]:7000", &HELLO)?;
    let error = text(&report, "connect");
    assert!(
        ["ENETUNREACH", "EHOSTUNREACH", "ECONNREFUSED"].contains(&error),
        "{report}"
    );
    Ok(())
}

#[test]
fn a_pod_whose_ipv6_is_switched_off_is_enrolled_with_ipv4() -> Result<()> {
    let mut scene = Scene::new()?;
    let four = scene.node1.pod("four")?;
    let key = "net.ipv6.conf.all.disable_ipv6";
    four.netns().set_sysctl(key, "1")?;
    let workload = Workload::of_pod(&four, NAMESPACE, "client");
    scene.change_mesh(|mesh| mesh.workloads.push(workload.clone()))?;
    scene.agent1.enrol_as(&four, &workload)?;
    let _servers = (
        serve_both(&scene.server_a, "echo")?,
        serve_both(scene.server_b()?, "echo")?,
    );
    for server in [&scene.server_a, scene.server_b()?] {
        let report = connect_to(&four, &server.at(PORT), &HELLO)?;
        assert!(answered(&report), "{report}");
    }
    Ok(())
}

/// Bound to a device; tells also whether it passed between the nodes in clear.
fn say_by(scene: &Scene, device: &str) -> Result<(Value, bool)> {
    let capture = scene.fabric.capture()?;
    let (to, length) = (scene.server_b()?.at_v6(PORT)?, MARKER.len().to_string());
    let say = ["--send", MARKER, "--read", &length, "--device", device];
    let report = connect_to(&scene.client, &to, &say)?;
    Ok((report, capture.contains(MARKER.as_bytes())?))
}

#[test]
fn a_socket_bound_to_a_device_is_in_the_tunnel_or_refused() -> Result<()> {
    let mut scene = dual_stack()?;
    let _server = serve_both(scene.server_b()?, "echo")?;
    let second = "fd77::1:201";
    scene.client.add_device("eth1", second.parse()?)?;
    let (report, leaked) = say_by(&scene, "eth1")?;
    assert!(!leaked, "{report}");
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    scene.change_mesh(|mesh| {
        let client = mesh.workload("client").expect("in the mesh");
        client.workload_ips.push(second.to_owned());
    })?;
    let workload = scene.workload(&scene.client)?;
    scene.agent1.unenrol(&workload.uid)?;
    scene.agent1.enrol_as(&scene.client, workload)?;
    for device in ["eth0", "eth1"] {
        let (report, leaked) = say_by(&scene, device)?;
        assert!(!leaked, "{device}: {report}");
        assert_eq!(text(&report, "data"), MARKER, "{device}: {report}");
    }
    Ok(())
}

#[test]
fn twin_without_steering_a_socket_bound_to_a_device_leaves_in_plaintext() -> Result<()> {
    let scene = dual_stack_without("skip-steering,skip-policy")?;
    let _server = serve_both(scene.server_b()?, "echo")?;
    scene.client.add_device("eth1", "fd77::1:201".parse()?)?;
    for device in ["eth0", "eth1"] {
        let (report, leaked) = say_by(&scene, device)?;
        assert!(leaked, "{device}: {report}");
    }
    Ok(())
}

/// What `ip` prints first after a word.
fn word_after(pod: &Pod, arguments: &[&str], word: &str) -> Result<String> {
    let text = pod.command("ip").args(arguments).run(SOON)?.success()?;
    let mut words = text.split_whitespace();
    words.find(|found| *found == word).context("the word")?;
    Ok(words.next().context("a word after it")?.to_owned())
}

#[test]
fn an_address_of_the_link_is_reached_on_its_link() -> Result<()> {
    let scene = dual_stack()?;
    // Two links, and the destination is not on the first.
    scene.client.add_device("eth1", "fd77::1:201".parse()?)?;
    let workload = scene.workload(&scene.client)?;
    scene.agent1.unenrol(&workload.uid)?;
    scene.agent1.enrol_as(&scene.client, workload)?;
    let outsider = scene.node1.pod("outsider")?;
    let server = serve_both(&outsider, "echo")?;
    let shown = [
        "-6", "-o", "address", "show", "dev", "eth0", "scope", "link",
    ];
    let address = word_after(&outsider, &shown, "inet6")?;
    let (address, _) = address.split_once('/').context("a prefix")?;
    for device in ["eth0", "eth1"] {
        let index = scene
            .client
            .in_netns(|| nix::net::if_::if_nametoindex(device).context("its index"))??;
        let mark = scene.agent1.log().mark();
        let to = format!("[{address}%{index}]:{PORT}");
        let report = connect_to(&scene.client, &to, &HELLO)?;
        assert!(answered(&report), "{to}: {report}");
        let fields = [("path", "plaintext"), ("dst.addr", to.as_str())];
        scene.agent1.wait_for_access(mark, &fields, SOON)?;
    }
    wait_for_accepted(&server, 2)?;
    Ok(())
}

/// What a pod that nobody enrolled got by an address of a pod of the mesh.
struct Theft {
    report: Value,
    server: Proc,
}

impl Theft {
    /// The client's SYN is lost, and a pod with the client's address connects from the client's port.
    fn of_the_client(scene: &Scene) -> Result<(Self, Proc)> {
        let server = serve_both(&scene.server_a, "echo")?;
        assert!(answered(&hello(&scene.client, &scene.server_a)?));
        wait_for_no_claims(&scene.node1)?;
        unplug(&scene.client)?;
        let (to, port) = (scene.server_a.at_v6(PORT)?, SOURCE.to_string());
        let bind = ["--bind-port", &port];
        let patient = ["connect", "--to", &to, "--timeout-ms", "60000"];
        let connecting = scene.client.probe()?.args(patient).args(bind);
        let connecting = connecting.spawn()?;
        wait_for_claim(&scene.node1, SOURCE)?;
        let thief = scene.node1.pod_with("thief", the_same_as(&scene.client))?;
        forget_neighbours(&scene.server_a)?;
        let report = connect_to(&thief, &to, &[&bind[..], &HELLO[..]].concat())?;
        Ok((Self { report, server }, connecting))
    }

    /// The server has gone from the link, and a pod with its address listens.
    fn of_the_server(scene: &Scene) -> Result<Self> {
        let server = serve_both(&scene.server_a, "sink")?;
        hello(&scene.client, &scene.server_a)?;
        wait_for_no_claims(&scene.node1)?;
        drop(server);
        unplug(&scene.server_a)?;
        let thief = scene
            .node1
            .pod_with("thief", the_same_as(&scene.server_a))?;
        forget_neighbours(&scene.client)?;
        let server = serve_both(&thief, "collect")?;
        let say = ["--send", MARKER, "--half-close", "--read-all"];
        let report = connect_to(&scene.client, &thief.at_v6(PORT)?, &say)?;
        Ok(Self { report, server })
    }

    /// Bytes that the server's application read.
    fn read(&self) -> Result<u64> {
        let closed = self.server.wait_for_event("closed", SOON)?;
        Ok(closed["bytes_read"].as_u64().unwrap_or(u64::MAX))
    }
}

/// With its IPv6 address, and nothing of IPv4.
fn the_same_as(pod: &Pod) -> PodOptions {
    PodOptions {
        address_v6: pod.address_v6(),
        only_ipv6: true,
        ..PodOptions::default()
    }
}

fn forget_neighbours(pod: &Pod) -> Result<()> {
    let flush = ["-6", "neigh", "flush", "all"];
    pod.command("ip").args(flush).run(SOON)?.success().map(drop)
}

#[test]
fn a_stolen_source_with_another_sequence_number_is_not_read() -> Result<()> {
    let scene = dual_stack()?;
    let log = scene.agent1.log().mark();
    let (theft, _connecting) = Theft::of_the_client(&scene)?;
    assert!(!answered(&theft.report), "{}", theft.report);
    let agent = &scene.agent1;
    agent
        .process()
        .wait_for_line_after(log, "isolated_sequence", SOON)?;
    assert_eq!(decisions(agent, "isolated_sequence")?, 1);
    assert_eq!(decisions(agent, "isolation_failed")?, 0);
    Ok(())
}

#[test]
fn twin_without_sequence_numbers_a_stolen_source_is_read() -> Result<()> {
    let scene = dual_stack_without("skip-sequence")?;
    let (theft, _connecting) = Theft::of_the_client(&scene)?;
    assert!(answered(&theft.report), "{}", theft.report);
    Ok(())
}

#[test]
fn a_thief_at_a_server_s_address_reads_nothing() -> Result<()> {
    let scene = dual_stack()?;
    let log = scene.agent1.log().mark();
    let theft = Theft::of_the_server(&scene)?;
    assert_eq!(theft.read()?, 0, "{}", theft.report);
    scene
        .agent1
        .process()
        .wait_for_line_after(log, "isolated_not_admitted", SOON)?;
    Ok(())
}

#[test]
fn twin_without_the_check_of_admission_a_thief_reads_everything() -> Result<()> {
    let scene = dual_stack_without("skip-admitted")?;
    let theft = Theft::of_the_server(&scene)?;
    assert_eq!(theft.read()?, MARKER.len() as u64, "{}", theft.report);
    Ok(())
}

#[test]
fn an_open_flow_that_policy_forbids_by_now_is_cut() -> Result<()> {
    let mut scene = dual_stack()?;
    let _server = serve_both(&scene.server_a, "echo")?;
    assert!(answered(&hello(&scene.client, &scene.server_a)?));
    let mut held = Vec::new();
    let mapped = format!("[::ffff:{}]:{PORT}", scene.server_a.address());
    for to in [scene.server_a.at_v6(PORT)?, mapped] {
        let hold = ["connect", "--to", &to, "--hold"];
        let process = scene.client.probe()?.args(hold).stdin().spawn()?;
        process.wait_for_event("connected", SOON)?;
        crate::agent_gone::goes_on(&process, "before")?;
        held.push(process);
    }
    scene.change_mesh(|mesh| mesh.policies = vec![culvert_tests::scene::only("nobody")])?;
    for process in held {
        let end = process.wait_for_event("end", SOON)?;
        assert!(
            ["ECONNRESET", "ECONNABORTED"].contains(&text(&end, "how")),
            "{end}"
        );
    }
    Ok(())
}
