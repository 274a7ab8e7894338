//! Files that are a mesh, and files that are not: each wrong one is refused where it is wrong.

use std::io::Write;

use super::*;
use crate::mesh::*;
use crate::policy::{Action, Scope, StringMatch};

fn written(text: impl AsRef<[u8]>) -> (tempfile::TempDir, LocalFile) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mesh.yaml");
    std::fs::File::create(&path)
        .unwrap()
        .write_all(text.as_ref())
        .unwrap();
    (directory, LocalFile::new(path))
}

fn load(text: impl AsRef<[u8]>) -> Result<MeshResources, LocalFileError> {
    written(text).1.load()
}

fn refused(text: impl AsRef<[u8]>) -> (u64, u64, String) {
    match load(text.as_ref()) {
        Err(LocalFileError::Text(YamlError {
            line,
            column,
            message,
            ..
        })) => (line, column, message),
        other => panic!(
            "{:?} gave {other:?}",
            String::from_utf8_lossy(text.as_ref())
        ),
    }
}

const FULL: &str = r#"
workloads:
  - uid: cluster1//Pod/web/front-1
    name: front-1
    namespace: web
    serviceAccount: front
    trustDomain: td.example
    workloadIps: [10.0.0.1, "::ffff:10.0.0.2", "fd00::1"]
    network: net1
    networkMode: HostNetwork
    protocol: HBONE
    node: node-1
    hostname: front.example
    waypoint: {destination: web/waypoint.example, hboneMtlsPort: 15018}
    networkGateway: {destination: net1/192.0.2.7}
    services:
      web/front.example: {80: 8080, 443: 8443}
      web/other.example: {}
    authorizationPolicies: [web/by-label]
    status: Unhealthy
    clusterId: cluster1
    locality: {region: r, zone: z, subzone: s}
    capacity: 3
    canonicalName: front
    canonicalRevision: v1
    workloadName: front
    annotations: {culvert.dev/direct: "off"}
services:
  - name: front
    namespace: web
    hostname: front.example
    vips: [net1/10.96.0.1, "net1/10.97.0.0/16", "/fd00::96"]
    ports: {80: 8080, 443: 0}
    subjectAltNames: ["spiffe://td.example/ns/web/sa/front"]
    waypoint: {destination: "/10.0.0.8"}
    weightedWaypoints:
      - {destination: "/10.0.0.9", weight: 1}
      - {destination: web/canary.example, hboneMtlsPort: 15018, weight: 3}
    loadBalancer:
      routingPreferences: [NETWORK, REGION, ZONE, SUBZONE, NODE, CLUSTER]
      mode: Failover
      healthPolicy: AllowAll
    ipFamilies: IPv4
    canonical: true
policies:
  - name: by-label
    namespace: web
    scope: WorkloadSelector
    action: Deny
    dryRun: true
    rules:
      - - - namespaces: [db, db*, "*db", "*"]
            notNamespaces: [{exact: "a*b"}, {prefix: p}, {suffix: s}, {presence: {}}]
          - principals: [td.example/ns/web/sa/front]
            notPrincipals: ["*"]
            serviceAccounts: [{namespace: web, serviceAccount: front}, web/front]
            notServiceAccounts: [web/other]
        - - sourceIps: [10.0.0.0/8, 10.1.2.3, "fd00::/8"]
            notSourceIps: ["::ffff:10.0.0.0/104"]
            destinationIps: [10.1.2.3/16]
            notDestinationIps: [0.0.0.0/0]
            destinationPorts: [80, 65535]
            notDestinationPorts: [1]
      - []
"#;

#[test]
fn every_documented_key_is_read() {
    let resources = load(FULL).unwrap();
    let ports = |pairs: &[(u16, u16)]| pairs.iter().copied().collect::<PortMap>();

    let workload = &resources.workloads[0];
    let gateway = |text: &str, hbone_mtls_port| {
        let destination = match text.parse::<NetworkAddress>() {
            Ok(address) => GatewayDestination::Address(address),
            Err(_) => GatewayDestination::Service(text.parse().unwrap()),
        };
        Some(GatewayAddress {
            destination,
            hbone_mtls_port,
        })
    };
    let expected = WorkloadSpec {
        uid: "cluster1//Pod/web/front-1".into(),
        name: "front-1".into(),
        namespace: "web".into(),
        service_account: "front".into(),
        trust_domain: "td.example".into(),
        addresses: ["10.0.0.1", "10.0.0.2", "fd00::1"]
            .map(|ip| ip.parse().unwrap())
            .to_vec(),
        network: "net1".into(),
        host_network: true,
        protocol: TunnelProtocol::Hbone,
        node: "node-1".into(),
        hostname: "front.example".into(),
        waypoint: gateway("web/waypoint.example", 15018),
        network_gateway: gateway("net1/192.0.2.7", 15008),
        services: vec![
            (
                "web/front.example".parse().unwrap(),
                ports(&[(80, 8080), (443, 8443)]),
            ),
            ("web/other.example".parse().unwrap(), ports(&[])),
        ],
        authorization_policies: vec!["web/by-label".parse().unwrap()],
        status: Health::Unhealthy,
        cluster_id: "cluster1".into(),
        locality: Locality {
            region: "r".into(),
            zone: "z".into(),
            subzone: "s".into(),
        },
        capacity: Some(3),
        canonical_name: "front".into(),
        canonical_revision: "v1".into(),
        workload_name: "front".into(),
        annotations: Annotations {
            direct: Some(false),
            ..Annotations::default()
        },
    };
    assert_eq!(*workload, expected);

    let service = &resources.services[0];
    let weighted = |name, port, weight: u32| WeightedWaypoint {
        gateway: gateway(name, port).unwrap(),
        weight: weight.try_into().unwrap(),
    };
    let waypoints = vec![
        weighted("/10.0.0.9", 15008, 1),
        weighted("web/canary.example", 15018, 3),
    ];
    let expected = Service {
        id: "web/front.example".parse().unwrap(),
        name: "front".into(),
        vips: ["net1/10.96.0.1", "net1/10.97.0.0/16", "/fd00::96"]
            .map(|vip| vip.parse().unwrap())
            .to_vec(),
        ports: ports(&[(80, 8080), (443, 0)]),
        subject_alt_names: vec!["spiffe://td.example/ns/web/sa/front".into()],
        waypoints,
        load_balancer: LoadBalancer {
            routing_preferences: vec![
                LocalityScope::Network,
                LocalityScope::Region,
                LocalityScope::Zone,
                LocalityScope::Subzone,
                LocalityScope::Node,
                LocalityScope::Cluster,
            ],
            mode: LoadBalancerMode::Failover,
            health_policy: HealthPolicy::AllowAll,
        },
        ip_families: IpFamilies::Ipv4Only,
        canonical: true,
    };
    assert_eq!(*service, expected);

    let policy = &resources.policies[0];
    assert_eq!(policy.name.as_str(), "web/by-label");
    assert_eq!(
        (policy.scope, policy.action, policy.dry_run),
        (Scope::WorkloadSelector, Action::Deny, true)
    );
    let [rule, always] = &policy.rules[..] else {
        panic!("{:?}", policy.rules)
    };
    assert!(always.clauses.is_empty());
    let [first, second] = &rule.clauses[..] else {
        panic!("{rule:?}")
    };
    let exact = |text: &str| StringMatch::Exact(text.into());
    let prefix = |text: &str| StringMatch::Prefix(text.into());
    let suffix = |text: &str| StringMatch::Suffix(text.into());
    assert_eq!(
        first.matches[0].namespaces,
        [
            exact("db"),
            prefix("db"),
            suffix("db"),
            StringMatch::Presence
        ]
    );
    assert_eq!(
        first.matches[0].not_namespaces,
        [
            exact("a*b"),
            prefix("p"),
            suffix("s"),
            StringMatch::Presence
        ]
    );
    assert_eq!(
        first.matches[1].principals,
        [exact("td.example/ns/web/sa/front")]
    );
    assert_eq!(first.matches[1].not_principals, [StringMatch::Presence]);
    assert_eq!(
        first.matches[1].service_accounts[0],
        first.matches[1].service_accounts[1]
    );
    assert_eq!(
        &*first.matches[1].not_service_accounts[0].service_account,
        "other"
    );
    let nets = |texts: &[&str]| {
        texts
            .iter()
            .map(|net| net.parse().unwrap())
            .collect::<Vec<ipnet::IpNet>>()
    };
    assert_eq!(
        second.matches[0].source_ips,
        nets(&["10.0.0.0/8", "10.1.2.3/32", "fd00::/8"])
    );
    assert_eq!(second.matches[0].not_source_ips, nets(&["10.0.0.0/8"]));
    assert_eq!(second.matches[0].destination_ips, nets(&["10.1.0.0/16"]));
    assert_eq!(second.matches[0].not_destination_ips, nets(&["0.0.0.0/0"]));
    assert_eq!(second.matches[0].destination_ports, [80, 65535]);
    assert_eq!(second.matches[0].not_destination_ports, [1]);
}

#[test]
fn what_is_left_out_has_defaults() {
    let text = "workloads: [{uid: u, name: n, namespace: ns}]\nservices: [{name: s, namespace: ns, hostname: h}]\n";
    let resources = load(text).unwrap();
    let expected = WorkloadSpec {
        uid: "u".into(),
        name: "n".into(),
        namespace: "ns".into(),
        ..Default::default()
    };
    assert_eq!(resources.workloads, [expected]);
    assert_eq!(resources.services[0].load_balancer, LoadBalancer::default());
    assert!(resources.policies.is_empty());
}

#[test]
fn a_file_that_says_nothing_is_not_an_empty_mesh() {
    for text in ["", "\n", "# later\n", "---\n", "workloads:\n"] {
        assert!(
            matches!(load(text), Err(LocalFileError::Empty { .. })),
            "{text:?}"
        );
    }
    assert_eq!(load("workloads: []").unwrap(), MeshResources::default());
}

/// Each wrong line, alone after the beginning of a right file, with `»` before the wrong place, and a word that the error must
/// have.
#[test]
fn what_is_wrong_is_named_with_line_and_column() {
    let workload = "workloads:\n- uid: u\n  name: n\n  namespace: ns\n";
    let service = "services:\n- name: n\n  namespace: ns\n  hostname: h\n";
    let policy = "policies:\n- name: n\n  namespace: ns\n  scope: Namespace\n  action: Deny\n";
    let mut failures = vec![];
    for (beginning, marked, word) in [
        (workload, "  »workloadIPs: []", "workloadIPs"),
        (
            workload,
            "  workloadIps: [10.0.0.1, »10.0.0.256]",
            "IP address",
        ),
        (workload, "  workloadIps: [»10.0.0.1/32]", "IP address"),
        (workload, "  protocol: »QUIC", "HBONE"),
        (workload, "  status: »Ill", "Healthy"),
        (workload, "  capacity: »-1", "capacity"),
        (workload, "  capacity: »4294967296", "capacity"),
        (workload, "  services: {»h: {}}", "namespace/hostname"),
        (workload, "  services: {ns/h: {80: »65536}}", "65535"),
        (workload, "  services: {ns/h: {»65536: 80}}", "65535"),
        (workload, "  services: {ns/h: {»0: 80}}", "65535"),
        (workload, "  services: {ns/h: {80: 1, »80: 2}}", "twice"),
        (workload, "  services: {ns/h: {80: »+1}}", "65535"),
        (
            workload,
            "  waypoint: {destination: »h}",
            "namespace/hostname or network/ip",
        ),
        (
            workload,
            "  waypoint: {destination: »ns/h/x}",
            "namespace/hostname or network/ip",
        ),
        (
            workload,
            "  waypoint: {destination: ns/h, hboneMtlsPort: »99999}",
            "65535",
        ),
        (workload, "  waypoint: {»hboneMtlsPort: 1}", "destination"),
        (workload, "  authorizationPolicies: [»a]", "namespace/name"),
        (workload, "  locality: {»regoin: r}", "region"),
        (workload, "  »name: again", "twice"),
        (service, "  vips: [»10.96.0.1]", "network/ip"),
        (service, "  vips: [»net/10.96.0.1/33]", "network/ip"),
        (service, "  ports: {»http: 80}", "65535"),
        (service, "  ipFamilies: »IPv5", "IPv4"),
        (service, "  canonical: »maybe", "bool"),
        (service, "  loadBalancer: {mode: »Best}", "Strict"),
        (
            service,
            "  loadBalancer: {routingPreferences: [»PLANET]}",
            "REGION",
        ),
        (policy, "  »rule: []", "rules"),
        (policy, "  rules: [[[{sourceIps: [»10.0.0.0/33]}]]]", "CIDR"),
        (policy, "  rules: [[[{sourceIps: [»10.0.0]}]]]", "CIDR"),
        (
            policy,
            "  rules: [[[{destinationPorts: [»65536]}]]]",
            "65535",
        ),
        (policy, "  rules: [[[{destinationPorts: [»'']}]]]", "65535"),
        (policy, "  rules: [[[{»principal: [a]}]]]", "principals"),
        (policy, "  rules: [[[{principals: [»'']}]]]", "foo*"),
        (policy, "  rules: [[[{principals: [»'**']}]]]", "foo*"),
        (policy, "  rules: [[[{principals: [»'*a*']}]]]", "foo*"),
        (policy, "  rules: [[[{principals: [»'a*b']}]]]", "foo*"),
        (
            policy,
            "  rules: [[[{principals: [»spiffe://td/ns/a/sa/b]}]]]",
            "without spiffe://",
        ),
        (policy, "  rules: [[[{namespaces: [»*web]}]]]", "quotes"),
        (
            policy,
            "  rules: [[[{namespaces: [{exact: »''}]}]]]",
            "empty",
        ),
        (
            policy,
            "  rules: [[[{namespaces: [{»regex: a}]}]]]",
            "exact",
        ),
        (
            policy,
            "  rules: [[[{serviceAccounts: [»a]}]]]",
            "namespace/name",
        ),
        (policy, "  rules: [[»{namespaces: [a]}]]", "sequence"),
        (policy, "  dryRun: »1", "bool"),
    ] {
        let column = marked.split('»').next().unwrap().len() as u64 + 1;
        let line = marked.replace('»', "");
        let text = format!("{beginning}{line}\n");
        let (found_line, found_column, message) = refused(&text);
        let expected_line = text.lines().count() as u64;
        if (found_line, found_column) != (expected_line, column) || !message.contains(word) {
            failures.push(format!("{marked}: {found_line}:{found_column}: {message}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    for (text, word) in [
        (
            "policies:\n- name: n\n  namespace: ns\n  scope: Namespace\n",
            "action",
        ),
        (
            "policies:\n- name: n\n  namespace: ns\n  action: Deny\n",
            "scope",
        ),
        (
            "policies:\n- name: n\n  namespace: ns\n  scope: All\n",
            "WorkloadSelector",
        ),
        ("policies:\n- name: a/b\n", "slash"),
        (
            "policies:\n- name: n\n  namespace: ns\n  scope: Global\n  action: Log\n",
            "Allow",
        ),
        (
            "policies:\n- name: n\n  namespace: ns\n  scope: Global\n  action: Deny\n  rules: [[[{namespaces: [{exact: a, prefix: b}]}]]]\n",
            "one thing",
        ),
        (
            "policies:\n- name: n\n  namespace: ns\n  scope: Global\n  action: Deny\n  rules: [[[{namespaces: [{}]}]]]\n",
            "one thing",
        ),
        ("workloads:\n- uid: u\n", "name"),
        ("worklods: []\n", "workloads"),
        ("workloads: [\n", "'['"),
        ("- a\n", "map"),
        ("workloads:\n\t- uid: u\n", "tab"),
        ("workloads: []\n---\npolicies: []\n", "document"),
    ] {
        let (line, column, message) = refused(text);
        assert!(line > 0 && column > 0, "{text:?}: {message}");
        assert!(message.contains(word), "{text:?}: {message}");
    }
}

#[test]
fn an_error_reads_like_a_compilers() {
    let (directory, file) = written("workloads: []\npolicy: []\n");
    let error = file.load().unwrap_err().to_string();
    let path = directory.path().join("mesh.yaml");
    assert!(
        error.starts_with(&format!("{}:2:1: ", path.display())),
        "{error}"
    );
}

#[test]
fn what_a_file_says_cannot_write_lines_into_a_log() {
    let (_, _, message) = refused("\"a\\n\\e[31mERROR\": 1\n");
    assert!(!message.contains(char::is_control), "{message:?}");
}

#[test]
fn a_text_that_is_not_utf8_is_refused_where_it_is_not() {
    assert_eq!(
        refused(b"workloads: []\n# \xc3\xa9 \xff\n"),
        (2, 5, "not UTF-8; save the file as UTF-8".to_owned())
    );
}

#[test]
fn a_missing_file_and_a_directory_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    for path in [
        directory.path().join("missing"),
        directory.path().to_owned(),
        "/dev/zero".into(),
    ] {
        assert!(
            matches!(
                LocalFile::new(&path).load(),
                Err(LocalFileError::File(WatchedFileError::Read { .. }))
            ),
            "{path:?}"
        );
    }
}

#[test]
fn a_file_that_is_too_large_is_refused() {
    let (_directory, file) = written("");
    std::fs::OpenOptions::new()
        .write(true)
        .open(file.path())
        .unwrap()
        .set_len(MAX_BYTES + 1)
        .unwrap();
    assert!(matches!(
        file.load(),
        Err(LocalFileError::File(WatchedFileError::TooLarge { .. }))
    ));
}

#[test]
fn aliases_cannot_multiply_without_bound() {
    let mut bomb = "workloads: &a0 [[]]\n".to_owned();
    for level in 1..10 {
        let uses = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb += &format!("a{level}: &a{level} [{uses}]\n");
    }
    refused(&bomb);

    // Within the types: a long text, many times.
    let long = "x".repeat(1 << 20);
    let uses = ", *a".repeat(9_000);
    refused(format!(
        "services: [{{name: n, namespace: ns, hostname: h, subjectAltNames: [&a {long}{uses}]}}]"
    ));
}

#[test]
fn an_alias_saves_a_repetition() {
    let text = "workloads:\n- {uid: a, name: a, namespace: &ns web}\n- {uid: b, name: b, namespace: *ns}\n";
    assert_eq!(&*load(text).unwrap().workloads[1].namespace, "web");
}

#[test]
fn nesting_is_bounded() {
    for depth in [40, 100_000] {
        refused(format!(
            "policies: {}{}",
            "[".repeat(depth),
            "]".repeat(depth)
        ));
        refused(format!("policies:\n{}", "- ".repeat(depth)));
    }
}

proptest::proptest! {
    #[test]
    fn any_prefix_of_a_file_is_read_or_refused(end in 0..FULL.len()) {
        let _ = parse(Path::new("mesh.yaml"), &FULL.as_bytes()[..end]);
    }

    #[test]
    fn a_damaged_file_is_read_or_refused(at in 0..FULL.len(), with in "[-:{}\\[\\]*&!|>'\"%@`#,? \n\ta0]{1,3}") {
        let mut text = FULL.to_owned();
        text.replace_range(at..at + 1, &with);
        let _ = parse(Path::new("mesh.yaml"), text.as_bytes());
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
        let _ = parse(Path::new("mesh.yaml"), &bytes);
    }
}

mod annotations {
    use super::*;

    fn of_workload(annotations: &str) -> String {
        format!(
            "workloads:\n  - {{uid: u, name: n, namespace: ns}}\n  - uid: v\n    name: m\n    namespace: ns\n    annotations: {annotations}\n"
        )
    }

    #[test]
    fn direct_is_on_off_or_not_said() {
        for (written, direct) in [
            ("{culvert.dev/direct: off}", Some(false)),
            ("{culvert.dev/direct: \"off\"}", Some(false)),
            ("{\"culvert.dev/direct\": 'on', team: web}", Some(true)),
            (
                "{team: web, replicas: 3, sidecar.istio.io/inject: \"false\"}",
                None,
            ),
            ("{}", None),
        ] {
            let resources = load(of_workload(written)).unwrap();
            let read: Vec<_> = resources
                .workloads
                .iter()
                .map(|one| one.annotations.direct)
                .collect();
            assert_eq!(read, [None, direct], "{written}");
        }
    }

    #[test]
    fn the_short_circuit_has_a_mode_also_by_port() {
        for (written, read) in [
            ("{culvert.dev/short-circuit: on}", Some("on")),
            ("{culvert.dev/short-circuit: \"off\"}", Some("off")),
            (
                "{culvert.dev/short-circuit: 'auto, 6379=on'}",
                Some("auto,6379=on"),
            ),
            ("{culvert.dev/short-circuit: 6379=on}", Some("6379=on")),
            ("{culvert.dev/direct: on}", None),
        ] {
            let resources = load(of_workload(written)).unwrap();
            let expected = read.map(|text| text.parse().unwrap());
            let annotations = &resources.workloads[1].annotations;
            assert_eq!(annotations.short_circuit, expected, "{written}");
        }
    }

    #[test]
    fn a_namespace_has_them_too() {
        let text = "namespaces:\n  - name: web\n    annotations: {culvert.dev/direct: off}\n  - {name: shop}\n";
        let resources = load(text).unwrap();
        let read: Vec<_> = resources
            .namespaces
            .iter()
            .map(|one| (&*one.name, one.annotations.direct))
            .collect();
        assert_eq!(read, [("web", Some(false)), ("shop", None)]);
    }

    #[test]
    fn one_of_ours_that_is_not_understood_is_refused_where_it_is() {
        for (written, says) in [
            (
                "{culvert.dev/direct: maybe}",
                "culvert.dev/direct: \"maybe\" is neither on nor off",
            ),
            (
                "{culvert.dev/direct: false}",
                "culvert.dev/direct: \"false\" is neither on nor off",
            ),
            (
                "{culvert.dev/short-circuit: maybe}",
                "culvert.dev/short-circuit: \"maybe\" is none of on, off, auto and PORT=MODE (the value is \"maybe\")",
            ),
            (
                "{culvert.dev/short-circuit: \"on,65536=off\"}",
                "culvert.dev/short-circuit: \"65536\" is not a port; write a number from 1 to 65535 (the value is \"on,65536=off\")",
            ),
            (
                "{culvert.dev/dirct: off}",
                "there is no annotation culvert.dev/dirct (here \"off\")",
            ),
            (
                "{culvert.dev/: off}",
                "there is no annotation culvert.dev/ (here \"off\")",
            ),
            ("{culvert.dev/direct: [off]}", "expected string"),
            (
                "{culvert.dev/direct: off, culvert.dev/direct: on}",
                "occurs twice",
            ),
            ("off", "expected mapping"),
        ] {
            let (line, _, message) = refused(of_workload(written));
            assert_eq!(line, 6, "{written}: {message}");
            assert!(message.contains(says), "{written}: {message}");
        }
    }

    #[test]
    fn a_namespace_is_named() {
        let (_, _, message) = refused("namespaces:\n  - name: a/b\n");
        assert!(message.contains("not a name"), "{message}");
        let (_, _, message) = refused("namespaces:\n  - name: a\n    direct: off\n");
        assert!(message.contains("direct"), "{message}");
    }
}
