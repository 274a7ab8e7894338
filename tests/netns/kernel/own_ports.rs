//! The agent's ports inside a pod: nobody reaches them from outside, and nobody takes them over.

use anyhow::Result;
use culvert_harness::Proc;
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, answered, connect_to, serve_on, text, was_reset,
};
use serde_json::Value;

use crate::kernel_tables::decisions;

const OWN: [u16; 2] = [15001, 15006];

/// SYNs to the agent's ports in a pod: from a pod that is not enrolled, and by hand from one that is.
fn knock(scene: &Scene) -> Result<Vec<(u16, Value, Value)>> {
    let outsider = scene.node1.pod("outsider")?;
    let mut outcomes = Vec::new();
    for port in OWN {
        let to = scene.server_a.at(port);
        let plain = connect_to(&outsider, &to, &[])?;
        let source = scene.intruder.at(41000 + port % 100);
        let arguments = [
            "raw-handshake",
            "--src",
            &source,
            "--dst",
            &to,
            "--seq",
            "99",
            "--wait-ms",
            "300",
        ];
        outcomes.push((
            port,
            plain,
            scene.intruder.probe()?.args(arguments).run(SOON)?.json()?,
        ));
    }
    Ok(outcomes)
}

#[test]
fn a_syn_from_outside_to_a_port_of_the_agent_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    for (port, plain, raw) in knock(&scene)? {
        assert_eq!(text(&plain, "connect"), "ECONNREFUSED", "{port}: {plain}");
        assert_eq!(
            (&raw["syn_ack"], &raw["rst"]),
            (&false.into(), &true.into()),
            "{port}: {raw}"
        );
    }
    assert!(decisions(&scene.agent1, "dropped_own_port")? >= 4);
    Ok(())
}

#[test]
fn twin_with_own_ports_passed_a_syn_from_outside_is_accepted() -> Result<()> {
    for (port, plain, raw) in knock(&Scene::without("pass-own-ports")?)? {
        // The agent's own check comes after: it resets what it has accepted.
        assert!(
            ["ok", "ECONNRESET"].contains(&text(&plain, "connect")),
            "{port}: {plain}"
        );
        assert_eq!(raw["syn_ack"], true, "{port}: {raw}");
    }
    Ok(())
}

#[test]
fn the_agent_resets_its_own_pod_that_talks_to_its_ports() -> Result<()> {
    let scene = Scene::new()?;
    for port in OWN {
        for to in [format!("127.0.0.1:{port}"), scene.client.at(port)] {
            let report = connect_to(&scene.client, &to, &["--read", "1"])?;
            assert!(was_reset(&report), "{to}: {report}");
        }
        // Through its own agent, which knows what these ports are.
        let report = connect_to(&scene.client, &scene.server_a.at(port), &["--read", "1"])?;
        assert!(was_reset(&report), "{report}");
    }
    Ok(())
}

#[test]
fn a_process_cannot_listen_on_a_port_of_the_agent() -> Result<()> {
    let scene = Scene::new()?;
    for port in ["15001", "15006", "15008"] {
        let outcome = scene
            .server_a
            .probe()?
            .args(["serve", "--port", port])
            .run(SOON)?;
        assert!(!outcome.status.success());
        assert!(outcome.stderr.contains("in use"), "{}", outcome.stderr);
    }
    Ok(())
}

/// A pod whose `port` was taken before it was enrolled.
fn enrol_with_a_taken_port(scene: &Scene, port: u16) -> Result<(String, Proc)> {
    let name = format!("early-{port}");
    let pod = scene.node1.pod(&name)?;
    let squatter = serve_on(&pod, "echo", port)?;
    let error = scene
        .agent1
        .enrol(&pod, &name, NAMESPACE, &name, &name)
        .unwrap_err();
    assert!(answered(&connect_to(
        &pod,
        &format!("127.0.0.1:{port}"),
        &["--send", "hello", "--read", "5"]
    )?));
    let rules = pod.command("ip").args(["rule"]).run(SOON)?.success()?;
    assert!(
        !rules.contains("fwmark"),
        "a pod that was not enrolled keeps no rules: {rules}"
    );
    Ok((format!("{error:#}"), squatter))
}

#[test]
fn a_port_that_was_taken_before_enrolment_is_named() -> Result<()> {
    let scene = Scene::new()?;
    for port in [15001, 15006, 15008] {
        let (error, _squatter) = enrol_with_a_taken_port(&scene, port)?;
        assert!(
            error.contains(&format!("port {port} of the pod is taken")),
            "{error}"
        );
        assert!(error.contains("15001, 15006 and 15008"), "{error}");
    }
    Ok(())
}
