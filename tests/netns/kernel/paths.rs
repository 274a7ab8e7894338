//! The ways a connection may take: direct, through a tunnel, in plaintext.

use anyhow::{Context as _, Result};
use culvert_harness::wait_until;
use culvert_tests::scene::{SOON, Scene, Setting, answered, echo, serve, text};

#[test]
fn a_pair_on_one_node_becomes_direct() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_a, "echo")?;
    let mark = scene.agent1.log().mark();
    for attempt in 0..3 {
        let report = echo(&scene.client, &scene.server_a)?;
        assert!(answered(&report), "attempt {attempt}: {report}");
        assert_eq!(text(&report, "peer"), scene.server_a.at(7000));
    }
    let client = format!("{}:", scene.client.address());
    for accepted in server.events("accepted") {
        assert!(text(&accepted, "peer").starts_with(&client), "{accepted}");
    }
    // The first made the verdict, the others used it.
    let fields = [
        ("path", "direct"),
        ("src.workload", "client"),
        ("dst.workload", "server-a"),
    ];
    let line = scene.agent1.wait_for_access(mark, &fields, SOON)?;
    assert_eq!(line.field("bytes_sent"), Some("5".into()), "{line:?}");
    assert_eq!(line.field("bytes_recv"), Some("5".into()), "{line:?}");
    wait_until(SOON, "both direct flows to be counted", || {
        let agent = &scene.agent1;
        let flows = agent.metric("culvert_flows_total", &["path=\"direct\""])?;
        Ok((flows == 2.0).then_some(()))
    })?;
    Ok(())
}

#[test]
fn a_pair_on_two_nodes_goes_through_a_tunnel() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(scene.server_b()?, "echo")?;
    let report = echo(&scene.client, scene.server_b()?)?;
    assert!(answered(&report), "{report}");
    let accepted = server.wait_for_event("accepted", SOON)?;
    assert_eq!(
        text(&accepted, "peer"),
        text(&report, "local"),
        "the server sees the client's address and port"
    );
    Ok(())
}

#[test]
fn applications_see_their_own_pod_where_the_agents_are_told_so() -> Result<()> {
    let env = vec![("ENABLE_ORIG_SRC", "false".to_owned())];
    let scene = Scene::with(Setting {
        env,
        ..Setting::default()
    })?;
    let far = serve(scene.server_b()?, "echo")?;
    let near = serve(&scene.server_a, "echo")?;
    // What is direct shows its client whatever agents are told.
    let ways = [
        (&far, scene.server_b()?, scene.server_b()?),
        (&near, &scene.server_a, &scene.server_a),
        (&near, &scene.server_a, &scene.client),
    ];
    for (count, (server, to, seen)) in ways.into_iter().enumerate() {
        let report = echo(&scene.client, to)?;
        assert!(answered(&report), "{report}");
        let ip = format!("{}:", seen.address());
        wait_until(SOON, "the server to tell whom it sees", || {
            let peers = server.events("accepted");
            let peer = peers.iter().map(|event| text(event, "peer")).next_back();
            Ok(peer.is_some_and(|peer| peer.starts_with(&ip)).then_some(()))
        })
        .with_context(|| format!("connection {count}"))?;
    }
    Ok(())
}
