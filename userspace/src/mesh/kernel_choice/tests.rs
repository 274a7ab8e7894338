//! What the kernel part may choose for, and that it chooses as the agent does.

use proptest::prelude::*;

use super::super::{
    GatewayAddress, GatewayDestination, Health, IpFamilies, LoadBalancer, LoadBalancerMode,
    LocalityScope, MeshDefaults, MeshResources, PortMap, WeightedWaypoint, WorkloadSpec,
};
use super::*;

fn workload(uid: &str, ips: &[&str]) -> WorkloadSpec {
    WorkloadSpec {
        uid: uid.into(),
        name: uid.into(),
        namespace: "ns".into(),
        addresses: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ..WorkloadSpec::default()
    }
}

fn endpoint(uid: &str, ips: &[&str]) -> WorkloadSpec {
    WorkloadSpec {
        services: vec![("ns/h".parse().unwrap(), PortMap::default())],
        ..workload(uid, ips)
    }
}

fn service(vips: &[&str]) -> Service {
    Service {
        id: "ns/h".parse().unwrap(),
        name: "h".into(),
        vips: vips.iter().map(|vip| vip.parse().unwrap()).collect(),
        ports: [(80, 8080)].into_iter().collect(),
        subject_alt_names: vec![],
        waypoints: Vec::new(),
        load_balancer: LoadBalancer::default(),
        ip_families: IpFamilies::default(),
        canonical: false,
    }
}

fn build(services: Vec<Service>, workloads: Vec<WorkloadSpec>) -> Mesh {
    let resources = MeshResources {
        workloads,
        services,
        ..MeshResources::default()
    };
    Mesh::build(resources, &MeshDefaults::default()).unwrap()
}

/// `address -> endpoint address...` for each choice, for a client with both families.
fn choices(services: Vec<Service>, mut endpoints: Vec<WorkloadSpec>) -> Vec<String> {
    endpoints.push(workload("client", &["10.0.0.9", "fd00::9"]));
    let mesh = build(services, endpoints);
    let service = mesh.service_by_name("ns/h").unwrap();
    let client = mesh.workload_by_uid("client").unwrap();
    let shown = mesh.kernel_choices("", service, client).into_iter();
    shown
        .map(|choice| {
            assert_eq!(
                choice.candidates,
                mesh.candidates(service, choice.address, Some(client)),
                "the agent would choose among others"
            );
            let addresses = choice.candidates.iter().map(|one| one.1.to_string());
            let addresses: Vec<_> = addresses.collect();
            format!("{} -> {}", choice.address, addresses.join(" "))
        })
        .collect()
}

fn one(service: Service) -> Vec<String> {
    choices(vec![service], vec![endpoint("a", &["10.0.0.1"])])
}

#[test]
fn an_address_of_its_own_is_chosen_for() {
    assert_eq!(
        one(service(&["/10.96.0.1"])),
        ["10.96.0.1:80 -> 10.0.0.1:8080"]
    );
    let twice = service(&["/10.96.0.1", "/10.96.0.1/32", "/10.96.0.2"]);
    assert_eq!(
        one(twice),
        [
            "10.96.0.1:80 -> 10.0.0.1:8080",
            "10.96.0.2:80 -> 10.0.0.1:8080"
        ]
    );
}

#[test]
fn ranges_and_other_networks_are_the_agents() {
    assert!(one(service(&["/10.96.0.0/16", "elsewhere/10.96.0.1"])).is_empty());
    let mut away = endpoint("b", &["10.0.0.2"]);
    away.network = "elsewhere".into();
    let endpoints = vec![endpoint("a", &["10.0.0.1"]), away];
    assert!(choices(vec![service(&["/10.96.0.1"])], endpoints).is_empty());
}

#[test]
fn an_address_that_services_share_is_the_agents() {
    let other = Service {
        id: "other/h".parse().unwrap(),
        ..service(&["/10.96.0.1"])
    };
    let both = vec![service(&["/10.96.0.1", "/10.96.0.2"]), other];
    assert_eq!(
        choices(both, vec![endpoint("a", &["10.0.0.1"])]),
        ["10.96.0.2:80 -> 10.0.0.1:8080"]
    );
}

#[test]
fn waypoints_and_services_that_choose_nothing_are_the_agents() {
    let behind = Service {
        waypoints: vec![WeightedWaypoint::from(GatewayAddress {
            destination: GatewayDestination::Service("ns/waypoint".parse().unwrap()),
            hbone_mtls_port: 15008,
        })],
        ..service(&["/10.96.0.1"])
    };
    assert!(one(behind).is_empty());
    let as_it_is = Service {
        load_balancer: LoadBalancer {
            mode: LoadBalancerMode::Passthrough,
            ..LoadBalancer::default()
        },
        ..service(&["/10.96.0.1"])
    };
    assert!(one(as_it_is).is_empty());
}

#[test]
fn a_service_without_a_fit_endpoint_is_the_agents() {
    let mut ill = endpoint("ill", &["10.0.0.1"]);
    ill.status = Health::Unhealthy;
    assert!(choices(vec![service(&["/10.96.0.1"])], vec![ill.clone()]).is_empty());
    let endpoints = vec![ill, endpoint("well", &["10.0.0.2"])];
    assert_eq!(
        choices(vec![service(&["/10.96.0.1"])], endpoints),
        ["10.96.0.1:80 -> 10.0.0.2:8080"]
    );
}

#[test]
fn both_families_are_chosen_for_each_with_its_own_endpoints() {
    let dual = vec![
        endpoint("a", &["10.0.0.1", "fd00::1"]),
        endpoint("b", &["fd00::2", "10.0.0.2"]),
    ];
    let vips = service(&["/10.96.0.1", "/fd00::96"]);
    assert_eq!(
        choices(vec![vips.clone()], dual),
        [
            "10.96.0.1:80 -> 10.0.0.1:8080 10.0.0.2:8080",
            "[fd00::96]:80 -> [fd00::1]:8080 [fd00::2]:8080"
        ]
    );
    let mixed = vec![
        endpoint("a", &["10.0.0.1", "fd00::1"]),
        endpoint("b", &["10.0.0.2"]),
    ];
    assert_eq!(
        choices(vec![vips], mixed),
        ["10.96.0.1:80 -> 10.0.0.1:8080 10.0.0.2:8080"]
    );
}

#[test]
fn too_many_endpoints_or_ports_are_the_agents() {
    let many = |count: usize| {
        let endpoints = (0..count).map(|i| {
            let ip = format!("10.{}.{}.{}", 1 + i / 65536, i / 256 % 256, i % 256);
            endpoint(&format!("e{i}"), &[&ip])
        });
        choices(vec![service(&["/10.96.0.1"])], endpoints.collect()).len()
    };
    assert_eq!(many(MOST_ENDPOINTS), 1);
    assert_eq!(many(MOST_ENDPOINTS + 1), 0);
    let ports = |count: u16| Service {
        ports: (1..=count).map(|port| (port, 8080)).collect(),
        ..service(&["/10.96.0.1"])
    };
    assert_eq!(one(ports(1024)).len(), 1024);
    assert_eq!(one(ports(1025)).len(), 0);
}

fn name() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![Just(""), Just("a"), Just("b")].prop_map(Into::into)
}

fn placed(uid: String, host: u8, serves: bool) -> impl Strategy<Value = WorkloadSpec> {
    let place = (name(), name(), name(), name(), name(), name());
    (place, 1..4u8).prop_map(move |(place, families)| {
        let (network, region, zone, subzone, node, cluster_id) = place;
        let four = format!("10.0.0.{host}").parse().unwrap();
        let six = format!("fd00::{host}").parse().unwrap();
        let addresses = [(1, four), (2, six)];
        let had = addresses.into_iter().filter(|(bit, _)| families & bit != 0);
        let services = vec![("ns/h".parse().unwrap(), PortMap::default())];
        WorkloadSpec {
            network,
            node,
            cluster_id,
            locality: Locality {
                region,
                zone,
                subzone,
            },
            addresses: had.map(|(_, ip)| ip).collect(),
            services: if serves { services } else { vec![] },
            ..workload(&uid, &[])
        }
    })
}

fn rules() -> impl Strategy<Value = LoadBalancer> {
    let scope = prop_oneof![
        Just(LocalityScope::Network),
        Just(LocalityScope::Region),
        Just(LocalityScope::Zone),
        Just(LocalityScope::Subzone),
        Just(LocalityScope::Node),
        Just(LocalityScope::Cluster),
    ];
    let mode = prop_oneof![
        Just(LoadBalancerMode::Standard),
        Just(LoadBalancerMode::Strict),
        Just(LoadBalancerMode::Failover),
    ];
    (prop::collection::vec(scope, 0..4), mode).prop_map(|(routing_preferences, mode)| {
        LoadBalancer {
            routing_preferences,
            mode,
            ..LoadBalancer::default()
        }
    })
}

proptest! {
    /// What lets the kernel part keep one table for all pods of a view.
    #[test]
    fn clients_of_one_view_have_the_same_candidates(
        first in placed("first".into(), 1, false),
        rest in (10..20u8).map(|host| placed(format!("e{host}"), host, true)).collect::<Vec<_>>(),
        load_balancer in rules(),
    ) {
        let second = WorkloadSpec {
            uid: "second".into(),
            name: "second".into(),
            namespace: "another".into(),
            service_account: "another".into(),
            addresses: first.addresses.iter().map(|ip| match ip {
                IpAddr::V4(_) => "10.0.0.2".parse().unwrap(),
                IpAddr::V6(_) => "fd00::2".parse().unwrap(),
            }).collect(),
            ..first.clone()
        };
        let service = Service { load_balancer, ..service(&["/10.96.0.1"]) };
        let workloads = [first, second].into_iter().chain(rest).collect();
        let mesh = build(vec![service], workloads);
        let service = mesh.service_by_name("ns/h").unwrap();
        let [first, second] = ["first", "second"].map(|uid| mesh.workload_by_uid(uid).unwrap());
        prop_assert_eq!(ClientView::of(first), ClientView::of(second));
        for destination in ["10.96.0.1:80", "[fd00::96]:80"] {
            let destination = destination.parse().unwrap();
            prop_assert_eq!(
                mesh.candidates(service, destination, Some(first)),
                mesh.candidates(service, destination, Some(second))
            );
        }
    }
}
