//! Addresses out of the ordinary: the pod's own, loopback, IPv4 in IPv6; and Multipath TCP.

use anyhow::Result;
use culvert_tests::scene::{PORT, Scene, answered, connect, connect_to, echo, serve, text};

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

#[test]
fn multipath_tcp_takes_the_same_ways() -> Result<()> {
    let scene = Scene::new()?;
    let (_server, _other) = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    let multipath = ["--mptcp", "--send", "hello", "--read", "5"];
    for _ in 0..2 {
        for server in [&scene.server_a, scene.server_b()?] {
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
