use super::*;
use crate::mesh::{
    MeshDefaults, MeshResources, NetworkAddress, PortMap, ServiceName, WorkloadSpec,
};

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn workload(uid: &str, ip: &str, services: &[(&str, u16)]) -> WorkloadSpec {
    WorkloadSpec {
        uid: uid.into(),
        name: uid.into(),
        namespace: "ns".into(),
        service_account: uid.into(),
        addresses: vec![ip.parse().unwrap()],
        protocol: TunnelProtocol::Hbone,
        services: services
            .iter()
            .map(|(service, port)| (name(service), [(*port, *port)].into_iter().collect()))
            .collect(),
        ..WorkloadSpec::default()
    }
}

fn service(id: &str, vip: &str, port: u16) -> Service {
    Service {
        id: name(id),
        name: id.into(),
        vips: vec![format!("/{vip}").parse().unwrap()],
        ports: [(port, port)].into_iter().collect::<PortMap>(),
        subject_alt_names: Vec::new(),
        waypoints: Vec::new(),
        load_balancer: Default::default(),
        ip_families: Default::default(),
        canonical: false,
    }
}

fn by_name(service: &str) -> Option<GatewayAddress> {
    Some(GatewayAddress {
        destination: GatewayDestination::Service(name(service)),
        hbone_mtls_port: 15008,
    })
}

fn by_address(ip: &str) -> Option<GatewayAddress> {
    Some(GatewayAddress {
        destination: GatewayDestination::Address(NetworkAddress::new("", ip.parse().unwrap())),
        hbone_mtls_port: 15008,
    })
}

/// `web` at 10.0.0.1 behind the service at 10.96.0.1, `waypoint` at 10.0.0.2 behind the one at 10.96.0.2, and a client.
fn mesh(of_service: Option<GatewayAddress>, of_workload: Option<GatewayAddress>) -> Mesh {
    let waypoints = of_service.map(WeightedWaypoint::from);
    mesh_behind(waypoints.into_iter().collect(), of_workload)
}

fn mesh_behind(waypoints: Vec<WeightedWaypoint>, of_workload: Option<GatewayAddress>) -> Mesh {
    let resources = MeshResources {
        workloads: vec![
            WorkloadSpec {
                waypoint: of_workload,
                ..workload("web", "10.0.0.1", &[("ns/web", 80)])
            },
            workload("waypoint", "10.0.0.2", &[("ns/waypoint", 15008)]),
            workload("client", "10.0.0.3", &[]),
        ],
        services: vec![
            Service {
                waypoints,
                ..service("ns/web", "10.96.0.1", 80)
            },
            service("ns/waypoint", "10.96.0.2", 15008),
        ],
        ..MeshResources::default()
    };
    Mesh::build(resources, &MeshDefaults::default()).unwrap()
}

fn taken(mesh: &Mesh, client: &str, destination: &str) -> Route {
    let client = mesh.workload_by_uid(client).unwrap();
    route(mesh, "", at(destination), Some(client), None)
}

/// The other end, the target, and whether it is a waypoint.
fn tunnel(route: Route) -> (SocketAddr, String, SocketAddr, bool) {
    match route {
        Route::Tunnel(tunnel) => (
            tunnel.end.address,
            tunnel.end.workload.identity().to_string(),
            tunnel.target,
            tunnel.is_waypoint,
        ),
        other => panic!("{other:?}"),
    }
}

const WAYPOINT: &str = "spiffe://cluster.local/ns/ns/sa/waypoint";
const WEB: &str = "spiffe://cluster.local/ns/ns/sa/web";

#[test]
fn a_services_waypoint_is_told_the_services_address() {
    for gateway in [
        by_name("ns/waypoint"),
        by_address("10.96.0.2"),
        by_address("10.0.0.2"),
    ] {
        let mesh = mesh(gateway, None);
        let route = taken(&mesh, "client", "10.96.0.1:80");
        let expected = (
            at("10.0.0.2:15008"),
            WAYPOINT.to_owned(),
            at("10.96.0.1:80"),
            true,
        );
        assert_eq!(tunnel(route), expected);
    }
}

#[test]
fn of_several_waypoints_each_has_its_share_and_one_that_is_not_there_has_none() {
    let weighted = |gateway: Option<GatewayAddress>, weight: u32| WeightedWaypoint {
        gateway: gateway.unwrap(),
        weight: weight.try_into().unwrap(),
    };
    let waypoints = vec![
        weighted(by_name("ns/waypoint"), 3),
        weighted(by_address("10.0.0.3"), 1),
        weighted(by_name("ns/nobody"), 1000),
    ];
    let mesh = mesh_behind(waypoints, None);
    let ways = (0..4000).map(|_| tunnel(taken(&mesh, "web", "10.96.0.1:80")));
    let (first, second): (Vec<_>, Vec<_>) =
        ways.partition(|(end, ..)| *end == at("10.0.0.2:15008"));
    assert!(second.iter().all(|(end, ..)| *end == at("10.0.0.3:15008")));
    // Ten standard deviations around 3000.
    assert!((2726..=3274).contains(&first.len()), "{}", first.len());
    // Each of them goes straight on.
    for waypoint in ["waypoint", "client"] {
        let (end, _, target, is_waypoint) = tunnel(taken(&mesh, waypoint, "10.96.0.1:80"));
        assert_eq!((end, target), (at("10.0.0.1:15008"), at("10.0.0.1:80")));
        assert!(!is_waypoint);
    }
}

#[test]
fn a_workloads_waypoint_is_for_who_addresses_the_workload() {
    let mesh = mesh(None, by_name("ns/waypoint"));
    let direct = taken(&mesh, "client", "10.0.0.1:80");
    let expected = (
        at("10.0.0.2:15008"),
        WAYPOINT.to_owned(),
        at("10.0.0.1:80"),
        true,
    );
    assert_eq!(tunnel(direct), expected);
    let by_service = taken(&mesh, "client", "10.96.0.1:80");
    let expected = (
        at("10.0.0.1:15008"),
        WEB.to_owned(),
        at("10.0.0.1:80"),
        false,
    );
    assert_eq!(tunnel(by_service), expected);
}

#[test]
fn the_waypoint_itself_goes_straight_on() {
    for gateway in [
        by_name("ns/waypoint"),
        by_address("10.96.0.2"),
        by_address("10.0.0.2"),
    ] {
        let mesh = mesh(gateway.clone(), gateway);
        for destination in ["10.96.0.1:80", "10.0.0.1:80"] {
            let expected = (
                at("10.0.0.1:15008"),
                WEB.to_owned(),
                at("10.0.0.1:80"),
                false,
            );
            assert_eq!(tunnel(taken(&mesh, "waypoint", destination)), expected);
        }
    }
}

#[test]
fn a_waypoint_that_is_not_there_is_never_gone_around() {
    for gateway in [
        by_name("ns/gone"),
        by_address("10.0.0.99"),
        by_name("ns/web"),
    ] {
        let mesh = mesh(gateway, None);
        assert!(matches!(
            taken(&mesh, "client", "10.96.0.1:80"),
            Route::Nowhere(_)
        ));
    }
}
