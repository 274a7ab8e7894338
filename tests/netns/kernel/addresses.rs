//! Addresses and sockets out of the ordinary: the pod's own, loopback, IPv6, bound to a device, Multipath TCP.

use anyhow::Result;
use culvert_tests::scene::{
    PORT, Scene, Setting, answered, connect, connect_to, echo, serve, text,
};
use serde_json::Value;

use crate::kernel_tables::{decisions, wait_for_no_claims};

const HELLO: [&str; 4] = ["--send", "hello", "--read", "5"];

#[test]
fn a_pod_reaches_itself_without_the_agent() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.client, "echo")?;
    scene.agent1.kill()?;
    for to in [
        scene.client.at(PORT),
        format!("127.0.0.1:{PORT}"),
        format!("127.8.9.1:{PORT}"),
    ] {
        let report = connect_to(&scene.client, &to, &HELLO)?;
        assert!(answered(&report), "{to}: {report}");
    }
    let peers: Vec<_> = server
        .events("accepted")
        .iter()
        .map(|event| text(event, "peer").to_owned())
        .collect();
    assert!(
        peers[0].starts_with(&format!("{}:", scene.client.address())),
        "{peers:?}"
    );
    assert!(peers[1].starts_with("127.0.0.1:"), "{peers:?}");
    wait_for_no_claims(&scene.node1)
}

#[test]
fn a_pod_that_reaches_itself_is_not_steered() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.client, "echo")?;
    for to in [scene.client.at(PORT), format!("127.0.0.1:{PORT}")] {
        assert!(answered(&connect_to(&scene.client, &to, &HELLO)?));
    }
    assert_eq!(decisions(&scene.agent1, "admitted_own_address")?, 1);
    for reason in [
        "direct",
        "steered_remote",
        "steered_unknown_verdict",
        "steered_not_eligible",
        "to_outbound",
    ] {
        assert_eq!(decisions(&scene.agent1, reason)?, 0, "{reason}");
    }
    Ok(())
}

#[test]
fn a_mapped_ipv6_socket_is_treated_as_ipv4() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_a, "echo")?;
    let to = format!("[::ffff:{}]:{PORT}", scene.server_a.address());
    for _ in 0..2 {
        assert!(answered(&connect_to(&scene.client, &to, &HELLO)?));
        assert!(!answered(&connect_to(&scene.intruder, &to, &HELLO)?));
    }
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 1);
    assert_eq!(decisions(&scene.agent1, "refused_by_policy")?, 1);
    assert_eq!(server.events("accepted").len(), 2);
    wait_for_no_claims(&scene.node1)
}

#[test]
fn a_dual_stack_listener_is_served_like_any_other() -> Result<()> {
    let scene = Scene::new()?;
    let probe =
        scene
            .server_a
            .probe()?
            .args(["serve", "--bind", "::", "--port", &PORT.to_string()]);
    let server = probe.spawn()?;
    server.wait_for_line("listening", culvert_tests::scene::SOON)?;
    for _ in 0..2 {
        assert!(answered(&echo(&scene.client, &scene.server_a)?));
        assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    }
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 1);
    Ok(())
}

/// The same connection over IPv6, from a pod of the mesh and from one that is not.
fn over_ipv6(scene: &Scene) -> Result<(Value, Value, Value)> {
    let (outsider, plain) = (scene.node1.pod("outsider")?, scene.node1.pod("plain")?);
    let port = PORT.to_string();
    let mut servers = Vec::new();
    for pod in [&plain, &scene.server_a] {
        let server = pod
            .probe()?
            .args(["serve", "--bind", "::", "--port", &port])
            .spawn()?;
        server.wait_for_line("listening", culvert_tests::scene::SOON)?;
        servers.push(server);
    }
    let to = |pod: &culvert_harness::Pod| format!("[{}]:{PORT}", pod.address_v6().unwrap());
    let out = connect_to(&scene.client, &to(&plain), &HELLO)?;
    let into = connect_to(&outsider, &to(&scene.server_a), &HELLO)?;
    Ok((out, into, connect_to(&outsider, &to(&plain), &HELLO)?))
}

#[test]
fn ipv6_is_refused_in_both_directions_and_never_plaintext() -> Result<()> {
    let scene = Scene::with(Setting {
        ipv6: true,
        ..Setting::default()
    })?;
    let (out, into, outside) = over_ipv6(&scene)?;
    assert!(answered(&outside), "without the mesh this works: {outside}");
    assert_eq!(text(&out, "connect"), "ECONNREFUSED", "{out}");
    assert_eq!(text(&into, "connect"), "ECONNREFUSED", "{into}");
    assert!(decisions(&scene.agent1, "refused_ipv6")? >= 2);
    Ok(())
}

#[test]
fn multipath_tcp_takes_the_same_ways() -> Result<()> {
    let scene = Scene::new()?;
    let (_server, _other) = (
        serve(&scene.server_a, "echo")?,
        serve(&scene.server_b, "echo")?,
    );
    let multipath = ["--mptcp", "--send", "hello", "--read", "5"];
    for _ in 0..2 {
        for server in [&scene.server_a, &scene.server_b] {
            let report = connect(&scene.client, server, &multipath)?;
            assert!(answered(&report), "{report}");
        }
        assert!(!answered(&connect(
            &scene.intruder,
            &scene.server_a,
            &multipath
        )?));
    }
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 1);
    assert_eq!(decisions(&scene.agent1, "refused_by_policy")?, 1);
    wait_for_no_claims(&scene.node1)
}
