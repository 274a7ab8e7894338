//! Where a connection goes: services and their endpoints, and what is not in the mesh.

use std::collections::BTreeMap;

use super::access::accepted_from;
use anyhow::Result;
use culvert_harness::{Service, Workload};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect_to, echo, only, principal, serve, text,
};

const VIP: &str = "10.96.0.1";

fn service() -> Service {
    Service::new(NAMESPACE, "servers", VIP).port(80, PORT)
}

/// `server-a` and `server-b` behind one address, with capacities.
fn scene_with_service(capacity_a: u32, capacity_b: u32) -> Result<Scene> {
    let mut scene = Scene::with(Setting {
        policies: Some(vec![only("client")]),
        ..Setting::default()
    })?;
    scene.change_mesh(|mesh| {
        for (name, capacity) in [("server-a", capacity_a), ("server-b", capacity_b)] {
            if let Some(workload) = mesh.workload(name) {
                *workload = workload.clone().serves(&service(), 80, PORT);
                workload
                    .extra
                    .insert("capacity".to_owned(), capacity.into());
            }
        }
        mesh.services.push(service());
    })?;
    Ok(scene)
}

#[test]
fn a_service_leads_to_its_endpoints_by_weight() -> Result<()> {
    let scene = scene_with_service(1, 4)?;
    let (near, far) = (
        serve(&scene.server_a, "echo")?,
        serve(&scene.server_b, "echo")?,
    );
    for _ in 0..50 {
        let report = connect_to(
            &scene.client,
            &format!("{VIP}:80"),
            &["--send", "hello", "--read", "5"],
        )?;
        assert!(answered(&report), "{report}");
        // A direct connection may show the endpoint; one through the agent shows what the client asked for.
        let peer = text(&report, "peer").to_owned();
        assert!(
            [
                format!("{VIP}:80"),
                scene.server_a.at(PORT),
                scene.server_b.at(PORT)
            ]
            .contains(&peer),
            "{report}"
        );
    }
    let (near, far) = (
        accepted_from(&near, &scene.server_a)?.len(),
        accepted_from(&far, &scene.server_b)?.len(),
    );
    assert_eq!(near + far, 50);
    // One in five: fewer than 1 or more than 25 of 50 would be a miracle.
    assert!(
        (1..=25).contains(&near),
        "{near} of 50 on the near endpoint"
    );
    Ok(())
}

#[test]
fn a_service_is_no_way_around_policy() -> Result<()> {
    let scene = scene_with_service(1, 1)?;
    let (near, far) = (
        serve(&scene.server_a, "echo")?,
        serve(&scene.server_b, "echo")?,
    );
    for _ in 0..10 {
        let report = connect_to(
            &scene.intruder,
            &format!("{VIP}:80"),
            &["--send", "hello", "--read", "5"],
        )?;
        assert!(!answered(&report), "{report}");
    }
    assert!(accepted_from(&near, &scene.server_a)?.is_empty());
    assert!(accepted_from(&far, &scene.server_b)?.is_empty());
    Ok(())
}

#[test]
fn a_service_without_a_healthy_endpoint_is_refused() -> Result<()> {
    let mut scene = scene_with_service(1, 1)?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(&scene.server_b, "echo")?,
    );
    scene.change_mesh(|mesh| {
        for name in ["server-a", "server-b"] {
            if let Some(workload) = mesh.workload(name) {
                workload
                    .extra
                    .insert("status".to_owned(), "Unhealthy".into());
            }
        }
    })?;
    let mark = scene.agent1.log().mark();
    let report = connect_to(
        &scene.client,
        &format!("{VIP}:80"),
        &["--send", "hello", "--read", "5"],
    )?;
    assert!(!answered(&report), "{report}");
    super::access::wait_for_failure(
        &scene.agent1,
        mark,
        "no healthy endpoint",
        &[("src.workload", "client")],
    )?;
    // A port that the service does not have.
    let report = connect_to(
        &scene.client,
        &format!("{VIP}:81"),
        &["--send", "hello", "--read", "5"],
    )?;
    assert!(!answered(&report), "{report}");
    Ok(())
}

#[test]
fn what_is_not_in_the_mesh_is_reached_in_plaintext_and_reported_so() -> Result<()> {
    let scene = Scene::new()?;
    let outside = scene.node2.pod("outside")?;
    let server = serve(&outside, "echo")?;
    let mark = scene.agent1.log().mark();
    let report = echo(&scene.client, &outside)?;
    assert!(answered(&report), "{report}");
    let line = scene.agent1.wait_for_access(
        mark,
        &[("path", "plaintext"), ("src.workload", "client")],
        SOON,
    )?;
    assert_eq!(line.field("dst.addr"), Some(outside.at(PORT)), "{line:?}");
    assert_eq!(
        (line.field("bytes_sent"), line.field("bytes_recv")),
        (Some("5".into()), Some("5".into())),
        "{line:?}"
    );
    assert!(line.text.contains(&principal("client")), "{line:?}");
    let accepted = server.wait_for_event("accepted", SOON)?;
    assert!(
        text(&accepted, "peer").starts_with(&scene.client.address().to_string()),
        "{accepted}"
    );
    Ok(())
}

#[test]
fn a_workload_that_speaks_tcp_is_reached_in_plaintext() -> Result<()> {
    let mut scene = Scene::new()?;
    let legacy = scene.node2.pod("legacy")?;
    scene.change_mesh(|mesh| {
        mesh.workloads
            .push(Workload::of_pod(&legacy, NAMESPACE, "legacy").plain())
    })?;
    let _server = serve(&legacy, "echo")?;
    let mark = scene.agent1.log().mark();
    assert!(answered(&echo(&scene.client, &legacy)?));
    let fields: BTreeMap<_, _> = [("path", "plaintext"), ("dst.workload", "legacy")].into();
    scene
        .agent1
        .wait_for_access(mark, &fields.into_iter().collect::<Vec<_>>(), SOON)?;
    Ok(())
}
