//! Redirect mode `iptables`: istio-cni's rules bring connections to the agent, and nothing of the kernel part is in the pod. The other
//! node leaves it to the kernel part, so that either mode is each other's peer.

use std::net::SocketAddr;

use anyhow::Result;
use culvert_harness::{
    AgentOptions, Pod, Proc,
    cni_rules::{Backend, program, redirection, shell},
    wait_until,
};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect_to, text, was_reset,
};

const MARKER: &str = "culvert-iptables-marker";

fn scene(policies: Option<Vec<culvert_harness::Policy>>) -> Result<Scene> {
    Scene::with(Setting {
        ipv6: true,
        iptables: true,
        policies,
        ..Setting::default()
    })
}

/// A server of both families.
fn serve(pod: &Pod) -> Result<Proc> {
    let port = PORT.to_string();
    let arguments = ["serve", "--port", &port, "--mode", "echo", "--bind", "::"];
    let server = pod.probe()?.args(arguments).spawn()?;
    server.wait_for_line("listening", SOON)?;
    Ok(server)
}

fn addresses(pod: &Pod) -> Result<[String; 2]> {
    Ok([pod.at(PORT), pod.at_v6(PORT)?])
}

/// Exchanges a marker.
fn says(from: &Pod, to: &str) -> Result<bool> {
    let length = MARKER.len().to_string();
    let report = connect_to(from, to, &["--send", MARKER, "--read", &length])?;
    Ok(text(&report, "data") == MARKER)
}

/// The server saw a connection to this address come from the pod's own one.
fn seen_from(server: &Proc, client: &Pod, to: &str) -> Result<()> {
    let to: SocketAddr = to.parse()?;
    let mut own = client.addresses().into_iter();
    let own = own.find(|own| own.is_ipv4() == to.is_ipv4());
    wait_until(SOON, "the server to tell of the client's address", || {
        let accepted = server.events("accepted");
        let peer: Option<SocketAddr> = accepted
            .last()
            .and_then(|accepted| text(accepted, "peer").parse().ok());
        Ok((peer.map(|peer| peer.ip().to_canonical()) == own).then_some(()))
    })
}

#[test]
fn rules_lead_to_tunnels_between_the_nodes_and_on_one() -> Result<()> {
    let scene = scene(None)?;
    let far = serve(scene.server_b()?)?;
    let near = serve(&scene.server_a)?;
    let capture = scene.fabric.capture()?;
    let local = scene.node1.capture()?;
    for (pod, server) in [(scene.server_b()?, &far), (&scene.server_a, &near)] {
        for to in addresses(pod)? {
            let mark = scene.agent1.log().mark();
            assert!(says(&scene.client, &to)?, "{to}");
            seen_from(server, &scene.client, &to)?;
            let identity = format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/client");
            let fields = [
                ("direction", "outbound"),
                ("path", "hbone"),
                ("src.identity", identity.as_str()),
            ];
            scene.agent1.wait_for_access(mark, &fields, SOON)?;
            assert!(!says(&scene.intruder, &to)?, "{to}");
        }
    }
    assert!(!capture.contains(MARKER.as_bytes())?);
    assert!(!local.contains(MARKER.as_bytes())?);
    Ok(())
}

#[test]
fn tunnels_from_another_node_reach_the_application() -> Result<()> {
    let scene = scene(Some(Vec::new()))?;
    let server = serve(&scene.server_a)?;
    let capture = scene.fabric.capture()?;
    for to in addresses(&scene.server_a)? {
        let mark = scene.agent1.log().mark();
        assert!(says(scene.server_b()?, &to)?, "{to}");
        seen_from(&server, scene.server_b()?, &to)?;
        let fields = [("direction", "inbound"), ("path", "hbone")];
        scene.agent1.wait_for_access(mark, &fields, SOON)?;
    }
    assert!(!capture.contains(MARKER.as_bytes())?);
    Ok(())
}

#[test]
fn plaintext_goes_through_the_agent_both_ways() -> Result<()> {
    let scene = scene(Some(Vec::new()))?;
    let outsider = scene.node2.pod("outsider")?;
    let server = serve(&scene.server_a)?;
    let outside = serve(&outsider)?;
    for to in addresses(&scene.server_a)? {
        let mark = scene.agent1.log().mark();
        assert!(says(&outsider, &to)?, "{to}");
        seen_from(&server, &outsider, &to)?;
        let fields = [("direction", "inbound"), ("path", "plaintext")];
        scene.agent1.wait_for_access(mark, &fields, SOON)?;
    }
    for to in addresses(&outsider)? {
        let mark = scene.agent1.log().mark();
        assert!(says(&scene.client, &to)?, "{to}");
        seen_from(&outside, &scene.client, &to)?;
        let fields = [("direction", "outbound"), ("path", "plaintext")];
        scene.agent1.wait_for_access(mark, &fields, SOON)?;
    }
    Ok(())
}

#[test]
fn plaintext_is_judged_and_the_agent_s_ports_are_not_the_application_s() -> Result<()> {
    let scene = scene(None)?;
    let _server = serve(&scene.server_a)?;
    let outsider = scene.node2.pod("outsider")?;
    for to in addresses(&scene.server_a)? {
        assert!(!says(&outsider, &to)?, "{to}");
    }
    for port in [15001, 15006] {
        for from in [&outsider, &scene.server_a] {
            let report = connect_to(
                from,
                &scene.server_a.at(port),
                &["--send", "x", "--read", "1"],
            )?;
            assert!(was_reset(&report), "{port}: {report}");
        }
    }
    Ok(())
}

/// What is there beside the rule and the route by which open connections outlive istio-cni's.
fn without_ours(pod: &Pod) -> Result<String> {
    let found = redirection(pod, Backend::Legacy)?;
    let (ours, theirs): (Vec<&str>, Vec<&str>) = found
        .lines()
        .partition(|line| line.contains("15001") && line.contains("fwmark"));
    assert_eq!(ours.len(), 2, "{found}");
    Ok(theirs.into_iter().map(|line| format!("{line}\n")).collect())
}

#[test]
fn a_later_agent_undoes_what_an_earlier_one_added() -> Result<()> {
    let scene = scene(Some(Vec::new()))?;
    let uid = scene.workload(&scene.server_a)?.uid.clone();
    let accepts = || {
        let path = "/proc/sys/net/ipv4/tcp_fwmark_accept";
        shell(&scene.server_a, &format!("cat {path}")).map(|text| text.trim().to_owned())
    };
    let before = without_ours(&scene.server_a)?;
    assert_eq!(accepts()?, "1");
    scene.agent1.kill()?;
    let mut options = AgentOptions::default();
    let mode = ("CULVERT_REDIRECT_MODE".to_owned(), "iptables".to_owned());
    options.env.extend([mode]);
    let agent = scene.node1.start_agent(options)?;
    agent.ready()?;
    assert_eq!(without_ours(&scene.server_a)?, before);
    agent.unenrol(&uid)?;
    assert_eq!(redirection(&scene.server_a, Backend::Legacy)?, before);
    assert_eq!(accepts()?, "0");
    Ok(())
}

#[test]
fn a_pod_without_rules_is_refused_and_the_rules_of_the_others_stay() -> Result<()> {
    let scene = scene(Some(Vec::new()))?;
    let guest = scene.node1.pod("guest")?;
    let enrol = || {
        let agent = &scene.agent1;
        agent.enrol(&guest, "guest-uid", NAMESPACE, "guest", "guest")
    };
    let refused = format!("{:#}", enrol().unwrap_err());
    assert!(refused.contains("iptables"), "{refused}");
    program(&guest, Backend::Legacy)?;
    let before = redirection(&guest, Backend::Legacy)?;
    enrol()?;
    assert_eq!(without_ours(&guest)?, before);
    let _server = serve(scene.server_b()?)?;
    assert!(says(&guest, &scene.server_b()?.at(PORT))?);
    scene.agent1.unenrol("guest-uid")?;
    assert_eq!(redirection(&guest, Backend::Legacy)?, before);
    assert!(!answered(&connect_to(
        &guest,
        &scene.server_b()?.at(PORT),
        &[]
    )?));
    Ok(())
}
