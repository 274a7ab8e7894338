//! What a client hears, request by request.

use super::*;
use crate::dev_control_plane::snapshot::Snapshot;
use crate::mesh::{
    IpFamilies, LoadBalancer, Mesh, MeshDefaults, MeshResources, PortMap, Service, ServiceName,
    WorkloadSpec,
};
use crate::policy::{Action, Authorization, PolicyName, Scope};
use crate::wire::google::rpc::Status;

const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";

fn workload(uid: &str, ip: &str, node: &str) -> WorkloadSpec {
    WorkloadSpec {
        uid: uid.into(),
        name: uid.into(),
        namespace: "ns".into(),
        addresses: vec![ip.parse().unwrap()],
        node: node.into(),
        ..WorkloadSpec::default()
    }
}

fn snapshot(revision: u64, workloads: &[WorkloadSpec]) -> Snapshot {
    let policy = Authorization {
        name: PolicyName::new("ns", "deny").unwrap(),
        scope: Scope::Namespace,
        action: Action::Deny,
        dry_run: false,
        rules: Vec::new(),
    };
    let resources = MeshResources {
        workloads: workloads.to_vec(),
        policies: vec![policy],
        ..MeshResources::default()
    };
    let mesh = Mesh::build(resources, &MeshDefaults::default()).unwrap();
    Snapshot::of(&mesh, revision)
}

fn two() -> [WorkloadSpec; 2] {
    [
        workload("a", "10.0.0.1", "n1"),
        workload("b", "10.0.0.2", "n1"),
    ]
}

fn request(type_url: &str, subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names_subscribe: owned(subscribe),
        resource_names_unsubscribe: owned(unsubscribe),
        ..DeltaDiscoveryRequest::default()
    }
}

/// All responses that wait, as (names, removed names).
fn told(session: &mut Session) -> Vec<(Vec<String>, Vec<String>)> {
    std::iter::from_fn(|| session.response())
        .map(|response| {
            let names = response
                .resources
                .into_iter()
                .map(|one| Resource::decode(one).unwrap().name);
            (names.collect(), response.removed_resources)
        })
        .collect()
}

fn said(names: &[&str], removed: &[&str]) -> Vec<(Vec<String>, Vec<String>)> {
    let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    vec![(owned(names), owned(removed))]
}

#[test]
fn the_first_request_for_everything_is_answered_with_everything_of_that_type() {
    for subscribe in [&[][..], &["*"]] {
        let mut session = Session::default();
        session
            .request(request(ADDRESS, subscribe, &[]), &snapshot(1, &two()))
            .unwrap();
        let response = session.response().unwrap();
        assert_eq!(response.type_url, ADDRESS);
        assert_eq!(response.nonce, "1");
        assert_eq!(response.resources.len(), 2);
        let first = Resource::decode(response.resources[0].clone()).unwrap();
        assert_eq!(first.name, "a");
        assert_eq!(first.aliases, ["/10.0.0.1"]);
        assert_eq!(session.response(), None);
    }
}

#[test]
fn the_first_request_is_answered_also_where_there_is_nothing() {
    let nothing = Snapshot::of(&Mesh::default(), 1);
    let mut session = Session::default();
    for (subscribe, unsubscribe) in [(&["*"][..], &[][..]), (&[], &["*"])] {
        let mut session = Session::default();
        session
            .request(request(ADDRESS, subscribe, unsubscribe), &nothing)
            .unwrap();
        assert_eq!(told(&mut session), said(&[], &[]));
    }
    session
        .request(request(AUTHORIZATION, &["*"], &[]), &nothing)
        .unwrap();
    assert_eq!(told(&mut session), said(&[], &[]));
    // Its acknowledgement is not.
    let mut ack = request(AUTHORIZATION, &[], &[]);
    ack.response_nonce = "1".to_owned();
    assert_eq!(session.request(ack, &nothing), Ok(Some(Feedback::Ack)));
    assert_eq!(session.response(), None);
}

#[test]
fn a_change_brings_only_what_differs_and_what_is_gone() {
    let mut session = Session::default();
    session
        .request(request(ADDRESS, &["*"], &[]), &snapshot(1, &two()))
        .unwrap();
    told(&mut session);
    session.change(&snapshot(2, &two()));
    assert_eq!(told(&mut session), []);
    let changed = [
        workload("b", "10.0.0.2", "n2"),
        workload("c", "10.0.0.3", "n1"),
    ];
    session.change(&snapshot(3, &changed));
    assert_eq!(told(&mut session), said(&["b", "c"], &["a"]));
}

#[test]
fn who_comes_back_is_told_what_changed_in_between() {
    let before = snapshot(1, &two());
    let mut had = request(ADDRESS, &["*"], &[]);
    for (name, entry) in before.resources(Kind::Address).iter() {
        let version = entry.version.clone();
        had.initial_resource_versions
            .insert(name.to_string(), version);
    }
    let mut session = Session::default();
    session.request(had.clone(), &before).unwrap();
    assert_eq!(told(&mut session), said(&[], &[]));

    let after = snapshot(2, &[workload("a", "10.0.0.1", "n2")]);
    let mut session = Session::default();
    session.request(had, &after).unwrap();
    assert_eq!(told(&mut session), said(&["a"], &["b"]));
}

#[test]
fn on_demand_only_what_was_asked_for_is_sent() {
    let mut session = Session::default();
    let first = request(ADDRESS, &["/10.0.0.2", "nowhere"], &["*"]);
    session.request(first, &snapshot(1, &two())).unwrap();
    assert_eq!(told(&mut session), said(&["b"], &["nowhere"]));

    // Asked for again: told again.
    let again = request(ADDRESS, &["b", "a"], &[]);
    session.request(again, &snapshot(1, &two())).unwrap();
    assert_eq!(told(&mut session), said(&["a", "b"], &[]));

    // What was missing is told of when it appears; what nobody asked for is not.
    let more = [
        workload("a", "10.0.0.1", "n9"),
        workload("nowhere", "10.0.0.4", ""),
        workload("unasked", "10.0.0.5", ""),
    ];
    let unsubscribe = request(ADDRESS, &[], &["a"]);
    session.request(unsubscribe, &snapshot(1, &two())).unwrap();
    session.change(&snapshot(2, &more));
    assert_eq!(told(&mut session), said(&["nowhere"], &["b"]));
}

#[test]
fn who_asks_for_a_service_is_told_of_its_endpoints() {
    let id = ServiceName::new("ns", "web.ns.svc").unwrap();
    let mut behind = workload("a", "10.0.0.1", "n1");
    behind.services = vec![(id.clone(), PortMap::from_iter([(80, 8080)]))];
    let service = Service {
        id,
        name: "web".into(),
        vips: Vec::new(),
        ports: PortMap::from_iter([(80, 8080)]),
        subject_alt_names: Vec::new(),
        waypoints: Vec::new(),
        load_balancer: LoadBalancer::default(),
        ip_families: IpFamilies::default(),
        canonical: false,
    };
    let resources = MeshResources {
        workloads: vec![behind, workload("b", "10.0.0.2", "n1")],
        services: vec![service],
        ..MeshResources::default()
    };
    let mesh = Mesh::build(resources, &MeshDefaults::default()).unwrap();
    let now = Snapshot::of(&mesh, 1);
    let mut session = Session::default();
    let first = request(ADDRESS, &["ns/web.ns.svc"], &["*"]);
    session.request(first, &now).unwrap();
    assert_eq!(told(&mut session), said(&["a", "ns/web.ns.svc"], &[]));
}

#[test]
fn a_refusal_is_heard_with_its_reason_and_does_not_bring_the_same_again() {
    let now = snapshot(1, &two());
    let mut session = Session::default();
    session
        .request(request(ADDRESS, &["*"], &[]), &now)
        .unwrap();
    told(&mut session);
    let mut nack = request(ADDRESS, &[], &[]);
    nack.response_nonce = "1".to_owned();
    nack.error_detail = Some(Status {
        code: 3,
        message: "a: bad".to_owned(),
    });
    let heard = session.request(nack.clone(), &now);
    assert_eq!(heard, Ok(Some(Feedback::Nack("a: bad".to_owned()))));
    nack.response_nonce = "2".to_owned();
    assert_eq!(session.request(nack, &now), Ok(Some(Feedback::Unknown)));
    assert_eq!(session.response(), None);
}

#[test]
fn a_large_mesh_comes_in_parts_of_bounded_size() {
    let workloads: Vec<_> = (0..4000u32)
        .map(|number| {
            let mut one = workload(&format!("{number}-{}", "x".repeat(600)), "10.0.0.1", "");
            one.addresses = vec![std::net::Ipv4Addr::from(number).into()];
            one
        })
        .collect();
    let mut session = Session::default();
    session
        .request(request(ADDRESS, &["*"], &[]), &snapshot(1, &workloads))
        .unwrap();
    let responses: Vec<_> = std::iter::from_fn(|| session.response()).collect();
    assert!(responses.len() > 2);
    let sizes = responses.iter().map(prost::Message::encoded_len);
    assert!(sizes.max() < Some(2 * MOST_BYTES));
    let resources = responses.iter().map(|response| response.resources.len());
    assert_eq!(resources.sum::<usize>(), 4000);

    session.change(&snapshot(2, &[]));
    let removals: Vec<_> = std::iter::from_fn(|| session.response()).collect();
    assert!(removals.len() > 2);
    let removed = removals.iter().map(|one| one.removed_resources.len());
    assert_eq!(removed.sum::<usize>(), 4000);
}

#[test]
fn policies_go_before_the_workloads_that_name_them() {
    let mut session = Session::default();
    let nothing = Snapshot::of(&Mesh::default(), 1);
    for type_url in [ADDRESS, AUTHORIZATION] {
        let wants_all = request(type_url, &["*"], &[]);
        session.request(wants_all, &nothing).unwrap();
    }
    told(&mut session);
    session.change(&snapshot(2, &two()));
    assert_eq!(session.response().unwrap().type_url, AUTHORIZATION);
    assert_eq!(session.response().unwrap().type_url, ADDRESS);
}

#[test]
fn unknown_types_and_endless_lists_are_refused() {
    let mut session = Session::default();
    let now = snapshot(1, &two());
    let other = session.request(request("other", &["*"], &[]), &now);
    assert_eq!(other, Err(SessionError::UnknownType("other".to_owned())));
    let mut many = request(ADDRESS, &[], &[]);
    many.resource_names_subscribe = vec!["x".to_owned(); MOST_NAMES + 1];
    assert_eq!(session.request(many, &now), Err(SessionError::TooManyNames));
}

#[test]
fn a_client_is_settled_once_it_has_answered_all_of_both_types() {
    let (one, two) = (snapshot(1, &two()[..1]), snapshot(2, &two()));
    let mut session = Session::default();
    assert!(!session.is_settled());
    let answer = |session: &mut Session, kind: &str, nonce: &str| {
        let ack = DeltaDiscoveryRequest {
            response_nonce: nonce.to_owned(),
            ..request(kind, &[], &[])
        };
        session.request(ack, &two).unwrap();
    };
    session
        .request(request(ADDRESS, &["*"], &[]), &one)
        .unwrap();
    told(&mut session);
    answer(&mut session, ADDRESS, "1");
    assert!(!session.is_settled(), "policies were not asked for");
    session
        .request(request(AUTHORIZATION, &["*"], &[]), &two)
        .unwrap();
    assert!(!session.is_settled(), "something waits");
    let sent = told(&mut session).len();
    assert!(!session.is_settled(), "nothing was answered");
    for nonce in 2..2 + sent {
        assert!(!session.is_settled());
        answer(&mut session, AUTHORIZATION, &nonce.to_string());
    }
    assert!(session.is_settled());
}
