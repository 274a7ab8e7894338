//! From the mesh file through encoding and decoding, field by field.

use super::*;
use crate::mesh::{Mesh, MeshDefaults, ServiceName};
use crate::policy::PolicyName;
use crate::xds::LocalFile;

const MESH: &str = r#"
workloads:
  - uid: cluster//Pod/shop/web
    name: web
    namespace: shop
    serviceAccount: web
    trustDomain: mesh.local
    workloadIps: [10.1.2.3, "fd00::1"]
    network: net1
    networkMode: HostNetwork
    protocol: HBONE
    node: n1
    hostname: web.example
    waypoint: {destination: shop/waypoint.shop, hboneMtlsPort: 15009}
    networkGateway: {destination: net2/10.9.9.9}
    services: {shop/web.shop: {80: 8080, 443: 0}}
    authorizationPolicies: [shop/only-cart]
    status: Unhealthy
    clusterId: c1
    locality: {region: r, zone: z, subzone: s}
    capacity: 7
    canonicalName: web-canonical
    canonicalRevision: v1
    workloadName: web-deployment
    annotations: {culvert.dev/direct: "off"}
  - {uid: plain, name: plain, namespace: shop}
services:
  - name: web
    namespace: shop
    hostname: web.shop
    vips: [net1/10.96.0.1, net1/10.97.0.0/16]
    ports: {80: 8080}
    subjectAltNames: [spiffe://mesh.local/ns/shop/sa/other]
    weightedWaypoints: [{destination: shop/a.shop, weight: 9}, {destination: shop/b.shop, weight: 1}]
    loadBalancer: {routingPreferences: [REGION, ZONE], mode: Failover, healthPolicy: AllowAll}
    ipFamilies: IPv4
    canonical: true
policies:
  - name: only-cart
    namespace: shop
    scope: WorkloadSelector
    action: Allow
    dryRun: true
    rules:
      - - - {namespaces: [shop, "a*"], notNamespaces: ["*b"], principals: ["*"], sourceIps: [10.0.0.0/8], destinationPorts: [80]}
          - {serviceAccounts: [shop/cart], notDestinationPorts: [81], notPrincipals: [mesh.local/ns/x/sa/y]}
"#;

fn mesh() -> Mesh {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), MESH).unwrap();
    let resources = LocalFile::new(file.path()).load().unwrap();
    Mesh::build(resources, &MeshDefaults::default()).unwrap()
}

fn decoded<M: prost::Message + Default>(message: &impl prost::Message) -> M {
    M::decode(message.encode_to_vec().as_slice()).unwrap()
}

#[test]
fn a_workload_keeps_every_field() {
    let mesh = mesh();
    let spec = mesh.workload_by_uid("cluster//Pod/shop/web").unwrap();
    let address: wire::Address = decoded(&workload(spec));
    let Some(Type::Workload(workload)) = address.r#type else {
        panic!("{address:?}");
    };
    let port = |service_port, target_port| wire::Port {
        service_port,
        target_port,
        app_protocol: 0,
    };
    let ports = wire::PortList {
        ports: vec![port(80, 8080), port(443, 0)],
    };
    let expected = wire::Workload {
        uid: "cluster//Pod/shop/web".into(),
        name: "web".into(),
        namespace: "shop".into(),
        addresses: vec![
            Bytes::from_static(&[10, 1, 2, 3]),
            Bytes::from_static(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ],
        hostname: "web.example".into(),
        network: "net1".into(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        trust_domain: "mesh.local".into(),
        service_account: "web".into(),
        waypoint: Some(wire::GatewayAddress {
            hbone_mtls_port: 15009,
            destination: Some(Destination::Hostname(wire::NamespacedHostname {
                namespace: "shop".into(),
                hostname: "waypoint.shop".into(),
            })),
        }),
        network_gateway: Some(wire::GatewayAddress {
            hbone_mtls_port: 15008,
            destination: Some(Destination::Address(wire::NetworkAddress {
                network: "net2".into(),
                address: Bytes::from_static(&[10, 9, 9, 9]),
                length: None,
            })),
        }),
        node: "n1".into(),
        canonical_name: "web-canonical".into(),
        canonical_revision: "v1".into(),
        workload_type: wire::WorkloadType::Pod.into(),
        workload_name: "web-deployment".into(),
        services: [("shop/web.shop".to_owned(), ports)].into(),
        authorization_policies: vec!["shop/only-cart".into()],
        status: wire::WorkloadStatus::Unhealthy.into(),
        cluster_id: "c1".into(),
        locality: Some(wire::Locality {
            region: "r".into(),
            zone: "z".into(),
            subzone: "s".into(),
        }),
        network_mode: wire::NetworkMode::HostNetwork.into(),
        capacity: Some(7),
        ..wire::Workload::default()
    };
    assert_eq!(workload, expected);
}

#[test]
fn a_service_keeps_every_field() {
    let mesh = mesh();
    let name = ServiceName::new("shop", "web.shop").unwrap();
    let address: wire::Address = decoded(&service(mesh.service_by_name(name.as_str()).unwrap()));
    let vip = |address: [u8; 4], length| wire::NetworkAddress {
        network: "net1".into(),
        address: Bytes::copy_from_slice(&address),
        length,
    };
    let waypoint = |hostname: &str, weight| wire::WeightedWaypoint {
        destination: Some(wire::GatewayAddress {
            hbone_mtls_port: 15008,
            destination: Some(Destination::Hostname(wire::NamespacedHostname {
                namespace: "shop".into(),
                hostname: hostname.into(),
            })),
        }),
        weight,
    };
    let expected = wire::Service {
        name: "web".into(),
        namespace: "shop".into(),
        hostname: "web.shop".into(),
        addresses: vec![vip([10, 96, 0, 1], None), vip([10, 97, 0, 0], Some(16))],
        ports: vec![wire::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
        subject_alt_names: vec!["spiffe://mesh.local/ns/shop/sa/other".into()],
        load_balancing: Some(wire::LoadBalancing {
            routing_preference: vec![
                load_balancing::Scope::Region.into(),
                load_balancing::Scope::Zone.into(),
            ],
            mode: load_balancing::Mode::Failover.into(),
            health_policy: load_balancing::HealthPolicy::AllowAll.into(),
        }),
        ip_families: wire::IpFamilies::Ipv4Only.into(),
        canonical: true,
        weighted_waypoints: vec![waypoint("a.shop", 9), waypoint("b.shop", 1)],
        ..wire::Service::default()
    };
    assert_eq!(address.r#type, Some(Type::Service(expected)));
}

#[test]
fn a_policy_keeps_every_condition() {
    use security::string_match::MatchType;
    let mesh = mesh();
    let name = PolicyName::new("shop", "only-cart").unwrap();
    let policy: security::Authorization = decoded(&authorization(mesh.policy(&name).unwrap()));
    let text = |kind| security::StringMatch {
        match_type: Some(kind),
    };
    let first = security::Match {
        namespaces: vec![
            text(MatchType::Exact("shop".into())),
            text(MatchType::Prefix("a".into())),
        ],
        not_namespaces: vec![text(MatchType::Suffix("b".into()))],
        principals: vec![text(MatchType::Presence(()))],
        source_ips: vec![security::Address {
            address: Bytes::from_static(&[10, 0, 0, 0]),
            length: 8,
        }],
        destination_ports: vec![80],
        ..security::Match::default()
    };
    let second = security::Match {
        service_accounts: vec![security::ServiceAccountMatch {
            namespace: "shop".into(),
            service_account: "cart".into(),
        }],
        not_destination_ports: vec![81],
        not_principals: vec![text(MatchType::Exact("mesh.local/ns/x/sa/y".into()))],
        ..security::Match::default()
    };
    let clause = security::Clause {
        matches: vec![first, second],
    };
    let expected = security::Authorization {
        name: "only-cart".into(),
        namespace: "shop".into(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Allow.into(),
        rules: vec![security::Rule {
            clauses: vec![clause],
        }],
        dry_run: true,
    };
    assert_eq!(policy, expected);
}
