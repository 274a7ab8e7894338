//! Waypoints: a connection to what is behind one goes through it, and it is told where the client wanted to go.

use super::peer::{TUNNEL_PORT, attempt, genuine, identity, mesh_ca};
use super::server::Impostor;
use anyhow::{Context as _, Result};
use culvert_harness::{Pod, Service, Workload, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, connect_to, only, serve, status, text, was_reset,
};
use serde_json::{Value, json};

const VIP: &str = "10.96.0.1";
/// The waypoint's own service, as istiod names it.
const NAME: &str = "demo/waypoint.demo.svc.cluster.local";

fn service() -> Service {
    Service::new(NAMESPACE, "servers", VIP).port(80, PORT)
}

fn on_demand() -> Setting {
    Setting {
        env: vec![("XDS_ON_DEMAND", "true".to_owned())],
        ..Setting::default()
    }
}

/// A waypoint at `server-a`'s and its service's side: a pod of the second node that is not the agent's, as waypoints are.
fn behind_a_waypoint(scene: &mut Scene) -> Result<Pod> {
    let waypoint = scene.node2.pod("waypoint")?;
    let gateway = json!({"destination": format!("/{}", waypoint.address())});
    let end = Workload::of_pod(&waypoint, NAMESPACE, "waypoint");
    put_behind(scene, end, service(), &gateway)?;
    Ok(waypoint)
}

/// The same, found by the name of the waypoint's own service.
fn behind_a_named_waypoint(scene: &mut Scene, service: Service, own_vip: &str) -> Result<Pod> {
    let waypoint = scene.node2.pod("waypoint")?;
    let own = Service::new(NAMESPACE, "waypoint", own_vip).port(TUNNEL_PORT, TUNNEL_PORT);
    // Another namespace has a service of the same hostname, which nobody means.
    let mut other = own.clone();
    other.namespace = "other".to_owned();
    other.vips = Vec::new();
    let end = Workload::of_pod(&waypoint, NAMESPACE, "waypoint");
    let end = end.serves(&own, TUNNEL_PORT, TUNNEL_PORT);
    if let Some(server) = scene.mesh.workload("server-b") {
        *server = server.clone().serves(&other, TUNNEL_PORT, TUNNEL_PORT);
    }
    scene.mesh.services.extend([own, other]);
    put_behind(scene, end, service, &json!({"destination": NAME}))?;
    Ok(waypoint)
}

fn put_behind(
    scene: &mut Scene,
    end: Workload,
    mut service: Service,
    gateway: &Value,
) -> Result<()> {
    scene.change_mesh(|mesh| {
        mesh.workloads.push(end);
        if let Some(workload) = mesh.workload("server-a") {
            *workload = workload.clone().serves(&service, 80, PORT);
            let waypoint = ("waypoint".to_owned(), gateway.clone());
            workload.extra.extend([waypoint]);
        }
        service.extra.insert("waypoint".to_owned(), gateway.clone());
        mesh.services.push(service);
    })
}

/// Asks for each of these and is told of it by the waypoint.
fn is_told(scene: &Scene, waypoint: &str, destinations: &[String]) -> Result<()> {
    for destination in destinations {
        let mark = scene.agent1.log().mark();
        let report = connect_to(&scene.client, destination, &["--read-all"])?;
        assert_eq!(text(&report, "data"), destination, "{report}");
        assert_eq!(text(&report, "peer"), destination, "{report}");
        let fields = [
            ("path", "hbone"),
            ("src.workload", "client"),
            ("dst.workload", "waypoint"),
            ("dst.addr", waypoint),
            ("dst.hbone_addr", destination),
        ];
        scene.agent1.wait_for_access(mark, &fields, SOON)?;
    }
    Ok(())
}

#[test]
fn a_waypoint_is_told_where_the_client_wanted_to_go() -> Result<()> {
    let mut scene = Scene::new()?;
    let waypoint = behind_a_waypoint(&mut scene)?;
    let (ca, identity) = (mesh_ca(&scene)?, identity("waypoint")?);
    let _server = Impostor::telling(&waypoint, &ca, &identity)?;
    let destinations = [format!("{VIP}:80"), scene.server_a.at(PORT)];
    is_told(&scene, &waypoint.at(TUNNEL_PORT), &destinations)
}

#[test]
fn a_waypoint_that_is_named_by_its_service_is_told_where_the_client_wanted_to_go() -> Result<()> {
    let mut scene = Scene::new()?;
    let waypoint = behind_a_named_waypoint(&mut scene, service(), "10.96.0.9")?;
    let (ca, identity) = (mesh_ca(&scene)?, identity("waypoint")?);
    let _server = Impostor::telling(&waypoint, &ca, &identity)?;
    let destinations = [format!("{VIP}:80"), scene.server_a.at(PORT)];
    is_told(&scene, &waypoint.at(TUNNEL_PORT), &destinations)
}

#[test]
fn a_named_waypoint_is_reached_over_ipv6() -> Result<()> {
    let mut scene = Scene::with(Setting {
        ipv6: true,
        ..Setting::default()
    })?;
    let vip = "fd96::1";
    let behind = Service::new(NAMESPACE, "servers", vip).port(80, PORT);
    let waypoint = behind_a_named_waypoint(&mut scene, behind, "fd96::9")?;
    let (ca, identity) = (mesh_ca(&scene)?, identity("waypoint")?);
    let _server = Impostor::telling(&waypoint, &ca, &identity)?;
    let destinations = [format!("[{vip}]:80"), scene.server_a.at_v6(PORT)?];
    is_told(&scene, &waypoint.at_v6(TUNNEL_PORT)?, &destinations)
}

/// How many workloads the client's agent knows.
fn known(scene: &Scene) -> Result<u64> {
    let count = status(&scene.agent1)?["workloads"].as_u64();
    count.context("the number of workloads")
}

#[test]
fn on_demand_a_waypoint_is_asked_for_by_its_address() -> Result<()> {
    let mut scene = Scene::with(on_demand())?;
    let waypoint = behind_a_waypoint(&mut scene)?;
    let (ca, identity) = (mesh_ca(&scene)?, identity("waypoint")?);
    let _server = Impostor::telling(&waypoint, &ca, &identity)?;
    assert_eq!(known(&scene)?, 3, "only its own pods");
    let destinations = [scene.server_a.at(PORT), format!("{VIP}:80")];
    is_told(&scene, &waypoint.at(TUNNEL_PORT), &destinations)?;
    assert_eq!(known(&scene)?, 4);
    Ok(())
}

#[test]
fn on_demand_a_waypoint_of_a_service_or_a_workload_is_asked_for_by_its_name() -> Result<()> {
    for of_service in [true, false] {
        let mut scene = Scene::with(on_demand())?;
        let waypoint = behind_a_named_waypoint(&mut scene, service(), "10.96.0.9")?;
        let (ca, identity) = (mesh_ca(&scene)?, identity("waypoint")?);
        let _server = Impostor::telling(&waypoint, &ca, &identity)?;
        assert_eq!(known(&scene)?, 3, "only its own pods");
        let destination = match of_service {
            true => format!("{VIP}:80"),
            false => scene.server_a.at(PORT),
        };
        is_told(&scene, &waypoint.at(TUNNEL_PORT), &[destination])?;
        assert_eq!(known(&scene)?, 4);
    }
    Ok(())
}

#[test]
fn on_demand_the_waypoint_of_the_clients_own_service_is_asked_for_where_others_share_its_address()
-> Result<()> {
    let mut scene = Scene::with(on_demand())?;
    let mut other = Service::new("another", "servers", VIP).port(80, PORT);
    other.extra.insert("canonical".to_owned(), true.into());
    scene.mesh.services.push(other);
    let waypoint = behind_a_named_waypoint(&mut scene, service(), "10.96.0.9")?;
    let (ca, identity) = (mesh_ca(&scene)?, identity("waypoint")?);
    let _server = Impostor::telling(&waypoint, &ca, &identity)?;
    let destinations = [format!("{VIP}:80")];
    is_told(&scene, &waypoint.at(TUNNEL_PORT), &destinations)
}

#[test]
fn of_several_waypoints_each_gets_its_share() -> Result<()> {
    let mut scene = Scene::new()?;
    let waypoint = behind_a_waypoint(&mut scene)?;
    let canary = scene.node2.pod("canary")?;
    scene.change_mesh(|mesh| {
        let end = Workload::of_pod(&canary, NAMESPACE, "canary");
        mesh.workloads.push(end);
        let weighted = |pod: &Pod, weight: u32| json!({"destination": format!("/{}", pod.address()), "weight": weight});
        for service in &mut mesh.services {
            let both = json!([weighted(&waypoint, 4), weighted(&canary, 1)]);
            service.extra.insert("weightedWaypoints".to_owned(), both);
        }
    })?;
    let ca = mesh_ca(&scene)?;
    let _servers = (
        Impostor::telling(&waypoint, &ca, &identity("waypoint")?)?,
        Impostor::telling(&canary, &ca, &identity("canary")?)?,
    );
    for _ in 0..50 {
        let report = connect_to(&scene.client, &format!("{VIP}:80"), &["--read-all"])?;
        assert_eq!(text(&report, "data"), format!("{VIP}:80"), "{report}");
    }
    let through = |pod: &Pod| -> Result<usize> {
        let address = pod.at(TUNNEL_PORT);
        let lines = scene.agent1.access_log().into_iter();
        let lines = lines.filter(|line| line.field("dst.addr").as_deref() == Some(&address));
        Ok(lines.count())
    };
    let (mut usual, mut rest) = (0, 0);
    wait_until(SOON, "a line for each connection", || {
        (usual, rest) = (through(&waypoint)?, through(&canary)?);
        Ok((usual + rest == 50).then_some(()))
    })?;
    // One in five: fewer than 1 or more than 25 of 50 would be a miracle.
    assert!((1..=25).contains(&rest), "{rest} of 50 through the canary");
    Ok(())
}

#[test]
fn who_is_not_the_waypoint_gets_nothing_of_what_is_meant_for_it() -> Result<()> {
    let mut scene = Scene::new()?;
    let waypoint = behind_a_waypoint(&mut scene)?;
    let ca = mesh_ca(&scene)?;
    let _server = Impostor::telling(&waypoint, &ca, &identity("server-a")?)?;
    let report = connect_to(&scene.client, &format!("{VIP}:80"), &["--read-all"])?;
    assert_ne!(text(&report, "data"), format!("{VIP}:80"), "{report}");
    assert!(was_reset(&report), "{report}");
    Ok(())
}

#[test]
fn who_is_at_the_address_of_a_named_waypoint_needs_its_identity() -> Result<()> {
    let mut scene = Scene::new()?;
    let waypoint = behind_a_named_waypoint(&mut scene, service(), "10.96.0.9")?;
    let ca = mesh_ca(&scene)?;
    let _server = Impostor::telling(&waypoint, &ca, &identity("server-a")?)?;
    for destination in [format!("{VIP}:80"), scene.server_a.at(PORT)] {
        let report = connect_to(&scene.client, &destination, &["--read-all"])?;
        assert_ne!(text(&report, "data"), destination, "{report}");
        assert!(was_reset(&report), "{report}");
    }
    Ok(())
}

#[test]
fn twin_who_is_at_the_address_of_a_named_waypoint_gets_all_when_identities_are_not_compared()
-> Result<()> {
    let mut scene = Scene::without("skip-server-identity")?;
    let waypoint = behind_a_named_waypoint(&mut scene, service(), "10.96.0.9")?;
    let ca = mesh_ca(&scene)?;
    let _server = Impostor::telling(&waypoint, &ca, &identity("server-a")?)?;
    let destination = format!("{VIP}:80");
    let report = connect_to(&scene.client, &destination, &["--read-all"])?;
    assert_eq!(text(&report, "data"), destination, "{report}");
    Ok(())
}

#[test]
fn what_comes_from_a_waypoint_is_let_in_by_the_waypoints_identity() -> Result<()> {
    let mut scene = Scene::with(Setting {
        policies: Some(vec![only("waypoint")]),
        ..Setting::default()
    })?;
    let waypoint = behind_a_waypoint(&mut scene)?;
    let _server = serve(&scene.server_a, "echo")?;
    let authority = scene.server_a.at(PORT);
    for (account, reached) in [("waypoint", true), ("client", false)] {
        let proof = genuine(&scene, account)?;
        let outcome = attempt(&waypoint, &scene.server_a, proof, &authority)?;
        assert_eq!(outcome.reached(), reached, "{account}: {outcome:?}");
    }
    Ok(())
}
