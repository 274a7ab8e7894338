use super::*;
use crate::policy::{Action, Scope, StringMatch};
use crate::wire::istio::security;

fn read(message: wire::Workload) -> Result<WorkloadSpec, ResourceError> {
    workload(message, &mut Shared::default())
}

fn pod() -> wire::Workload {
    wire::Workload {
        uid: "cluster//Pod/ns/pod".to_owned(),
        name: "pod".to_owned(),
        namespace: "ns".to_owned(),
        ..wire::Workload::default()
    }
}

fn host() -> wire::Service {
    wire::Service {
        namespace: "ns".to_owned(),
        hostname: "h".to_owned(),
        ..wire::Service::default()
    }
}

fn gateway_at(port: u32) -> wire::GatewayAddress {
    let address = wire::NetworkAddress {
        network: "net".to_owned(),
        address: vec![10, 0, 0, 1].into(),
        length: None,
    };
    wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Address(address)),
        hbone_mtls_port: port,
    }
}

#[test]
fn addresses_are_of_4_or_16_bytes_and_never_mapped() {
    let mapped = [&[0; 10][..], &[0xff, 0xff, 10, 0, 0, 2]].concat();
    let spec = read(wire::Workload {
        addresses: vec![vec![10, 0, 0, 1].into(), mapped.into()],
        ..pod()
    });
    let expected: Vec<IpAddr> = vec![[10, 0, 0, 1].into(), [10, 0, 0, 2].into()];
    assert_eq!(spec.unwrap().addresses, expected);
    for length in [0, 3, 5, 15, 17] {
        let error = read(wire::Workload {
            addresses: vec![vec![0; length].into()],
            ..pod()
        });
        let field = "address";
        assert_eq!(error.unwrap_err(), ResourceError::Address { field, length });
    }
}

#[test]
fn values_that_are_not_known_are_refused() {
    let changes: [fn(&mut wire::Workload); 3] = [
        |it| it.tunnel_protocol = 9,
        |it| it.status = -1,
        |it| it.network_mode = 2,
    ];
    for change in changes {
        let mut message = pod();
        change(&mut message);
        let error = read(message).unwrap_err();
        assert!(matches!(error, ResourceError::Unknown { .. }), "{error}");
    }
    let changes: [fn(&mut wire::Service); 5] = [
        |it| it.ip_families = 4,
        |it| it.visibility = 7,
        |it| {
            it.load_balancing = Some(wire::LoadBalancing {
                mode: 4,
                ..Default::default()
            })
        },
        |it| {
            it.load_balancing = Some(wire::LoadBalancing {
                routing_preference: vec![0],
                ..Default::default()
            });
        },
        |it| {
            it.load_balancing = Some(wire::LoadBalancing {
                health_policy: 2,
                ..Default::default()
            });
        },
    ];
    for change in changes {
        let mut message = host();
        change(&mut message);
        let error = service(message, &mut Shared::default()).unwrap_err();
        assert!(matches!(error, ResourceError::Unknown { .. }), "{error}");
    }
}

#[test]
fn ports_and_prefixes_have_their_limits() {
    let ports = |service_port, target_port| wire::Service {
        ports: vec![wire::Port {
            service_port,
            target_port,
            app_protocol: 0,
        }],
        ..host()
    };
    for (message, words) in [
        (ports(65536, 1), "service port 65536"),
        (ports(1, u32::MAX), "target port 4294967295"),
        (
            wire::Service {
                addresses: vec![wire::NetworkAddress {
                    address: vec![10, 0, 0, 0].into(),
                    length: Some(33),
                    ..Default::default()
                }],
                ..host()
            },
            "prefix of 33 bits",
        ),
        (
            wire::Service {
                waypoint: Some(gateway_at(65536)),
                ..host()
            },
            "HBONE port 65536",
        ),
        (
            wire::Service {
                waypoint: Some(gateway_at(0)),
                ..host()
            },
            "no gateway's HBONE port",
        ),
        (
            wire::Service {
                waypoint: Some(wire::GatewayAddress {
                    destination: None,
                    hbone_mtls_port: 15008,
                }),
                ..host()
            },
            "no gateway's destination",
        ),
        (
            wire::Service {
                ports: vec![wire::Port::default(); MOST + 1],
                ..host()
            },
            "4097 ports",
        ),
        (
            wire::Service {
                hostname: String::new(),
                ..host()
            },
            "not a service's name",
        ),
    ] {
        let error = service(message, &mut Shared::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn a_range_of_addresses_is_a_services() {
    let message = wire::Service {
        addresses: vec![wire::NetworkAddress {
            network: "net".to_owned(),
            address: vec![10, 1, 2, 3].into(),
            length: Some(16),
        }],
        ..host()
    };
    let service = service(message, &mut Shared::default()).unwrap();
    assert_eq!(service.vips, ["net/10.1.0.0/16".parse().unwrap()]);
}

#[test]
fn of_waypoints_by_weight_those_with_one_are_taken_and_never_none() {
    let weighted = |weight, port| wire::WeightedWaypoint {
        destination: Some(gateway_at(port)),
        weight,
    };
    let read = |only, weighted_waypoints: &[wire::WeightedWaypoint]| {
        let message = wire::Service {
            waypoint: only,
            weighted_waypoints: weighted_waypoints.to_vec(),
            ..host()
        };
        let waypoints = service(message, &mut Shared::default())?
            .waypoints
            .into_iter();
        let found = waypoints.map(|one| (one.gateway.hbone_mtls_port, one.weight.get()));
        Ok::<_, ResourceError>(found.collect::<Vec<_>>())
    };
    let all = [weighted(10, 1), weighted(90, 2), weighted(0, 3)];
    let only = || Some(gateway_at(4));
    assert_eq!(read(None, &all).unwrap(), [(1, 10), (2, 90)]);
    assert_eq!(read(only(), &all).unwrap(), [(1, 10), (2, 90)]);
    assert_eq!(read(only(), &all[2..]).unwrap(), [(4, 1)]);
    assert_eq!(read(only(), &[]).unwrap(), [(4, 1)]);
    assert!(read(None, &[]).unwrap().is_empty());
    let refused = ResourceError::Missing("waypoint with a weight");
    assert_eq!(read(None, &all[2..]), Err(refused));
}

fn pattern(kind: security::string_match::MatchType) -> security::StringMatch {
    security::StringMatch {
        match_type: Some(kind),
    }
}

fn policy_of(matching: security::Match) -> security::Authorization {
    security::Authorization {
        name: "p".to_owned(),
        namespace: "ns".to_owned(),
        scope: 2,
        action: 1,
        dry_run: true,
        rules: vec![security::Rule {
            clauses: vec![security::Clause {
                matches: vec![matching],
            }],
        }],
    }
}

#[test]
fn a_policy_is_read_in_full() {
    use security::string_match::MatchType::{Exact, Prefix, Presence, Suffix};
    let net = |length| security::Address {
        address: vec![10, 0, 0, 0].into(),
        length,
    };
    let message = policy_of(security::Match {
        namespaces: vec![pattern(Prefix("n".to_owned()))],
        principals: vec![
            pattern(Exact("spiffe://td/ns/a/sa/b".to_owned())),
            pattern(Suffix("/b".to_owned())),
        ],
        not_principals: vec![pattern(Presence(()))],
        not_source_ips: vec![net(8)],
        destination_ports: vec![443],
        service_accounts: vec![security::ServiceAccountMatch {
            namespace: "ns".to_owned(),
            service_account: "sa".to_owned(),
        }],
        ..security::Match::default()
    });
    let policy = policy(message).unwrap();
    assert_eq!(policy.name.as_str(), "ns/p");
    assert_eq!(
        (policy.scope, policy.action),
        (Scope::WorkloadSelector, Action::Deny)
    );
    assert!(policy.dry_run);
    let found = &policy.rules[0].clauses[0].matches[0];
    assert_eq!(found.namespaces, [StringMatch::Prefix("n".into())]);
    assert_eq!(
        found.principals,
        [
            StringMatch::Exact("td/ns/a/sa/b".into()),
            StringMatch::Suffix("/b".into())
        ]
    );
    assert_eq!(found.not_principals, [StringMatch::Presence]);
    assert_eq!(found.not_source_ips, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(found.destination_ports, [443]);
    assert_eq!(&*found.service_accounts[0].service_account, "sa");
}

#[test]
fn a_policy_with_anything_wrong_is_refused_as_a_whole() {
    let empty = security::StringMatch { match_type: None };
    for (message, words) in [
        (
            policy_of(security::Match {
                not_principals: vec![empty],
                ..Default::default()
            }),
            "has no principal",
        ),
        (
            policy_of(security::Match {
                destination_ports: vec![70_000],
                ..Default::default()
            }),
            "destination port 70000",
        ),
        (
            policy_of(security::Match {
                source_ips: vec![security::Address {
                    address: vec![10, 0, 0, 0].into(),
                    length: 40,
                }],
                ..Default::default()
            }),
            "prefix of 40 bits",
        ),
        (
            security::Authorization {
                scope: 3,
                ..policy_of(Default::default())
            },
            "the scope 3",
        ),
        (
            security::Authorization {
                action: 2,
                ..policy_of(Default::default())
            },
            "the action 2",
        ),
        (
            security::Authorization {
                name: "a/b".to_owned(),
                ..policy_of(Default::default())
            },
            "not a policy's name",
        ),
    ] {
        let error = policy(message).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn texts_that_nobody_uses_are_not_kept() {
    let mut shared = Shared::default();
    let kept = shared.text("kept");
    for number in 0..10 * Shared::FEW {
        shared.text(&number.to_string());
    }
    assert!(shared.texts.len() <= 2 * Shared::FEW);
    assert!(Arc::ptr_eq(&kept, &shared.text("kept")));
}
