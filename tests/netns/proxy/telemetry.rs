//! What is counted.

use anyhow::Result;
use culvert_harness::{Agent, wait_until};
use culvert_tests::scene::{SOON, Scene, connect, serve, text};

fn becomes(agent: &Agent, name: &str, labels: &[&str], wanted: f64) -> Result<()> {
    let mut last = f64::NAN;
    let waited = wait_until(SOON, name, || {
        last = agent.metric(name, labels)?;
        Ok((last == wanted).then_some(()))
    });
    waited.map_err(|error| error.context(format!("{name}{labels:?} is {last}, not {wanted}")))
}

/// A connection with 1,000 bytes there and 20 back.
fn exchange(scene: &Scene, to: &culvert_harness::Pod) -> Result<()> {
    let report = connect(
        &scene.client,
        to,
        &["--send", &"x".repeat(1000), "--half-close", "--read", "20"],
    )?;
    assert_eq!(text(&report, "read"), "ok", "{report}");
    Ok(())
}

#[test]
fn a_tunnelled_connection_is_counted_by_both_agents() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(scene.server_b()?, "farewell")?;
    exchange(&scene, scene.server_b()?)?;
    for (agent, reporter) in [
        (&scene.agent1, "reporter=\"source\""),
        (scene.agent2()?, "reporter=\"destination\""),
    ] {
        let labels = [
            reporter,
            "source_principal=\"spiffe://cluster.local/ns/demo/sa/client\"",
            "destination_principal=\"spiffe://cluster.local/ns/demo/sa/server-b\"",
            "connection_security_policy=\"mutual_tls\"",
        ];
        becomes(agent, "istio_tcp_connections_opened_total", &labels, 1.0)?;
        becomes(agent, "istio_tcp_connections_closed_total", &labels, 1.0)?;
        // Istio counts from the server's side: received is what the client sent.
        becomes(agent, "istio_tcp_received_bytes_total", &labels, 1000.0)?;
        becomes(agent, "istio_tcp_sent_bytes_total", &labels, 20.0)?;
    }
    Ok(())
}

#[test]
fn a_direct_connection_is_counted_for_both_ends() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "farewell")?;
    // The first goes through the agent, and leaves the verdict.
    for _ in 0..3 {
        exchange(&scene, &scene.server_a)?;
    }
    for reporter in ["reporter=\"source\"", "reporter=\"destination\""] {
        let labels = [reporter, "sa/client\"", "sa/server-a\""];
        becomes(
            &scene.agent1,
            "istio_tcp_connections_closed_total",
            &labels,
            3.0,
        )?;
        becomes(
            &scene.agent1,
            "istio_tcp_received_bytes_total",
            &labels,
            3000.0,
        )?;
        becomes(&scene.agent1, "istio_tcp_sent_bytes_total", &labels, 60.0)?;
    }
    Ok(())
}
