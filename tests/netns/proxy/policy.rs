//! Connections that policy denies: reset before the application reads a byte.

use super::access::{accepted_from, wait_for_failure};
use anyhow::Result;
use culvert_harness::{Agent, Node, Pod, Policy};
use culvert_tests::scene::{SOON, Scene, Setting, answered, echo, only, serve, strict, text};

/// Drives one connection and tells whether the word came back. Nothing of a refused one may have come to the application.
fn gets_through(from: &Pod, to: &Pod) -> Result<bool> {
    let server = serve(to, "echo")?;
    let report = echo(from, to)?;
    let through = answered(&report);
    if !through {
        assert!(
            ["ECONNRESET", "EPIPE", "ECONNREFUSED"].iter().any(|error| {
                [
                    text(&report, "connect"),
                    text(&report, "send"),
                    text(&report, "read"),
                ]
                .contains(error)
            }),
            "{report}"
        );
        assert_ne!(text(&report, "read"), "EOF", "refused, not ended: {report}");
    }
    let from = format!("{}:", from.address());
    let accepted = accepted_from(&server, to)?;
    assert_eq!(
        accepted.iter().any(|peer| peer.starts_with(&from)),
        through,
        "{report}\n{accepted:?}"
    );
    assert_eq!(accepted.len(), usize::from(through), "{accepted:?}");
    Ok(through)
}

fn intruder_crosses(knobs: &'static str) -> Result<bool> {
    let scene = Scene::without(knobs)?;
    let marks = [scene.agent1.log().mark(), scene.agent2()?.log().mark()];
    let through = gets_through(&scene.intruder, scene.server_b()?)?;
    if !through {
        // The client's agent learns no more than that it was denied; the server's knows why.
        let reasons = ["answered CONNECT with 401", "policy denies"];
        for ((agent, mark), reason) in [&scene.agent1, scene.agent2()?]
            .into_iter()
            .zip(marks)
            .zip(reasons)
        {
            let line = wait_for_failure(
                agent,
                mark,
                reason,
                &[("src.workload", "intruder"), ("dst.workload", "server-b")],
            )?;
            assert_eq!(line.field("path").as_deref(), Some("hbone"), "{line:?}");
            assert_eq!(line.field("bytes_sent").as_deref(), Some("0"), "{line:?}");
        }
    }
    Ok(through)
}

#[test]
fn a_denied_pod_of_another_node_is_refused() -> Result<()> {
    assert!(!intruder_crosses("")?);
    Ok(())
}

#[test]
fn twin_a_denied_pod_of_another_node_gets_through_when_policy_is_not_asked() -> Result<()> {
    assert!(intruder_crosses("skip-policy")?);
    Ok(())
}

#[test]
fn the_policy_that_denied_is_named() -> Result<()> {
    let deny = Policy::deny("demo", "not-the-intruder").when(culvert_harness::Match::principal(
        &culvert_tests::scene::principal("intruder"),
    ));
    let scene = Scene::with(Setting {
        policies: Some(vec![deny]),
        ..Setting::default()
    })?;
    let mark = scene.agent2()?.log().mark();
    assert!(!gets_through(&scene.intruder, scene.server_b()?)?);
    let line = wait_for_failure(scene.agent2()?, mark, "policy denies", &[])?;
    assert!(line.text.contains("demo/not-the-intruder"), "{line:?}");
    Ok(())
}

/// A pod that nobody enrolled connects to a pod of the mesh.
fn outsider_gets_through(
    knobs: &'static str,
    policies: Vec<Policy>,
    place: fn(&Scene) -> Result<(&Node, &Pod, &Agent)>,
) -> Result<bool> {
    let scene = Scene::with(Setting {
        knobs,
        policies: Some(policies),
        ..Setting::default()
    })?;
    let (node, to, agent) = place(&scene)?;
    let outsider = node.pod("outsider")?;
    let mark = agent.log().mark();
    let through = gets_through(&outsider, to)?;
    let line = if through {
        agent.wait_for_access(
            mark,
            &[("path", "plaintext"), ("dst.workload", to.name())],
            SOON,
        )?
    } else {
        wait_for_failure(
            agent,
            mark,
            "policy denies",
            &[("path", "plaintext"), ("dst.workload", to.name())],
        )?
    };
    assert!(
        line.field("src.addr")
            .is_some_and(|from| from.starts_with(&outsider.address().to_string())),
        "{line:?}"
    );
    Ok(through)
}

fn same_node(scene: &Scene) -> Result<(&Node, &Pod, &Agent)> {
    Ok((&scene.node1, &scene.server_a, &scene.agent1))
}

fn other_node(scene: &Scene) -> Result<(&Node, &Pod, &Agent)> {
    Ok((&scene.node1, scene.server_b()?, scene.agent2()?))
}

#[test]
fn plaintext_to_a_strict_pod_is_refused() -> Result<()> {
    assert!(!outsider_gets_through("", vec![strict()], same_node)?);
    assert!(!outsider_gets_through("", vec![strict()], other_node)?);
    Ok(())
}

#[test]
fn twin_plaintext_to_a_strict_pod_gets_through_when_policy_is_not_asked() -> Result<()> {
    assert!(outsider_gets_through(
        "skip-policy",
        vec![strict()],
        same_node
    )?);
    assert!(outsider_gets_through(
        "skip-policy",
        vec![strict()],
        other_node
    )?);
    Ok(())
}

#[test]
fn a_pod_that_is_not_enrolled_is_nobody_to_a_policy() -> Result<()> {
    assert!(!outsider_gets_through("", vec![only("client")], same_node)?);
    assert!(!outsider_gets_through(
        "",
        vec![only("client")],
        other_node
    )?);
    Ok(())
}

#[test]
fn twin_a_pod_that_is_not_enrolled_gets_through_when_policy_is_not_asked() -> Result<()> {
    assert!(outsider_gets_through(
        "skip-policy",
        vec![only("client")],
        same_node
    )?);
    assert!(outsider_gets_through(
        "skip-policy",
        vec![only("client")],
        other_node
    )?);
    Ok(())
}

#[test]
fn without_policy_plaintext_is_admitted_and_shows_the_clients_address() -> Result<()> {
    assert!(outsider_gets_through("", vec![], same_node)?);
    assert!(outsider_gets_through("", vec![], other_node)?);
    Ok(())
}
