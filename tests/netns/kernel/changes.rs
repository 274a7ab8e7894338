//! Changes of policy and what they leave as it was: seen whole or not at all, verdicts given again before anybody asks, and
//! policies that are referred to but not there.

use anyhow::Result;
use culvert_abi::{Address, Endpoint, Verdict, VerdictKey, action};
use culvert_harness::{Match, Pod, Policy, Proc, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, echo, only, principal, serve, text,
};
use serde_json::Value;

use crate::{
    kernel_tables::{decisions, steered, table},
    restart::start,
};

/// Policies that let the client reach exactly one of two servers.
fn reach(first: bool) -> Vec<Policy> {
    let servers = [("server-a", first), ("intruder", !first)];
    servers
        .map(|(server, open)| {
            let account = if open { "client" } else { "nobody" };
            Policy::allow(NAMESPACE, &format!("to-{server}"))
                .selector()
                .when(Match::principal(&principal(account)))
        })
        .into()
}

/// Two servers on one node, of which policy allows the first.
fn two_servers() -> Result<(Scene, [Proc; 2])> {
    let mut scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let once = ["serve", "--port", "7000", "--mode", "once", "--quiet"];
    let mut servers = Vec::new();
    for pod in [&scene.server_a, &scene.intruder] {
        let server = pod.probe()?.args(once).spawn()?;
        server.wait_for_line("listening", SOON)?;
        servers.push(server);
    }
    scene.change_mesh(|mesh| {
        mesh.policies = reach(true);
        for name in ["server-a", "intruder"] {
            let policy = format!("{NAMESPACE}/to-{name}");
            let workload = mesh.workload(name).expect("a workload");
            workload.authorization_policies = vec![policy];
        }
    })?;
    Ok((scene, servers.try_into().expect("two")))
}

const FLIPS: usize = 200;

// Heavy: two hundred changes.
#[test]
fn a_change_of_two_policies_is_seen_whole_or_not_at_all() -> Result<()> {
    let (mut scene, _servers) = two_servers()?;
    let (first, second) = (scene.server_a.at(PORT), scene.intruder.at(PORT));
    let words = ["alternate", "--first", &first, "--second", &second];
    let client = scene.client.probe()?.args(words).stdin().spawn()?;
    wait_until(SOON, "the first policy", || {
        let seen = client.events("policy");
        Ok(seen.iter().any(|event| event["number"] == 1).then_some(()))
    })?;
    // Between two changes the client has seen the effect of the one before: from then on it may not see what was.
    for flip in 1..=FLIPS {
        let number = if flip % 2 == 0 { 1 } else { 2 };
        let mark = client.log().mark();
        scene.mesh.policies = reach(number == 1);
        scene.mesh.write(&scene.mesh_file())?;
        let seen = client.wait_for_event_after(mark, "policy", SOON)?;
        assert_eq!(seen["number"], number, "{flip}: {seen}");
    }
    client.close_stdin();
    let done = client.wait_for_event("done", SOON)?;
    // What ended without an answer or an error says nothing about policy; nearly all must say something.
    let odd = client.events("odd");
    assert!(odd.len() <= FLIPS / 10, "{done}: {odd:?}");
    let seen = client.events("policy");
    assert_eq!(seen.len(), FLIPS + 1, "a change was seen twice: {seen:?}");
    Ok(())
}

/// Waits until a verdict of the server's present generation is there for everybody who has asked.
fn wait_for_verdicts(scene: &Scene, server: &Pod, sources: usize) -> Result<()> {
    let std::net::IpAddr::V4(address) = server.address() else {
        panic!("IPv4")
    };
    let address = address.to_ipv6_mapped().octets();
    wait_until(SOON, "verdicts of the present generation", || {
        let endpoint = table::<Address, Endpoint>(&scene.node1, "ENDPOINTS")?.get(&address, 0)?;
        let verdicts = table::<VerdictKey, Verdict>(&scene.node1, "VERDICTS")?;
        let current = verdicts.iter().flatten().filter(|(key, verdict)| {
            key.workload == endpoint.workload && verdict.generation == endpoint.generation
        });
        Ok((current.count() >= sources).then_some(()))
    })
}

/// The allowed and the denied pod connect; neither needs the agent.
fn decided_at_once(scene: &Scene) -> Result<()> {
    let (before, refused) = (
        steered(&scene.agent1)?,
        decisions(&scene.agent1, "refused_by_policy")?,
    );
    for _ in 0..3 {
        assert!(answered(&echo(&scene.client, &scene.server_a)?));
        let report = echo(&scene.intruder, &scene.server_a)?;
        assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    }
    assert_eq!(steered(&scene.agent1)?, before);
    let agent = &scene.agent1;
    assert_eq!(decisions(agent, "refused_by_policy")?, refused + 3);
    Ok(())
}

#[test]
fn known_pairs_are_decided_again_before_they_ask() -> Result<()> {
    let mut scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    for pod in [&scene.client, &scene.intruder] {
        scene.warm(pod, &scene.server_a)?;
    }
    decided_at_once(&scene)?;
    for number in 0..3 {
        let generation = generation(&scene)?;
        let more = Policy {
            name: format!("more-{number}"),
            ..only(&format!("somebody-{number}"))
        };
        scene.change_mesh(|mesh| mesh.policies.push(more))?;
        wait_until(SOON, "the change to bind", || {
            Ok((self::generation(&scene)? != generation).then_some(()))
        })?;
        wait_for_verdicts(&scene, &scene.server_a, 2)?;
        decided_at_once(&scene)?;
    }
    // After a restart the numbers are others, and the pairs the same.
    scene.agent1.kill()?;
    scene.agent1 = start(&scene.node1, "")?;
    scene.agent1.ready()?;
    wait_for_verdicts(&scene, &scene.server_a, 2)?;
    decided_at_once(&scene)
}

fn generation(scene: &Scene) -> Result<u64> {
    let std::net::IpAddr::V4(address) = scene.server_a.address() else {
        panic!("IPv4")
    };
    let key = address.to_ipv6_mapped().octets();
    let endpoints = table::<Address, Endpoint>(&scene.node1, "ENDPOINTS")?;
    Ok(endpoints.get(&key, 0)?.generation)
}

#[test]
fn a_verdict_that_is_given_again_is_the_new_one() -> Result<()> {
    let mut scene = Scene::new()?;
    let server = serve(&scene.server_a, "echo")?;
    for pod in [&scene.client, &scene.intruder] {
        scene.warm(pod, &scene.server_a)?;
    }
    let before = generation(&scene)?;
    scene.change_mesh(|mesh| mesh.policies = vec![only("intruder")])?;
    wait_until(SOON, "the change to bind", || {
        Ok((generation(&scene)? != before).then_some(()))
    })?;
    wait_for_verdicts(&scene, &scene.server_a, 2)?;
    let agent = &scene.agent1;
    let asked = steered(agent)?;
    let accepted = server.events("accepted").len();
    for _ in 0..2 {
        let report = echo(&scene.client, &scene.server_a)?;
        assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
        assert!(answered(&echo(&scene.intruder, &scene.server_a)?));
    }
    assert_eq!(steered(agent)?, asked);
    wait_until(SOON, "the server to accept both", || {
        let more = server.events("accepted").len() - accepted;
        Ok((more >= 2).then_some(()))
    })?;
    assert_eq!(server.events("accepted").len(), accepted + 2);
    let verdicts = table::<VerdictKey, Verdict>(&scene.node1, "VERDICTS")?;
    let allowed = verdicts.iter().flatten();
    let allowed = allowed.filter(|(_, verdict)| verdict.action == action::ALLOW);
    assert_eq!(allowed.count(), 1);
    Ok(())
}

/// The server's workload refers to a policy that nobody has sent.
fn with_a_missing_policy(knobs: &'static str) -> Result<(Scene, Vec<Value>, Proc)> {
    let mut scene = Scene::without(knobs)?;
    scene.change_mesh(|mesh| {
        let server = mesh.workload("server-a").expect("a workload");
        server.authorization_policies = vec![format!("{NAMESPACE}/not-there-yet")];
    })?;
    let server = serve(&scene.server_a, "echo")?;
    let reports = (0..3)
        .map(|_| echo(&scene.client, &scene.server_a))
        .collect::<Result<_>>()?;
    Ok((scene, reports, server))
}

#[test]
fn a_policy_that_is_referred_to_but_not_there_refuses_everybody() -> Result<()> {
    let (mut scene, reports, server) = with_a_missing_policy("")?;
    assert!(!reports.iter().any(answered), "{reports:?}");
    // By the agent at first, then by the kernel part.
    for report in &reports[1..] {
        assert_eq!(text(report, "connect"), "ECONNREFUSED", "{report}");
    }
    assert_eq!(decisions(&scene.agent1, "refused_by_policy")?, 2);
    assert!(server.events("accepted").is_empty());
    // When it comes, it decides.
    let policy = Policy {
        name: "not-there-yet".into(),
        ..only("client").selector()
    };
    scene.change_mesh(|mesh| mesh.policies.push(policy))?;
    wait_until(SOON, "the policy to be obeyed", || {
        Ok(answered(&echo(&scene.client, &scene.server_a)?).then_some(()))
    })
}

#[test]
fn twin_with_denials_ignored_a_missing_policy_refuses_nobody() -> Result<()> {
    let (_scene, reports, _server) = with_a_missing_policy("skip-policy,deny-allows")?;
    assert!(reports.iter().all(answered), "{reports:?}");
    Ok(())
}
