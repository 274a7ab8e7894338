//! What the mesh answers, by behaviour.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::*;
use crate::policy::{
    Action, Authorization, Connection, Decision, DenyReason, Identity, PolicyName, Rule, Scope,
    Strictness,
};

fn workload(uid: &str, ips: &[&str]) -> WorkloadSpec {
    WorkloadSpec {
        uid: uid.into(),
        name: uid.into(),
        namespace: "ns".into(),
        addresses: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ..WorkloadSpec::default()
    }
}

fn endpoint(uid: &str, ip: &str, service: &str) -> WorkloadSpec {
    WorkloadSpec {
        services: vec![(service.parse().unwrap(), PortMap::default())],
        ..workload(uid, &[ip])
    }
}

fn service(id: &str, vips: &[&str]) -> Service {
    Service {
        id: id.parse().unwrap(),
        name: "s".into(),
        vips: vips.iter().map(|vip| vip.parse().unwrap()).collect(),
        ports: [(80, 8080)].into_iter().collect(),
        subject_alt_names: vec![],
        waypoints: Vec::new(),
        load_balancer: LoadBalancer::default(),
        ip_families: IpFamilies::default(),
        canonical: false,
    }
}

fn policy(name: &str, scope: Scope, action: Action) -> Authorization {
    Authorization {
        name: name.parse().unwrap(),
        scope,
        action,
        dry_run: false,
        rules: vec![Rule::default()],
    }
}

fn mesh(
    workloads: Vec<WorkloadSpec>,
    services: Vec<Service>,
    policies: Vec<Authorization>,
) -> Mesh {
    Mesh::build(
        MeshResources {
            workloads,
            services,
            policies,
            ..MeshResources::default()
        },
        &MeshDefaults::default(),
    )
    .unwrap()
}

fn refused(
    workloads: Vec<WorkloadSpec>,
    services: Vec<Service>,
    policies: Vec<Authorization>,
) -> String {
    let resources = MeshResources {
        workloads,
        services,
        policies,
        ..MeshResources::default()
    };
    Mesh::build(resources, &MeshDefaults::default())
        .unwrap_err()
        .to_string()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn only<'a>(mesh: &'a Mesh, uid: &str) -> &'a Arc<Workload> {
    mesh.workload_by_uid(uid).unwrap()
}

/// The service that an address stands for.
fn found(mesh: &Mesh, address: &str, client: Option<&str>) -> String {
    match mesh.lookup("", ip(address), client.map(|uid| &**only(mesh, uid))) {
        Destination::Service(service) => service.id.to_string(),
        Destination::Workload(workload) => workload.uid.to_string(),
        Destination::Unknown => "-".to_owned(),
    }
}

mod building {
    use super::*;

    #[test]
    fn identities_have_the_documented_defaults() {
        let defaults = MeshDefaults {
            trust_domain: "mesh.example".into(),
            ..MeshDefaults::default()
        };
        let own = WorkloadSpec {
            service_account: "sa".into(),
            trust_domain: "td".into(),
            ..workload("own", &[])
        };
        let workloads = vec![workload("plain", &[]), own];
        let mesh = Mesh::build(
            MeshResources {
                workloads,
                ..MeshResources::default()
            },
            &defaults,
        )
        .unwrap();
        assert_eq!(
            only(&mesh, "plain").identity().to_string(),
            "spiffe://mesh.example/ns/ns/sa/default"
        );
        assert_eq!(
            only(&mesh, "own").identity().to_string(),
            "spiffe://td/ns/ns/sa/sa"
        );
        assert_eq!(&*only(&mesh, "plain").service_account, "default");
        assert_eq!(&*only(&mesh, "plain").trust_domain, "mesh.example");
    }

    #[test]
    fn a_workload_without_a_network_is_on_the_default_one() {
        let defaults = MeshDefaults {
            network: "home".into(),
            ..MeshDefaults::default()
        };
        let away = WorkloadSpec {
            network: "away".into(),
            ..workload("b", &["10.0.0.1"])
        };
        let workloads = vec![workload("a", &["10.0.0.1"]), away];
        let mesh = Mesh::build(
            MeshResources {
                workloads,
                ..MeshResources::default()
            },
            &defaults,
        )
        .unwrap();
        assert_eq!(
            &*mesh.workload_by_ip("home", ip("10.0.0.1")).unwrap().uid,
            "a"
        );
        assert_eq!(
            &*mesh.workload_by_ip("away", ip("10.0.0.1")).unwrap().uid,
            "b"
        );
        assert!(mesh.workload_by_ip("", ip("10.0.0.1")).is_none());
    }

    #[test]
    fn what_is_ambiguous_is_refused_by_name() {
        let pod = |uid| workload(uid, &["10.0.0.1"]);
        let mapped = workload("b", &["::ffff:10.0.0.1"]);
        assert!(
            refused(vec![workload("a", &[]), workload("a", &[])], vec![], vec![]).contains("uid a")
        );
        for second in [pod("b"), mapped] {
            let error = refused(vec![pod("a"), second], vec![], vec![]);
            assert!(
                error.contains("workloads a and b both have the address 10.0.0.1"),
                "{error}"
            );
        }
        let error = refused(
            vec![],
            vec![service("ns/h", &[]), service("ns/h", &[])],
            vec![],
        );
        assert!(error.contains("ns/h"), "{error}");
        let deny = || policy("ns/p", Scope::Namespace, Action::Deny);
        assert!(
            refused(
                vec![],
                vec![],
                vec![deny(), policy("ns/p", Scope::Global, Action::Allow)]
            )
            .contains("ns/p")
        );
    }

    #[test]
    fn a_workload_that_cannot_have_an_identity_is_refused() {
        for namespace in ["", "a/sa/b", "ns*"] {
            let error = refused(
                vec![WorkloadSpec {
                    namespace: namespace.into(),
                    ..workload("w", &[])
                }],
                vec![],
                vec![],
            );
            assert!(
                error.contains("workload w") && error.contains("namespace"),
                "{error}"
            );
        }
        assert!(
            refused(
                vec![WorkloadSpec {
                    uid: "".into(),
                    ..workload("w", &[])
                }],
                vec![],
                vec![]
            )
            .contains("no uid")
        );
    }

    #[test]
    fn a_workload_may_have_no_address_or_repeat_one() {
        let mesh = mesh(
            vec![
                workload("a", &[]),
                workload("b", &["10.0.0.1", "::ffff:10.0.0.1"]),
            ],
            vec![],
            vec![],
        );
        assert_eq!(mesh.workloads().len(), 2);
        assert!(only(&mesh, "b").has_address(ip("::ffff:10.0.0.1")));
    }
}

mod lookups {
    use super::*;

    #[test]
    fn workloads_are_found_by_address_in_either_spelling() {
        let mesh = mesh(
            vec![workload("a", &["10.0.0.1", "fd00::1"])],
            vec![],
            vec![],
        );
        for text in ["10.0.0.1", "::ffff:10.0.0.1", "fd00::1"] {
            assert_eq!(found(&mesh, text, None), "a");
            assert!(mesh.workload_by_ip("", ip(text)).is_some());
        }
        assert_eq!(found(&mesh, "10.0.0.2", None), "-");
        assert_eq!(
            mesh.lookup("elsewhere", ip("10.0.0.1"), None),
            Destination::Unknown
        );
    }

    #[test]
    fn a_name_that_two_clusters_use_is_not_guessed() {
        let named = |uid: &str, cluster: &str| WorkloadSpec {
            name: "pod".into(),
            cluster_id: cluster.into(),
            ..workload(uid, &[])
        };
        let one = mesh(vec![named("a", "c1")], vec![], vec![]);
        assert_eq!(&*one.workload_by_name("ns", "pod").unwrap().uid, "a");
        assert!(one.workload_by_name("other", "pod").is_none());
        let two = mesh(vec![named("a", "c1"), named("b", "c2")], vec![], vec![]);
        assert!(two.workload_by_name("ns", "pod").is_none());
        assert_eq!(two.workloads_by_name("ns", "pod").len(), 2);
    }

    #[test]
    fn an_exact_address_wins_over_ranges_and_narrow_ranges_over_wide_ones_and_all_over_workloads() {
        let services = vec![
            service("ns/all", &["/0.0.0.0/0"]),
            service("ns/wide", &["/10.0.0.0/8"]),
            service("ns/narrow", &["/10.1.0.0/16"]),
            service("ns/exact", &["/10.1.1.1"]),
        ];
        let mesh = mesh(
            vec![workload("w", &["10.1.1.1"]), workload("six", &["fd00::1"])],
            services,
            vec![],
        );
        assert_eq!(found(&mesh, "10.1.1.1", None), "ns/exact");
        assert_eq!(found(&mesh, "10.1.1.2", None), "ns/narrow");
        assert_eq!(found(&mesh, "10.2.1.2", None), "ns/wide");
        assert_eq!(found(&mesh, "192.0.2.1", None), "ns/all");
        assert_eq!(found(&mesh, "fd00::1", None), "six");
        assert_eq!(found(&mesh, "fd00::2", None), "-");
    }

    #[test]
    fn of_several_services_the_clients_namespace_wins_then_the_canonical_one() {
        let canonical = |service| Service {
            canonical: true,
            ..service
        };
        let vip = &["/10.96.0.1", "/10.97.0.0/16"][..];
        let services = vec![
            service("c/h", vip),
            canonical(service("b/h", vip)),
            service("a/h", vip),
            service("ns/h", vip),
        ];
        let stranger = WorkloadSpec {
            namespace: "other".into(),
            ..workload("stranger", &[])
        };
        let mesh = mesh(vec![workload("client", &[]), stranger], services, vec![]);
        for address in ["10.96.0.1", "10.97.5.5"] {
            assert_eq!(found(&mesh, address, Some("client")), "ns/h");
            assert_eq!(found(&mesh, address, Some("stranger")), "b/h");
            assert_eq!(found(&mesh, address, None), "b/h");
        }
    }

    #[test]
    fn without_a_canonical_service_the_choice_is_stable() {
        for order in [["a/h", "b/h"], ["b/h", "a/h"]] {
            let services = order.map(|id| service(id, &["/10.96.0.1"])).to_vec();
            assert_eq!(
                found(&mesh(vec![], services, vec![]), "10.96.0.1", None),
                "a/h"
            );
        }
    }

    #[test]
    fn services_are_found_by_name() {
        let mesh = mesh(vec![], vec![service("ns/h", &[])], vec![]);
        assert!(mesh.service_by_name("ns/h").is_some());
        assert!(mesh.service_by_name("ns/x").is_none());
    }

    #[test]
    fn names_of_addresses_are_read_strictly() {
        for text in [
            "",
            "10.0.0.1",
            "net/",
            "net/10.0.0",
            "net/10.0.0.1/8",
            "a/b/10.0.0.1",
            "net/10.0.0.1 ",
        ] {
            assert!(text.parse::<NetworkAddress>().is_err(), "{text:?}");
        }
        for text in [
            "",
            "10.0.0.0/8",
            "net/10.0.0.0/33",
            "net/10.0.0.0/",
            "net/10.0.0.0/8/8",
            "net/",
        ] {
            assert!(text.parse::<NetworkCidr>().is_err(), "{text:?}");
        }
        for text in ["", "h", "/h", "ns/", "ns/h/x"] {
            assert!(text.parse::<ServiceName>().is_err(), "{text:?}");
        }
        for (text, shown) in [
            ("/::ffff:10.0.0.1", "/10.0.0.1"),
            ("n/10.1.2.3/8", "n/10.0.0.0/8"),
            ("n/::ffff:10.1.2.3/104", "n/10.0.0.0/8"),
        ] {
            assert_eq!(text.parse::<NetworkCidr>().unwrap().to_string(), shown);
        }
    }
}

mod balancing {
    use super::*;

    /// Who is chosen with each of the random numbers from 0 on.
    fn chosen(mesh: &Mesh, client: Option<&str>, draws: u64) -> Vec<String> {
        let service = mesh.service_by_name("ns/h").unwrap();
        let client = client.map(|uid| &**only(mesh, uid));
        let choose =
            |number| mesh.choose_endpoint(service, at("10.96.0.1:80"), client, &mut || number);
        (0..draws)
            .filter_map(choose)
            .map(|(workload, _)| workload.uid.to_string())
            .collect()
    }

    fn with(service: Service, workloads: Vec<WorkloadSpec>) -> Mesh {
        mesh(workloads, vec![service], vec![])
    }

    fn h() -> Service {
        service("ns/h", &["/10.96.0.1"])
    }

    fn rules(load_balancer: LoadBalancer) -> Service {
        Service {
            load_balancer,
            ..h()
        }
    }

    #[test]
    fn the_workloads_own_port_wins_over_the_services() {
        let mapped = |uid: &str, ip: &str, ports: &[(u16, u16)]| WorkloadSpec {
            services: vec![("ns/h".parse().unwrap(), ports.iter().copied().collect())],
            ..workload(uid, &[ip])
        };
        let service = Service {
            ports: [(80, 8080), (81, 0)].into_iter().collect(),
            ..h()
        };
        let workloads = vec![
            mapped("services", "10.0.0.1", &[]),
            mapped("own", "10.0.0.2", &[(80, 9090), (81, 9091)]),
            mapped("other-port", "10.0.0.3", &[(82, 9092)]),
            mapped("zero", "10.0.0.4", &[(80, 0), (81, 0)]),
            workload("no-endpoint", &["10.0.0.5"]),
        ];
        let mesh = with(service.clone(), workloads);
        let ports = |port| {
            let endpoints = mesh.endpoints(&service, port).into_iter();
            endpoints
                .map(|one| format!("{}:{}", one.workload.uid, one.target_port))
                .collect::<Vec<_>>()
        };
        assert_eq!(ports(80), ["services:8080", "own:9090", "zero:8080"]);
        assert_eq!(ports(81), ["own:9091"]);
        assert_eq!(ports(82), Vec::<String>::new());
    }

    #[test]
    fn capacity_is_the_weight() {
        let sized = |uid: &str, ip: &str, capacity| WorkloadSpec {
            capacity,
            ..endpoint(uid, ip, "ns/h")
        };
        let workloads = vec![
            sized("three", "10.0.0.1", Some(3)),
            sized("none", "10.0.0.2", Some(0)),
            sized("one", "10.0.0.3", None),
        ];
        let mesh = with(h(), workloads);
        assert_eq!(
            chosen(&mesh, None, 5),
            ["three", "three", "three", "one", "three"]
        );
        let service = mesh.service_by_name("ns/h").unwrap();
        let weights: Vec<_> = mesh
            .candidates(service, at("10.96.0.1:80"), None)
            .into_iter()
            .map(|one| one.2)
            .collect();
        assert_eq!(weights, [3, 1]);
    }

    #[test]
    fn huge_capacities_do_not_overflow() {
        let huge = |uid: &str, ip: &str| WorkloadSpec {
            capacity: Some(u32::MAX),
            ..endpoint(uid, ip, "ns/h")
        };
        let mesh = with(h(), vec![huge("a", "10.0.0.1"), huge("b", "10.0.0.2")]);
        let service = mesh.service_by_name("ns/h").unwrap();
        let (workload, address) = mesh
            .choose_endpoint(service, at("10.96.0.1:80"), None, &mut || {
                u64::from(u32::MAX)
            })
            .unwrap();
        assert_eq!(
            (&*workload.uid, address),
            ("b", "10.0.0.2:8080".parse::<SocketAddr>().unwrap())
        );
    }

    #[test]
    fn an_endpoint_chosen_before_is_taken_only_while_it_is_a_candidate() {
        let ill = WorkloadSpec {
            status: Health::Unhealthy,
            ..endpoint("ill", "10.0.0.1", "ns/h")
        };
        let mesh = with(h(), vec![ill, endpoint("well", "10.0.0.2", "ns/h")]);
        let service = mesh.service_by_name("ns/h").unwrap();
        let taken = |chosen| {
            let workload = mesh.endpoint_at(service, at("10.96.0.1:80"), None, at(chosen));
            workload.map(|workload| workload.uid.to_string())
        };
        assert_eq!(taken("10.0.0.2:8080").as_deref(), Some("well"));
        for gone in ["10.0.0.1:8080", "10.0.0.2:8081", "10.0.0.3:8080"] {
            assert_eq!(taken(gone), None, "{gone}");
        }
    }

    #[test]
    fn only_healthy_endpoints_are_chosen_unless_the_service_wants_all() {
        let ill = WorkloadSpec {
            status: Health::Unhealthy,
            ..endpoint("ill", "10.0.0.1", "ns/h")
        };
        let workloads = || vec![ill.clone(), endpoint("well", "10.0.0.2", "ns/h")];
        assert_eq!(chosen(&with(h(), workloads()), None, 2), ["well", "well"]);
        let all = rules(LoadBalancer {
            health_policy: HealthPolicy::AllowAll,
            ..LoadBalancer::default()
        });
        assert_eq!(chosen(&with(all, workloads()), None, 2), ["ill", "well"]);
        assert!(chosen(&with(h(), vec![ill]), None, 2).is_empty());
    }

    #[test]
    fn without_endpoints_or_for_an_unknown_port_nobody_is_chosen() {
        let mesh = with(
            h(),
            vec![
                endpoint("a", "10.0.0.1", "ns/h"),
                endpoint("x", "10.0.0.2", "ns/x"),
            ],
        );
        let service = mesh.service_by_name("ns/h").unwrap();
        assert!(
            mesh.choose_endpoint(service, at("10.96.0.1:81"), None, &mut || 0)
                .is_none()
        );
        assert!(chosen(&with(h(), vec![]), None, 1).is_empty());
        let unaddressed = WorkloadSpec {
            addresses: vec![],
            ..endpoint("a", "10.0.0.1", "ns/h")
        };
        assert!(chosen(&with(h(), vec![unaddressed]), None, 1).is_empty());
    }

    #[test]
    fn the_address_is_of_the_services_and_the_clients_family() {
        let dual = WorkloadSpec {
            addresses: vec![ip("fd00::1"), ip("10.0.0.1")],
            ..endpoint("dual", "10.0.0.1", "ns/h")
        };
        let choose = |ip_families, client: &[&str], destination: &str| {
            let client = workload("client", client);
            let mesh = with(Service { ip_families, ..h() }, vec![dual.clone(), client]);
            let service = mesh.service_by_name("ns/h").unwrap();
            let client = Some(only(&mesh, "client").as_ref());
            let chosen = mesh.choose_endpoint(service, at(destination), client, &mut || 0);
            chosen.unwrap().1.ip()
        };
        let address = |families, client: &str| choose(families, &[client], "10.96.0.1:80");
        assert_eq!(address(IpFamilies::Automatic, "10.0.0.9"), ip("10.0.0.1"));
        assert_eq!(address(IpFamilies::Dual, "fd00::9"), ip("fd00::1"));
        assert_eq!(address(IpFamilies::Ipv4Only, "fd00::9"), ip("10.0.0.1"));
        assert_eq!(address(IpFamilies::Ipv6Only, "10.0.0.9"), ip("fd00::1"));
        let both = ["10.0.0.9", "fd00::9"];
        let address = |destination| choose(IpFamilies::Automatic, &both, destination);
        assert_eq!(address("10.96.0.1:80"), ip("10.0.0.1"));
        assert_eq!(address("[fd00::96]:80"), ip("fd00::1"));
    }

    #[test]
    fn preferences_are_a_filter_when_strict_and_an_order_on_failover() {
        let placed = |uid: &str, ip: &str, region: &str, zone: &str| WorkloadSpec {
            locality: Locality {
                region: region.into(),
                zone: zone.into(),
                subzone: "".into(),
            },
            ..endpoint(uid, ip, "ns/h")
        };
        let workloads = || {
            let client = WorkloadSpec {
                services: vec![],
                ..placed("client", "10.0.0.9", "r", "z")
            };
            vec![
                placed("far", "10.0.0.1", "other", "z"),
                placed("region", "10.0.0.2", "r", "other"),
                placed("zone", "10.0.0.3", "r", "z"),
                client,
            ]
        };
        let preferring = |mode| {
            let routing_preferences = vec![LocalityScope::Region, LocalityScope::Zone];
            rules(LoadBalancer {
                routing_preferences,
                mode,
                ..LoadBalancer::default()
            })
        };
        let without_zone = |mode| {
            let mut workloads = workloads();
            workloads.remove(2);
            chosen(&with(preferring(mode), workloads), Some("client"), 2)
        };
        let all = |mode| chosen(&with(preferring(mode), workloads()), Some("client"), 3);
        assert_eq!(all(LoadBalancerMode::Standard), ["far", "region", "zone"]);
        assert_eq!(all(LoadBalancerMode::Strict), ["zone"; 3]);
        assert_eq!(all(LoadBalancerMode::Failover), ["zone"; 3]);
        assert!(all(LoadBalancerMode::Passthrough).is_empty());
        assert!(without_zone(LoadBalancerMode::Strict).is_empty());
        assert_eq!(without_zone(LoadBalancerMode::Failover), ["region"; 2]);
    }
}

mod annotations {
    use super::*;

    fn asking(uid: &str, namespace: &str, direct: Option<bool>) -> WorkloadSpec {
        WorkloadSpec {
            namespace: namespace.into(),
            annotations: Annotations {
                direct,
                ..Annotations::default()
            },
            ..workload(uid, &[])
        }
    }

    fn namespace(name: &str, direct: Option<bool>) -> Namespace {
        Namespace {
            name: name.into(),
            annotations: Annotations {
                direct,
                ..Annotations::default()
            },
        }
    }

    #[test]
    fn a_pods_word_counts_before_its_namespaces() {
        let resources = MeshResources {
            workloads: vec![
                asking("a", "off", None),
                asking("b", "off", Some(true)),
                asking("c", "on", Some(false)),
                asking("d", "silent", None),
                asking("e", "unknown", None),
            ],
            namespaces: vec![
                namespace("off", Some(false)),
                namespace("on", Some(true)),
                namespace("silent", None),
            ],
            ..MeshResources::default()
        };
        let mesh = Mesh::build(resources, &MeshDefaults::default()).unwrap();
        let direct = ["a", "b", "c", "d", "e"].map(|uid| only(&mesh, uid).direct);
        assert_eq!(direct, [false, true, false, true, true]);
    }

    #[test]
    fn a_namespace_occurs_once() {
        let resources = MeshResources {
            namespaces: vec![namespace("a", None), namespace("a", Some(false))],
            ..MeshResources::default()
        };
        let error = Mesh::build(resources, &MeshDefaults::default()).unwrap_err();
        assert!(
            error.to_string().contains("the namespace a occurs twice"),
            "{error}"
        );
    }
}

mod policies {
    use super::*;

    fn listing(uid: &str, names: &[&str]) -> WorkloadSpec {
        let authorization_policies = names.iter().map(|name| name.parse().unwrap()).collect();
        WorkloadSpec {
            authorization_policies,
            ..workload(uid, &[])
        }
    }

    fn names(mesh: &Mesh, uid: &str) -> Vec<String> {
        mesh.policies_for(only(mesh, uid))
            .policies
            .iter()
            .map(|policy| policy.name.to_string())
            .collect()
    }

    fn connection() -> Connection {
        let source = Identity::new("td", "ns", "sa").unwrap();
        Connection::new(Some(source), ip("10.0.0.1"), "10.0.0.2:80".parse().unwrap())
    }

    #[test]
    fn those_that_apply_are_the_listed_the_namespaces_and_the_global_ones() {
        let policies = vec![
            policy("istio-system/global", Scope::Global, Action::Deny),
            policy("ns/namespace", Scope::Namespace, Action::Deny),
            policy("other/namespace", Scope::Namespace, Action::Deny),
            policy("ns/selector", Scope::WorkloadSelector, Action::Deny),
            policy("ns/unlisted", Scope::WorkloadSelector, Action::Deny),
            policy("istio-system/namespace", Scope::Namespace, Action::Deny),
        ];
        let mesh = mesh(vec![listing("w", &["ns/selector"])], vec![], policies);
        assert_eq!(
            names(&mesh, "w"),
            ["ns/selector", "ns/namespace", "istio-system/global"]
        );
        assert!(mesh.policies_for(only(&mesh, "w")).unknown.is_empty());
    }

    #[test]
    fn one_that_applies_twice_is_there_once() {
        let policies = vec![policy("ns/p", Scope::Namespace, Action::Deny)];
        let mesh = mesh(vec![listing("w", &["ns/p", "ns/p"])], vec![], policies);
        assert_eq!(names(&mesh, "w"), ["ns/p"]);
    }

    #[test]
    fn a_listed_but_unknown_one_refuses_unless_relaxed() {
        let resources = MeshResources {
            workloads: vec![listing("w", &["ns/late", "ns/late"])],
            ..MeshResources::default()
        };
        let strict = Mesh::build(resources.clone(), &MeshDefaults::default()).unwrap();
        let late: PolicyName = "ns/late".parse().unwrap();
        assert_eq!(
            strict.policies_for(only(&strict, "w")).unknown,
            std::slice::from_ref(&late)
        );
        let decision = strict.authorize(only(&strict, "w"), &connection()).decision;
        assert_eq!(decision, Decision::Deny(DenyReason::UnknownPolicy(late)));

        let relaxed = MeshDefaults {
            strictness: Strictness {
                unknown_policy_refuses: false,
            },
            ..MeshDefaults::default()
        };
        let relaxed = Mesh::build(resources, &relaxed).unwrap();
        assert!(
            relaxed
                .authorize(only(&relaxed, "w"), &connection())
                .is_allowed()
        );
    }

    #[test]
    fn of_an_open_connection_only_the_listed_policies_that_count_are_asked() {
        let selector = || policy("ns/selector", Scope::WorkloadSelector, Action::Deny);
        let listed = || vec![listing("w", &["ns/selector", "ns/unknown"])];
        let mesh_of = |policies| mesh(listed(), vec![], policies);
        let none = |_: &PolicyName| false;
        let alone = mesh_of(vec![selector()]);
        let decide = |mesh: &Mesh| mesh.authorize_open(only(mesh, "w"), &connection(), none);
        assert!(
            !alone
                .authorize(only(&alone, "w"), &connection())
                .is_allowed()
        );
        assert!(decide(&alone).is_allowed());
        // That of the namespace is asked in any case, also where the workload lists it.
        let of_namespace = policy("ns/selector", Scope::Namespace, Action::Deny);
        assert!(!decide(&mesh_of(vec![of_namespace])).is_allowed());
    }

    #[test]
    fn a_decision_names_the_same_policy_whatever_the_order_of_the_resources() {
        let one = || policy("ns/a", Scope::Namespace, Action::Deny);
        let other = || policy("ns/b", Scope::Namespace, Action::Deny);
        for policies in [vec![one(), other()], vec![other(), one()]] {
            let mesh = mesh(vec![workload("w", &[])], vec![], policies);
            let evaluation = mesh.authorize(only(&mesh, "w"), &connection());
            assert_eq!(evaluation.decision.to_string(), "denied by policy ns/a");
        }
    }
}

mod store {
    use super::*;

    #[tokio::test]
    async fn a_subscriber_who_sees_a_revision_finds_its_mesh() {
        let store = Store::new();
        let mut news = store.subscribe();
        assert_eq!(store.revision(), Revision(0));
        assert_eq!(store.load().workloads().len(), 0);

        let old = store.load();
        assert_eq!(
            store.replace(mesh(vec![workload("a", &[])], vec![], vec![])),
            Revision(1)
        );
        news.changed().await.unwrap();
        assert_eq!(*news.borrow_and_update(), Revision(1));
        assert!(store.load().workload_by_uid("a").is_some());
        assert!(old.workload_by_uid("a").is_none(), "a snapshot changed");
    }
}
