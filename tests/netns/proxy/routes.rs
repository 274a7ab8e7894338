//! Where a connection goes: services and their endpoints, and what is not in the mesh.

use std::collections::BTreeMap;

use super::access::accepted_from;
use super::peer::spiffe;
use anyhow::Result;
use culvert_harness::{Match, Node, Policy, Proc, Service, Workload, probe_binary, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect_to, echo, only, principal, serve, text,
};
use serde_json::json;

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
        serve(scene.server_b()?, "echo")?,
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
                scene.server_b()?.at(PORT)
            ]
            .contains(&peer),
            "{report}"
        );
    }
    let (near, far) = (
        accepted_from(&near, &scene.server_a)?.len(),
        accepted_from(&far, scene.server_b()?)?.len(),
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
        serve(scene.server_b()?, "echo")?,
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
    assert!(accepted_from(&far, scene.server_b()?)?.is_empty());
    Ok(())
}

#[test]
fn a_service_without_a_healthy_endpoint_is_refused() -> Result<()> {
    let mut scene = scene_with_service(1, 1)?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
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

/// A service without addresses, as its name alone is looked up, in front of `server-a` and `server-b`.
fn scene_with_a_headless_service(knobs: &'static str) -> Result<Scene> {
    let mut scene = Scene::without(knobs)?;
    scene.change_mesh(|mesh| {
        let mut headless = service();
        headless.vips.clear();
        for name in ["server-a", "server-b"] {
            if let Some(workload) = mesh.workload(name) {
                *workload = workload.clone().serves(&headless, 80, PORT);
            }
        }
        mesh.services.push(headless);
    })?;
    Ok(scene)
}

#[test]
fn a_pod_of_a_headless_service_is_reached_itself_and_by_its_identity() -> Result<()> {
    let scene = scene_with_a_headless_service("")?;
    let servers = [
        (&scene.server_a, serve(&scene.server_a, "echo")?, "direct"),
        (
            scene.server_b()?,
            serve(scene.server_b()?, "echo")?,
            "hbone",
        ),
    ];
    for (pod, _, path) in &servers {
        scene.warm(&scene.client, pod)?;
        let mark = scene.agent1.log().mark();
        for _ in 0..9 {
            let report = echo(&scene.client, pod)?;
            assert!(answered(&report), "{report}");
        }
        let identity = spiffe(pod.name());
        let fields = [
            ("path", *path),
            ("src.workload", "client"),
            ("dst.workload", pod.name()),
            ("dst.identity", &identity),
        ];
        scene.agent1.wait_for_access(mark, &fields, SOON)?;
        assert!(!answered(&echo(&scene.intruder, pod)?));
    }
    for (pod, server, _) in &servers {
        assert_eq!(accepted_from(server, pod)?.len(), 10, "{}", pod.name());
    }
    Ok(())
}

#[test]
fn twin_a_pod_of_a_headless_service_is_open_to_all_when_policy_is_not_asked() -> Result<()> {
    let scene = scene_with_a_headless_service("skip-policy")?;
    let _server = serve(scene.server_b()?, "echo")?;
    assert!(answered(&echo(&scene.intruder, scene.server_b()?)?));
    Ok(())
}

/// `host-a` and `host-b` share the network of a node, the client's own or the other one, and a service is in front of each. Nobody may
/// connect to `host-a`, nor may it connect to anybody.
fn scene_with_host_network(near: bool) -> Result<(Scene, Node)> {
    let closed = Policy::deny(NAMESPACE, "closed")
        .selector()
        .when(Match::not_principal("nobody"));
    let from_host_a =
        Policy::deny(NAMESPACE, "not-from-host-a").when(Match::principal(&principal("host-a")));
    let mut scene = Scene::with(Setting {
        policies: Some(vec![closed.clone(), from_host_a]),
        ..Setting::default()
    })?;
    let node = match near {
        true => scene.node1.clone(),
        false => scene.node2.clone(),
    };
    scene.change_mesh(|mesh| {
        for (name, vip, port) in [("host-a", "10.96.0.1", 7001), ("host-b", "10.96.0.2", 7002)] {
            let service = Service::new(NAMESPACE, name, vip).port(80, port);
            let mut workload = Workload {
                uid: name.to_owned(),
                name: name.to_owned(),
                namespace: NAMESPACE.to_owned(),
                service_account: name.to_owned(),
                workload_ips: vec![node.address().to_string()],
                node: node.name().to_owned(),
                ..Workload::default()
            }
            .plain()
            .serves(&service, 80, port);
            let shared = json!("HostNetwork");
            workload.extra.insert("networkMode".to_owned(), shared);
            if name == "host-a" {
                workload = workload.selected_by(&closed);
            }
            mesh.workloads.push(workload);
            mesh.services.push(service);
        }
    })?;
    Ok((scene, node))
}

fn serve_on_the_host(node: &Node, port: u16) -> Result<Proc> {
    let server = node.host_pod_command(probe_binary()?);
    let server = server
        .args(["serve", "--port", &port.to_string()])
        .spawn()?;
    server.wait_for_line("listening", SOON)?;
    Ok(server)
}

#[test]
fn workloads_of_the_hosts_network_are_reached_in_plaintext_and_not_taken_for_each_other()
-> Result<()> {
    for near in [true, false] {
        let (scene, node) = scene_with_host_network(near)?;
        let servers = [
            serve_on_the_host(&node, 7001)?,
            serve_on_the_host(&node, 7002)?,
        ];
        let at = |port: u16| format!("{}:{port}", node.address());
        for (to, workload) in [
            ("10.96.0.1:80", Some("host-a")),
            ("10.96.0.2:80", Some("host-b")),
            // Whose port it is the mesh does not say.
            (&at(7001), None),
            (&at(7002), None),
        ] {
            let mark = scene.agent1.log().mark();
            let report = connect_to(&scene.client, to, &["--send", "hello", "--read", "5"])?;
            assert!(answered(&report), "{to}: {report}");
            let fields = [
                ("path", "plaintext"),
                ("src.workload", "client"),
                ("dst.addr", to),
            ];
            let line = scene.agent1.wait_for_access(mark, &fields, SOON)?;
            assert_eq!(line.field("dst.workload").as_deref(), workload, "{line:?}");
            assert_eq!(line.field("dst.identity"), None, "{line:?}");
        }
        for server in servers {
            wait_until(SOON, "each server to be reached twice", || {
                Ok((server.events("accepted").len() == 2).then_some(()))
            })?;
        }
    }
    Ok(())
}

#[test]
fn who_comes_from_the_hosts_network_is_taken_for_none_of_its_workloads() -> Result<()> {
    for near in [true, false] {
        let (scene, node) = scene_with_host_network(near)?;
        let _server = serve(&scene.server_a, "echo")?;
        let mark = scene.agent1.log().mark();
        let report = node
            .host_pod_command(probe_binary()?)
            .args(["connect", "--to", &scene.server_a.at(PORT)])
            .args(["--send", "hello", "--read", "5"])
            .run(SOON)?
            .json()?;
        assert!(answered(&report), "{report}");
        let fields = [("direction", "inbound"), ("dst.workload", "server-a")];
        let line = scene.agent1.wait_for_access(mark, &fields, SOON)?;
        assert_eq!(line.field("path").as_deref(), Some("plaintext"), "{line:?}");
        assert_eq!(line.field("src.workload"), None, "{line:?}");
        assert_eq!(line.field("src.identity"), None, "{line:?}");
    }
    Ok(())
}
