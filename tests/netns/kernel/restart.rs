//! A new agent takes the pods of a killed one back, and binds open flows to the policy that it finds.

use anyhow::{Context as _, Result};
use culvert_harness::{Agent, AgentOptions, Node, Pod, Policy, Proc};
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, Setting, answered, connect, echo, hold, only, serve, text,
};
use serde_json::Value;

use crate::agent_gone::goes_on;

/// What `culvert pod list` says.
pub fn listed(agent: &Agent) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(
        &agent.cli(["pod", "list", "--json"])?.success()?,
    )?)
}

/// What it says of one pod.
pub fn entry(agent: &Agent, uid: &str) -> Result<Value> {
    let found = listed(agent)?.into_iter().find(|pod| pod["uid"] == uid);
    found.with_context(|| format!("{uid} is not listed"))
}

/// A new agent on a node, not necessarily ready.
pub fn start(node: &Node, knobs: &str) -> Result<Agent> {
    let mut options = AgentOptions::default();
    if !knobs.is_empty() {
        let knobs = knobs.to_owned();
        options.env.insert("CULVERT_TEST_KNOBS".to_owned(), knobs);
    }
    node.start_agent(options)
}

fn both() -> Vec<Policy> {
    let intruder = Policy {
        name: "the-intruder-too".into(),
        ..only("intruder")
    };
    vec![only("client"), intruder]
}

/// Two direct flows outlive their agent, and before the next one starts the intruder's is forbidden.
struct Stage {
    scene: Scene,
    agent: Agent,
    client: Proc,
    intruder: Proc,
    _servers: (Proc, Proc),
}

fn forbidden_meanwhile(knobs: &'static str) -> Result<Stage> {
    let scene = Scene::with(Setting {
        knobs,
        policies: Some(both()),
        ..Setting::default()
    })?;
    let servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    let open = |pod: &Pod| -> Result<Proc> {
        scene.warm(pod, &scene.server_a)?;
        let held = hold(pod, &scene.server_a)?;
        goes_on(&held, "before")?;
        Ok(held)
    };
    let (client, intruder) = (open(&scene.client)?, open(&scene.intruder)?);
    scene.agent1.kill()?;
    let mut mesh = scene.mesh.clone();
    mesh.policies = vec![only("client")];
    mesh.write(&scene.mesh_file())?;
    goes_on(&intruder, "nobody is there to cut it")?;
    let agent = start(&scene.node1, knobs)?;
    agent.ready()?;
    Ok(Stage {
        scene,
        agent,
        client,
        intruder,
        _servers: servers,
    })
}

#[test]
fn a_restarted_agent_serves_its_pods_and_cuts_what_is_forbidden_by_now() -> Result<()> {
    let stage = forbidden_meanwhile("")?;
    let (scene, agent) = (&stage.scene, &stage.agent);
    let pods = listed(agent)?;
    assert_eq!(pods.len(), 3, "{pods:?}");
    assert!(pods.iter().all(|pod| pod["state"] == "active"), "{pods:?}");
    let end = stage.intruder.wait_for_event("end", SOON)?;
    assert!(
        ["ECONNRESET", "ECONNABORTED"].contains(&text(&end, "how")),
        "{end}"
    );
    for _ in 0..2 {
        for server in [&scene.server_a, scene.server_b()?] {
            let report = echo(&scene.client, server)?;
            assert!(answered(&report), "{report}");
            assert!(!answered(&echo(&scene.intruder, server)?));
        }
    }
    goes_on(&stage.client, "all the time")
}

#[test]
fn twin_without_the_sweep_a_flow_forbidden_meanwhile_goes_on() -> Result<()> {
    let stage = forbidden_meanwhile("skip-sweep")?;
    assert!(!answered(&echo(
        &stage.scene.intruder,
        &stage.scene.server_a
    )?));
    goes_on(&stage.intruder, "after")
}

#[test]
fn a_pod_at_another_address_than_its_workload_s_is_refused() -> Result<()> {
    let mut scene = Scene::new()?;
    let stray = scene.node1.pod("stray")?;
    let mut workload = culvert_harness::Workload::of_pod(&stray, NAMESPACE, "stray");
    workload.workload_ips = vec!["10.77.9.99".to_owned()];
    scene.change_mesh(|mesh| mesh.workloads.push(workload.clone()))?;
    let error = scene.agent1.enrol_as(&stray, &workload).unwrap_err();
    let error = format!("{error:#}");
    let own = stray.address().to_string();
    for part in [workload.uid.as_str(), "10.77.9.99", &own] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert_eq!(listed(&scene.agent1)?.len(), 3);
    Ok(())
}

/// A pod that the mesh does not know configures the address of `server-b`, before the agent starts anew. Returns what the
/// new agent says of it.
fn takes_an_address(changes: &[&str]) -> Result<(Scene, Agent, Pod, Value)> {
    let scene = Scene::new()?;
    let guest = scene.node1.pod("guest")?;
    scene
        .agent1
        .enrol(&guest, "guest-uid", NAMESPACE, "guest", "guest")?;
    let first = entry(&scene.agent1, "guest-uid")?["addresses"].clone();
    assert_eq!(first[0], guest.address().to_string());
    let (own, foreign) = (
        guest.address().to_string(),
        scene.server_b()?.address().to_string(),
    );
    for change in changes {
        let line = change.replace("OWN", &own).replace("FOREIGN", &foreign);
        let ip = guest.command("ip").args(line.split(' '));
        ip.run(SOON)?.success()?;
    }
    scene.agent1.kill()?;
    let agent = start(&scene.node1, "")?;
    culvert_harness::wait_until(SOON, "an answer", || {
        Ok(agent.get(15021, "/healthz/ready").ok())
    })?;
    let entry = entry(&agent, "guest-uid")?;
    assert_eq!(entry["addresses"], first, "{entry}");
    Ok((scene, agent, guest, entry))
}

#[test]
fn an_address_that_a_pod_adds_does_not_become_its_own() -> Result<()> {
    for changes in [
        "address add FOREIGN/32 dev lo",
        "address add FOREIGN/16 dev eth0",
    ] {
        let (scene, _agent, guest, entry) = takes_an_address(&[changes])?;
        assert_eq!(entry["state"], "active", "{entry}");
        // It answers for the address on the link; what the mesh carries to that address is not for it.
        let server = serve(&guest, "collect")?;
        let say = [
            "--send",
            "for-server-b-only",
            "--half-close",
            "--timeout-ms",
            "1500",
        ];
        connect(&scene.client, scene.server_b()?, &say)?;
        let accepted = server.events("accepted");
        assert!(accepted.is_empty(), "{accepted:?}");
    }
    Ok(())
}

#[test]
fn a_pod_that_puts_another_address_before_its_own_keeps_its_own() -> Result<()> {
    let changes = [
        "address del OWN/16 dev eth0",
        "address add FOREIGN/16 dev eth0",
        "address add OWN/16 dev eth0",
    ];
    let (_scene, _agent, _guest, entry) = takes_an_address(&changes)?;
    assert_eq!(entry["state"], "active", "{entry}");
    Ok(())
}

#[test]
fn a_pod_that_trades_its_address_for_another_waits() -> Result<()> {
    let changes = [
        "address del OWN/16 dev eth0",
        "address add FOREIGN/16 dev eth0",
    ];
    let (scene, agent, guest, entry) = takes_an_address(&changes)?;
    assert_eq!(entry["state"], "pending", "{entry}");
    for address in [guest.address(), scene.server_b()?.address()] {
        let reason = text(&entry, "reason");
        assert!(reason.contains(&address.to_string()), "{entry}");
    }
    let ready = agent.get(15021, "/healthz/ready")?;
    assert_eq!(ready.status, 500, "{}", ready.body);
    assert!(ready.body.contains("guest-uid"), "{}", ready.body);
    Ok(())
}
