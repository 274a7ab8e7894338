//! What a control plane may say that nobody expects: late, much, twice, or incomplete.

use std::time::Duration;

use anyhow::Result;
use culvert_harness::{Agent, AgentOptions, Service, Workload, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect_to, echo, mesh_status, serve, status,
};

const VIP: &str = "10.96.0.1:80";

fn scene() -> Result<Scene> {
    Scene::with(Setting {
        ..Setting::default()
    })
}

/// Waits until an agent knows so many workloads.
fn knows(agent: &Agent, workloads: u64) -> Result<()> {
    wait_until(SOON, "all workloads, and no others", || {
        let known = status(agent)?["workloads"].as_u64();
        Ok((known == Some(workloads)).then_some(()))
    })
}

/// An agent comes back to a control plane that takes its time for each answer.
fn comes_back_to_a_late_one(late: Duration) -> Result<()> {
    let mut scene = scene()?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    for pod in [&scene.client, &scene.intruder] {
        scene.warm(pod, &scene.server_a)?;
    }
    scene.agent1.kill()?;
    let behaviour = format!("xds: [{{delay-ms: {}}}]", late.as_millis());
    scene.control_plane()?.misbehave(&behaviour)?;
    scene.agent1 = scene.node1.start_agent(AgentOptions {
        ..AgentOptions::default()
    })?;
    let unready = wait_until(SOON, "the agent to say that it is not ready", || {
        Ok(scene.agent1.get(15021, "/healthz/ready").ok())
    })?;
    assert_eq!(unready.status, 500, "{}", unready.body);
    assert!(unready.body.contains("xDS"), "{}", unready.body);
    // What was decided stands, what needs the agent is refused, and nobody is let in who was not.
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    assert!(!answered(&echo(&scene.client, scene.server_b()?)?));
    for server in [&scene.server_a, scene.server_b()?] {
        assert!(!answered(&echo(&scene.intruder, server)?));
    }
    wait_until(late * 2 + SOON, "the agent to be ready", || {
        let ready = scene.agent1.get(15021, "/healthz/ready")?;
        Ok((ready.status == 200).then_some(()))
    })?;
    for server in [&scene.server_a, scene.server_b()?] {
        assert!(answered(&echo(&scene.client, server)?));
        assert!(!answered(&echo(&scene.intruder, server)?));
    }
    let terminated = "istio_xds_connection_terminations_total";
    assert_eq!(scene.agent1.metric(terminated, &[])?, 0.0);
    Ok(())
}

#[test]
fn a_control_plane_that_answers_late_is_waited_for() -> Result<()> {
    comes_back_to_a_late_one(Duration::from_secs(6))
}

#[test]
#[ignore = "two minutes"]
fn a_control_plane_that_answers_a_minute_late_is_waited_for() -> Result<()> {
    comes_back_to_a_late_one(Duration::from_secs(60))
}

#[test]
fn a_service_with_ten_thousand_endpoints_is_taken_and_used() -> Result<()> {
    const MANY: u32 = 10_000;
    let mut scene = scene()?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    let service = Service::new(NAMESPACE, "many", "10.96.0.1").port(80, PORT);
    let before = scene.mesh.workloads.len() as u64;
    // Nearly all connections go to the two that are there.
    scene.change_mesh(|mesh| {
        mesh.services.push(service.clone());
        for name in ["server-a", "server-b"] {
            if let Some(workload) = mesh.workload(name) {
                *workload = workload.clone().serves(&service, 80, PORT);
                let capacity = u32::MAX.into();
                workload.extra.insert("capacity".to_owned(), capacity);
            }
        }
        mesh.workloads.extend((0..MANY).map(|number| {
            let [_, _, high, low] = number.to_be_bytes();
            let one = Workload {
                uid: format!("many-{number}"),
                name: format!("many-{number}"),
                namespace: NAMESPACE.to_owned(),
                service_account: "many".to_owned(),
                workload_ips: vec![format!("10.78.{high}.{low}")],
                protocol: "HBONE".to_owned(),
                node: "n3".to_owned(),
                ..Workload::default()
            };
            one.serves(&service, 80, PORT)
        }));
    })?;
    for agent in [&scene.agent1, scene.agent2()?] {
        knows(agent, before + u64::from(MANY))?;
    }
    for _ in 0..50 {
        let report = connect_to(&scene.client, VIP, &["--send", "hello", "--read", "5"])?;
        assert!(answered(&report), "{report}");
        let report = connect_to(&scene.intruder, VIP, &["--send", "hello", "--read", "5"])?;
        assert!(!answered(&report), "{report}");
    }
    scene.change_mesh(|mesh| {
        mesh.workloads
            .retain(|workload| !workload.name.starts_with("many-"));
    })?;
    let report = connect_to(&scene.client, VIP, &["--send", "hello", "--read", "5"])?;
    assert!(answered(&report), "{report}");
    Ok(())
}

#[test]
fn an_address_of_two_workloads_goes_back_when_the_second_leaves() -> Result<()> {
    let mut scene = scene()?;
    let _server = serve(scene.server_b()?, "echo")?;
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    let uid = scene.workload(scene.server_b()?)?.uid.clone();
    let known = scene.mesh.workloads.len() as u64;
    let plane = scene.control_plane()?;
    plane.misbehave(&format!("xds: [{{shared-address: {uid}}}]"))?;
    knows(&scene.agent1, known + 1)?;
    // It is of the same identity, so that the agent at the other end is who it should be.
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    assert!(!answered(&echo(&scene.intruder, scene.server_b()?)?));
    scene.control_plane()?.misbehave("")?;
    knows(&scene.agent1, known)?;
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    assert!(!answered(&echo(&scene.intruder, scene.server_b()?)?));
    Ok(())
}

#[test]
fn a_workload_without_addresses_is_who_it_is_all_the_same() -> Result<()> {
    let mut scene = scene()?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    let pod = scene.node1.pod("nowhere")?;
    let mut workload = Workload::of_pod(&pod, NAMESPACE, "client");
    workload.workload_ips = Vec::new();
    let told = workload.clone();
    scene.change_mesh(|mesh| mesh.workloads.push(told))?;
    assert!(mesh_status(&scene.agent1)?.contains(", connected"));
    assert_eq!(status(&scene.agent1)?["workloads"], 5);
    scene.agent1.enrol_as(&pod, &workload)?;
    for server in [&scene.server_a, scene.server_b()?] {
        assert!(answered(&echo(&pod, server)?));
        assert!(answered(&echo(&scene.client, server)?));
        assert!(!answered(&echo(&scene.intruder, server)?));
    }
    Ok(())
}
