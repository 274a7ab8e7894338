//! A pod that takes all it can get, of claims, verdicts, flows or connections: it harms only itself.

use anyhow::Result;
use culvert_abi::{CLAIMS_PER_POD, Claim, FLOWS_PER_POD, Quota, Verdict, VerdictKey};
use culvert_harness::{Pod, Proc, Workload, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect, echo, hold, serve, serve_on, text,
    unplug,
};

use crate::{
    agent_gone::goes_on,
    kernel_tables::{
        claims, decisions, fill, flows, nobodys_flow, quota_of, quotas, steered, table,
        wait_for_no_claims,
    },
};

/// A scene in which everybody may, and one pod will.
fn with_a_glutton(knobs: &'static str) -> Result<(Scene, Pod)> {
    let mut scene = Scene::with(Setting {
        knobs,
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let glutton = enrolled(&mut scene, "glutton")?;
    Ok((scene, glutton))
}

fn enrolled(scene: &mut Scene, name: &str) -> Result<Pod> {
    let pod = scene.node1.pod(name)?;
    let workload = Workload::of_pod(&pod, NAMESPACE, name);
    scene.agent1.enrol_as(&pod, &workload)?;
    scene.change_mesh(|mesh| mesh.workloads.push(workload))?;
    Ok(pod)
}

/// Another pod's connections are answered, and none of them needs the agent.
fn is_unharmed(scene: &Scene) -> Result<()> {
    let before = steered(&scene.agent1)?;
    for _ in 0..5 {
        let report = echo(&scene.client, &scene.server_a)?;
        assert!(answered(&report), "{report}");
    }
    assert_eq!(steered(&scene.agent1)?, before, "direct all the while");
    Ok(())
}

/// More connects in the making than a pod may have.
const CONNECTS: i64 = CLAIMS_PER_POD + 1000;

/// The glutton connects to a pod that has lost its link, while the table has room for less than it wants, but for more than its
/// share. Returns how many claims it has.
fn fill_claims(scene: &Scene, glutton: &Pod) -> Result<(usize, Proc)> {
    let silent = &scene.intruder;
    let server = serve(silent, "echo")?;
    scene.warm(glutton, silent)?;
    drop(server);
    scene.warm(&scene.client, &scene.server_a)?;
    wait_for_no_claims(&scene.node1)?;
    unplug(silent)?;
    let claim = Claim {
        client_netns: u64::MAX,
        server_netns: u64::MAX,
        generation: 0,
        opened_ns: 0,
        socket_cookie: 0,
        chosen: [0; 16],
        kind: 0,
        sequence: 0,
        workload: 0,
        source_identity: 0,
        source_pod: 0,
        admitted: 0,
        service: 0,
        reason: 0,
        chosen_port: 0,
        padding: 0,
        quota: 0,
    };
    let room = (CLAIMS_PER_POD + 500) as usize;
    fill(&scene.node1, "CLAIMS", room, nobodys_flow, claim)?;
    let (to, count) = (silent.at(PORT), CONNECTS.to_string());
    let burst = ["burst", "--to", &to, "--count", &count];
    let burst = glutton.probe()?.args(burst).stdin().spawn()?;
    let begun = burst.wait_for_event("begun", SOON)?;
    assert_eq!(begun["pending"], CONNECTS, "{begun}");
    let cookie = glutton.netns().cookie()?;
    let all = claims(&scene.node1)?;
    let own = all.iter().filter(|(_, claim)| claim.client_netns == cookie);
    Ok((own.count(), burst))
}

#[test]
fn a_pod_that_fills_claims_fills_only_its_share() -> Result<()> {
    let (scene, glutton) = with_a_glutton("")?;
    let _server = serve(&scene.server_a, "echo")?;
    let (taken, _burst) = fill_claims(&scene, &glutton)?;
    assert_eq!(taken as i64, CLAIMS_PER_POD);
    assert!(decisions(&scene.agent1, "claim_quota")? >= 1000);
    assert_eq!(decisions(&scene.agent1, "claim_map_full")?, 0);
    is_unharmed(&scene)
}

#[test]
fn twin_without_quotas_a_pod_takes_every_claim() -> Result<()> {
    let (scene, glutton) = with_a_glutton("skip-quotas")?;
    let _server = serve(&scene.server_a, "echo")?;
    let (taken, _burst) = fill_claims(&scene, &glutton)?;
    assert!(taken as i64 > CLAIMS_PER_POD, "{taken}");
    let report = echo(&scene.client, &scene.server_a)?;
    assert!(decisions(&scene.agent1, "claim_map_full")? > 0, "{report}");
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 0, "{report}");
    Ok(())
}

#[test]
fn claims_that_are_given_back_can_be_taken_again() -> Result<()> {
    let (scene, glutton) = with_a_glutton("")?;
    let _server = serve(&scene.server_a, "echo")?;
    let (_, burst) = fill_claims(&scene, &glutton)?;
    burst.close_stdin();
    burst.wait(SOON)?;
    let index = quota_of(&scene.node1, &glutton)?;
    wait_until(SOON, "the quota to be given back", || {
        let quota = quotas(&scene.node1)?.get(&index, 0)?;
        Ok((quota.claims == 0).then_some(()))
    })?;
    for _ in 0..2 {
        assert!(answered(&echo(&glutton, &scene.server_a)?));
    }
    assert!(decisions(&scene.agent1, "admitted_direct")? >= 1);
    Ok(())
}

/// What the agent remembers on behalf of one pod.
const VERDICTS_PER_POD: usize = 1024;

/// The glutton asks for more ports than there may be verdicts for; waits until those that are left are as many as `wanted` says.
fn ask_for_every_port(scene: &Scene, glutton: &Pod, wanted: impl Fn(usize) -> bool) -> Result<()> {
    for pod in [&scene.client, glutton] {
        scene.warm(pod, &scene.server_a)?;
    }
    let (ports, wait) = ((VERDICTS_PER_POD + 200).to_string(), "10000");
    let to = scene.server_a.at(10_000);
    let burst = ["burst", "--to", &to, "--count", &ports, "--ports", &ports];
    let burst = glutton.probe()?.args(burst).args(["--wait-ms", wait]);
    let burst = burst.stdin().spawn()?;
    burst.wait_for_event("open", SOON * 2)?;
    let pods = table::<u64, culvert_abi::Pod>(&scene.node1, "PODS")?;
    let identity = pods.get(&glutton.netns().cookie()?, 0)?.identity;
    let asked = decisions(&scene.agent1, "steered_unknown_verdict")?;
    assert!(asked >= (VERDICTS_PER_POD + 200) as u64, "{asked}");
    wait_until(SOON, "the verdicts to be as many as they may be", || {
        let verdicts = table::<VerdictKey, Verdict>(&scene.node1, "VERDICTS")?;
        let own = verdicts.keys().flatten();
        let own = own.filter(|key| key.source == identity).count();
        Ok(wanted(own).then_some(()))
    })
}

#[test]
fn a_pod_that_asks_for_every_port_pushes_out_only_its_own_verdicts() -> Result<()> {
    let (scene, glutton) = with_a_glutton("")?;
    let _server = serve(&scene.server_a, "echo")?;
    // Most of it is decided by now; what is not can only push out more of its own.
    ask_for_every_port(&scene, &glutton, |own| {
        // A walk through the table counts one that goes and the one that comes for it.
        assert!(own < VERDICTS_PER_POD + 20, "{own}");
        own >= VERDICTS_PER_POD
    })?;
    is_unharmed(&scene)
}

#[test]
fn twin_with_old_verdicts_kept_a_pod_has_one_for_every_port() -> Result<()> {
    let (scene, glutton) = with_a_glutton("keep-old-verdicts")?;
    let _server = serve(&scene.server_a, "echo")?;
    ask_for_every_port(&scene, &glutton, |own| own >= VERDICTS_PER_POD + 200)
}

/// The glutton has one flow fewer than it may have, and opens three.
fn one_flow_too_many(scene: &Scene, glutton: &Pod) -> Result<(Vec<Proc>, Proc)> {
    let server = serve(&scene.server_a, "echo")?;
    for pod in [&scene.client, glutton] {
        scene.warm(pod, &scene.server_a)?;
    }
    wait_until(SOON, "every flow to end", || {
        Ok(flows(&scene.node1)?.is_empty().then_some(()))
    })?;
    let index = quota_of(&scene.node1, glutton)?;
    let mut quotas = quotas(&scene.node1)?;
    let quota = quotas.get(&index, 0)?;
    let many = Quota {
        flows: FLOWS_PER_POD - 1,
        ..quota
    };
    quotas.set(index, many, 0)?;
    let mut held = Vec::new();
    for _ in 0..3 {
        let flow = hold(glutton, &scene.server_a)?;
        goes_on(&flow, "one more")?;
        held.push(flow);
    }
    Ok((held, server))
}

#[test]
fn a_pod_with_too_many_flows_gets_its_next_through_the_agent() -> Result<()> {
    let (scene, glutton) = with_a_glutton("")?;
    let (held, _server) = one_flow_too_many(&scene, &glutton)?;
    assert_eq!(flows(&scene.node1)?.len(), 1);
    assert_eq!(decisions(&scene.agent1, "steered_flow_quota")?, 2);
    is_unharmed(&scene)?;
    for flow in &held {
        goes_on(flow, "and on")?;
    }
    Ok(())
}

#[test]
fn twin_without_quotas_a_pod_has_any_number_of_flows() -> Result<()> {
    let (scene, glutton) = with_a_glutton("skip-quotas")?;
    let (_held, _server) = one_flow_too_many(&scene, &glutton)?;
    assert_eq!(flows(&scene.node1)?.len(), 3);
    assert_eq!(decisions(&scene.agent1, "steered_flow_quota")?, 0);
    Ok(())
}

// Heavy: thirty thousand connections.
#[test]
fn thirty_thousand_connections_of_one_pod_disturb_no_other() -> Result<()> {
    let (scene, glutton) = with_a_glutton("")?;
    let _server = serve(&scene.server_a, "echo")?;
    let once = ["serve", "--port", "7001", "--mode", "once", "--quiet"];
    let server = scene.server_a.probe()?.args(once).spawn()?;
    server.wait_for_line("listening", SOON)?;
    let to = scene.server_a.at(7001);
    let first = ["--send", "x", "--read", "1"];
    culvert_tests::scene::connect_to(&glutton, &to, &first)?;
    scene.warm(&scene.client, &scene.server_a)?;
    let load = ["conn", "--to", &to, "--count", "30000", "--threads", "4"];
    let load = glutton.probe()?.args(load).spawn()?;
    while load.status().is_none() {
        is_unharmed(&scene)?;
    }
    load.wait(SOON)?;
    let lines = load.log().lines();
    let report: serde_json::Value = serde_json::from_str(&lines.last().expect("a report").text)?;
    assert_eq!(report["errors"], 0, "{report}");
    assert_eq!(report["count"], 30_000, "{report}");
    for reason in ["claim_quota", "claim_map_full", "isolated_no_claim"] {
        assert_eq!(decisions(&scene.agent1, reason)?, 0, "{reason}");
    }
    wait_for_no_claims(&scene.node1)
}

#[test]
fn ten_thousand_workloads_and_a_thousand_policies_cost_no_look_up_more() -> Result<()> {
    let mut scene = Scene::new()?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve_on(&scene.server_a, "once", 7001)?,
    );
    scene.change_mesh(|mesh| {
        for number in 0..10_000_u32 {
            let name = format!("far-{number}");
            let address = format!("10.80.{}.{}", number / 250, number % 250 + 1);
            mesh.workloads.push(Workload {
                uid: name.clone(),
                name,
                namespace: NAMESPACE.into(),
                service_account: "far".into(),
                workload_ips: vec![address],
                protocol: "HBONE".into(),
                node: "far".into(),
                ..Workload::default()
            });
        }
        for number in 0..1000 {
            let mut policy = culvert_tests::scene::only(&format!("nobody-{number}"));
            policy.name = format!("only-nobody-{number}");
            mesh.policies.push(policy);
        }
    })?;
    for pod in [&scene.client, &scene.intruder] {
        let report = echo(pod, &scene.server_a)?;
        assert_eq!(answered(&report), pod.name() == "client", "{report}");
    }
    let to = scene.server_a.at(7001);
    culvert_tests::scene::connect_to(&scene.client, &to, &["--send", "x", "--read", "1"])?;
    let before = steered(&scene.agent1)?;
    let many = ["conn", "--to", &to, "--count", "2000", "--threads", "2"];
    let load = scene.client.probe()?.args(many).run(SOON)?.json()?;
    assert_eq!(load["errors"], 0, "{load}");
    let refused = connect(&scene.intruder, &scene.server_a, &[])?;
    assert_eq!(text(&refused, "connect"), "ECONNREFUSED", "{refused}");
    assert_eq!(steered(&scene.agent1)?, before);
    Ok(())
}
