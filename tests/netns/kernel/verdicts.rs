//! Verdicts: what policy denies is refused before the application reads a byte, and what is not decided is not admitted.

use anyhow::Result;
use culvert_abi::{Address, Endpoint, Verdict, VerdictKey, action};
use culvert_harness::{Match, Policy, Proc, wait_until};
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, Setting, answered, connect, echo, only, principal, serve, text,
    was_reset,
};
use serde_json::Value;

use crate::kernel_tables::{decisions, fill, table};

/// The intruder tries three times: the first makes the verdict, the others meet it.
fn intrude(scene: &Scene) -> Result<(Vec<Value>, Proc)> {
    let server = serve(&scene.server_a, "echo")?;
    let reports = (0..3)
        .map(|_| echo(&scene.intruder, &scene.server_a))
        .collect::<Result<_>>()?;
    Ok((reports, server))
}

#[test]
fn a_denied_pod_is_refused_before_the_application_reads_a_byte() -> Result<()> {
    let deny =
        Policy::deny(NAMESPACE, "no-intruders").when(Match::principal(&principal("intruder")));
    let scene = Scene::with(Setting {
        policies: Some(vec![only("client"), deny]),
        ..Setting::default()
    })?;
    let log = scene.agent1.log().mark();
    let (reports, server) = intrude(&scene)?;
    assert!(was_reset(&reports[0]), "{}", reports[0]);
    for report in &reports[1..] {
        assert_eq!(text(report, "connect"), "ECONNREFUSED", "{report}");
    }
    assert!(
        server.events("accepted").is_empty(),
        "the application saw a connection"
    );
    assert_eq!(decisions(&scene.agent1, "refused_by_policy")?, 2);
    for path in ["hbone", "direct"] {
        let fields = [
            ("src.workload", "intruder"),
            ("policy", "demo/no-intruders"),
            ("path", path),
        ];
        let line = scene.agent1.wait_for_access(log, &fields, SOON)?;
        assert!(
            line.field("error")
                .is_some_and(|error| error.starts_with("policy denies")),
            "{line:?}"
        );
    }
    let denied = [
        "response_flags=\"DENY\"",
        "source_principal=\"spiffe://cluster.local/ns/demo/sa/intruder\"",
        "reporter=\"source\"",
    ];
    wait_until(SOON, "all three refusals to be counted", || {
        let agent = &scene.agent1;
        let failed = agent.metric("istio_tcp_connections_failed_total", &denied)?;
        Ok((failed == 3.0).then_some(()))
    })
}

#[test]
fn twin_with_denials_ignored_the_denied_pod_is_answered() -> Result<()> {
    let (reports, _server) = intrude(&Scene::without("deny-allows")?)?;
    assert!(
        answered(&reports[1]) && answered(&reports[2]),
        "{reports:?}"
    );
    Ok(())
}

#[test]
fn twin_without_policy_the_denied_pod_is_answered_at_once() -> Result<()> {
    let (reports, _server) = intrude(&Scene::without("skip-policy")?)?;
    assert!(answered(&reports[0]), "{reports:?}");
    Ok(())
}

#[test]
fn a_pair_without_a_verdict_is_not_admitted_directly() -> Result<()> {
    let scene = Scene::new()?;
    let (reports, server) = intrude(&scene)?;
    assert!(!answered(&reports[0]), "{}", reports[0]);
    assert!(server.events("accepted").is_empty());
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    assert_eq!(
        decisions(&scene.agent1, "direct")?,
        0,
        "the first connection of a pair is the agent's"
    );
    assert_eq!(decisions(&scene.agent1, "steered_unknown_verdict")?, 2);
    Ok(())
}

#[test]
fn twin_with_unknown_verdicts_allowed_the_first_connection_is_admitted() -> Result<()> {
    let scene = Scene::without("unknown-verdict-allows")?;
    let (reports, _server) = intrude(&scene)?;
    assert!(answered(&reports[0]), "{}", reports[0]);
    assert!(decisions(&scene.agent1, "admitted_direct")? >= 1);
    Ok(())
}

/// Leaves no room for a verdict.
fn fill_verdicts(scene: &Scene) -> Result<()> {
    // Verdicts that are void would be swept.
    let address = match scene.intruder.address() {
        std::net::IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(address) => address.octets(),
    };
    let endpoints = table::<Address, Endpoint>(&scene.node1, "ENDPOINTS")?;
    let endpoint = endpoints.get(&address, 0)?;
    let denial = Verdict {
        generation: endpoint.generation,
        action: action::DENY,
        policy: 0,
    };
    let key = |number: u64| VerdictKey {
        source: u32::MAX - number as u32,
        workload: endpoint.workload,
        port: 1,
        scope: 0,
        padding: 0,
    };
    fill(&scene.node1, "VERDICTS", 0, key, denial).map(drop)
}

#[test]
fn without_room_for_verdicts_every_connection_is_judged_by_the_agent() -> Result<()> {
    let scene = Scene::new()?;
    fill_verdicts(&scene)?;
    let (reports, server) = intrude(&scene)?;
    assert!(
        reports.iter().all(|report| !answered(report)),
        "{reports:?}"
    );
    assert!(server.events("accepted").is_empty());
    let log = scene.agent1.log().mark();
    for _ in 0..3 {
        assert!(answered(&echo(&scene.client, &scene.server_a)?));
        scene.agent1.wait_for_access(
            log,
            &[("src.workload", "client"), ("path", "hbone")],
            SOON,
        )?;
    }
    assert_eq!(decisions(&scene.agent1, "direct")?, 0);
    assert!(scene.agent1.log().contains("a verdict could not be cached"));
    Ok(())
}

#[test]
fn twin_without_room_for_verdicts_the_denied_pod_is_admitted_when_none_is_needed() -> Result<()> {
    // Without the sweep too: it would cut what it finds open.
    let scene = Scene::without("unknown-verdict-allows,skip-sweep")?;
    fill_verdicts(&scene)?;
    let (reports, server) = intrude(&scene)?;
    assert!(reports.iter().all(answered), "{reports:?}");
    server.wait_for_event("accepted", SOON)?;
    Ok(())
}

/// A pod with an identity that the mesh does not know (yet), and a client of it.
fn reach_an_unknown_pod(scene: &Scene) -> Result<(Vec<Value>, Proc)> {
    let unknown = scene.node1.pod("unknown")?;
    scene
        .agent1
        .enrol(&unknown, "unknown-uid", NAMESPACE, "unknown", "unknown")?;
    let server = serve(&unknown, "echo")?;
    let outsider = scene.node1.pod("outsider")?;
    let mut reports = Vec::new();
    for client in [&scene.client, &outsider] {
        reports.push(connect(
            client,
            &unknown,
            &["--send", "hello", "--read", "5"],
        )?);
    }
    Ok((reports, server))
}

#[test]
fn what_a_pod_serves_that_the_mesh_does_not_know_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let (reports, server) = reach_an_unknown_pod(&scene)?;
    assert!(
        reports.iter().all(|report| !answered(report)),
        "{reports:?}"
    );
    assert!(server.events("accepted").is_empty());
    Ok(())
}

#[test]
fn twin_without_policy_an_unknown_pod_is_reached() -> Result<()> {
    let (reports, _server) = reach_an_unknown_pod(&Scene::without("skip-policy")?)?;
    assert!(reports.iter().all(answered), "{reports:?}");
    Ok(())
}
