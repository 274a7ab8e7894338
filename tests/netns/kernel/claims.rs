//! Claims live as long as a connection is in the making, whatever it comes to.

use anyhow::Result;
use culvert_harness::wait_until;
use culvert_tests::scene::{
    PORT, SOON, Scene, answered, connect, connect_to, echo, serve, text, unplug,
};

use crate::kernel_tables::{claims, decisions, flows, wait_for_no_claims};

#[test]
fn no_claim_outlives_its_connect() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    for _ in 0..3 {
        assert!(answered(&echo(&scene.client, &scene.server_a)?));
    }
    wait_for_no_claims(&scene.node1)?;

    let closed = scene.server_a.at(7009);
    connect_to(&scene.client, &closed, &["--read", "1"])?;
    let refused = connect_to(&scene.client, &closed, &[])?;
    assert_eq!(text(&refused, "connect"), "ECONNREFUSED", "{refused}");
    wait_for_no_claims(&scene.node1)?;

    // A server that lost its link does not answer.
    unplug(&scene.server_a)?;
    let lost = connect(&scene.client, &scene.server_a, &["--timeout-ms", "300"])?;
    assert_eq!(text(&lost, "connect"), "TIMEOUT", "{lost}");
    wait_for_no_claims(&scene.node1)?;
    for reason in ["claim_quota", "claim_map_full", "claim_foreign_source"] {
        assert_eq!(decisions(&scene.agent1, reason)?, 0, "{reason}");
    }
    Ok(())
}

#[test]
fn two_thousand_short_connections_leave_nothing_behind() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "once")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let to = scene.server_a.at(PORT);
    let arguments = ["conn", "--to", &to, "--count", "2000", "--threads", "4"];
    let load = scene.client.probe()?.args(arguments).run(SOON)?.json()?;
    assert_eq!(load["errors"], 0, "{load}");
    assert_eq!(load["count"], 2000, "{load}");
    wait_for_no_claims(&scene.node1)?;
    wait_until(SOON, "every flow to end", || {
        Ok(flows(&scene.node1)?.is_empty().then_some(()))
    })?;
    assert!(claims(&scene.node1)?.is_empty());
    let agent = &scene.agent1;
    let labels = [
        "reporter=\"source\"",
        "source_principal=\"spiffe://cluster.local/ns/demo/sa/client\"",
    ];
    wait_until(SOON, "every end to be reported", || {
        let closed = agent.metric("istio_tcp_connections_closed_total", &labels)?;
        Ok((closed >= 2001.0).then_some(()))
    })?;
    assert_eq!(
        agent.metric("istio_tcp_connections_closed_total", &labels)?,
        2001.0
    );
    assert_eq!(
        agent.metric("istio_tcp_connections_opened_total", &labels)?,
        2001.0
    );
    assert_eq!(
        agent.metric("culvert_flows_total", &["path=\"direct\""])?,
        2000.0
    );
    assert_eq!(agent.metric("culvert_open_flows", &[])?, 0.0);
    assert_eq!(agent.metric("culvert_flow_events_lost_total", &[])?, 0.0);
    for reason in [
        "claim_quota",
        "isolated_no_claim",
        "isolated_sequence",
        "isolated_old_generation",
    ] {
        assert_eq!(decisions(agent, reason)?, 0, "{reason}");
    }
    Ok(())
}
