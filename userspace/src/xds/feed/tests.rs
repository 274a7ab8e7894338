use super::*;
use crate::mesh::{Annotations, NamespaceAnnotations, TunnelProtocol};
use crate::wire::envoy::service::discovery::v3::Content;
use crate::wire::istio::workload::{NetworkAddress, Service, Workload};

const ADDRESS: ResourceType = ResourceType::Address;
const POLICY: ResourceType = ResourceType::Authorization;

fn feed() -> (Feed, Arc<Store>) {
    let store = Arc::new(Store::new());
    (
        Feed::new(Arc::clone(&store), MeshDefaults::default()),
        store,
    )
}

fn resource(kind: ResourceType, name: &str, content: &impl Message) -> Resource {
    Resource {
        name: name.to_owned(),
        version: "1".to_owned(),
        resource: Some(Content {
            type_url: kind.url().to_owned(),
            value: content.encode_to_vec().into(),
        }),
        ..Resource::default()
    }
}

fn pod(uid: &str, ip: u8) -> Workload {
    Workload {
        uid: uid.to_owned(),
        name: uid.to_owned(),
        namespace: "ns".to_owned(),
        addresses: vec![vec![10, 0, 0, ip].into()],
        tunnel_protocol: 1,
        ..Workload::default()
    }
}

fn workload(uid: &str, ip: u8) -> Resource {
    named(uid, Type::Workload(pod(uid, ip)))
}

fn service(hostname: &str, vip: &[u8]) -> Resource {
    let service = Service {
        name: hostname.to_owned(),
        namespace: "ns".to_owned(),
        hostname: hostname.to_owned(),
        addresses: vec![NetworkAddress {
            address: vip.to_vec().into(),
            ..NetworkAddress::default()
        }],
        ..Service::default()
    };
    named(&format!("ns/{hostname}"), Type::Service(service))
}

fn named(name: &str, content: Type) -> Resource {
    let address = workload::Address {
        r#type: Some(content),
    };
    resource(ADDRESS, name, &address)
}

fn policy(name: &str) -> Resource {
    let policy = security::Authorization {
        name: name.to_owned(),
        namespace: "ns".to_owned(),
        scope: 1,
        action: 1,
        ..security::Authorization::default()
    };
    resource(POLICY, &format!("ns/{name}"), &policy)
}

fn encoded(resource: &Resource) -> bytes::Bytes {
    resource.encode_to_vec().into()
}

fn push(kind: ResourceType, resources: Vec<Resource>, removed: &[&str]) -> Push {
    Push {
        kind,
        resources: resources.iter().map(encoded).collect(),
        removed: removed.iter().map(|name| (*name).to_owned()).collect(),
        nonce: "n".to_owned(),
    }
}

/// Both types answered.
fn settled() -> (Feed, Arc<Store>) {
    let (mut feed, store) = feed();
    feed.take(push(POLICY, vec![], &[])).unwrap();
    feed.take(push(ADDRESS, vec![workload("web", 1)], &[]))
        .unwrap();
    (feed, store)
}

/// A policy for port 65616, which is 80 to who takes its lowest 16 bits.
fn beyond_ports() -> Resource {
    let one = security::Match {
        destination_ports: vec![65_616],
        ..security::Match::default()
    };
    let clause = security::Clause { matches: vec![one] };
    let policy = security::Authorization {
        name: "deny".to_owned(),
        namespace: "ns".to_owned(),
        rules: vec![security::Rule {
            clauses: vec![clause],
        }],
        ..security::Authorization::default()
    };
    resource(POLICY, "ns/deny", &policy)
}

#[test]
fn a_resource_that_cannot_be_read_is_refused_unless_that_is_to_be_lenient() {
    let name: PolicyName = "ns/deny".parse().unwrap();
    let (mut feed, store) = settled();
    let taken = feed.take(push(POLICY, vec![beyond_ports()], &[])).unwrap();
    assert_eq!((taken.accepted.len(), taken.refused.len()), (0, 1));
    assert!(store.load().policy(&name).is_none());
    feed.be_lenient();
    let taken = feed.take(push(POLICY, vec![beyond_ports()], &[])).unwrap();
    assert_eq!((taken.accepted.len(), taken.refused.len()), (1, 0));
    let mesh = store.load();
    let rules = &mesh.policy(&name).unwrap().rules;
    assert_eq!(rules[0].clauses[0].matches[0].destination_ports, [80]);
}

#[test]
fn of_a_push_that_cannot_be_decoded_nothing_is_in_force() {
    let (mut feed, store) = settled();
    let before = store.revision();
    let good = encoded(&workload("db", 2));
    let broken = push(ADDRESS, Vec::new(), &["web"]);
    let broken = Push {
        resources: vec![good.slice(..), good.slice(..good.len() - 1)],
        ..broken
    };
    let error = feed.take(broken).unwrap_err();
    assert!(matches!(error, ProtocolError::Resource(..)), "{error}");
    assert_eq!(store.revision(), before);
    assert!(store.load().workload_by_uid("web").is_some());
    assert!(store.load().workload_by_uid("db").is_none());
    feed.take(push(ADDRESS, vec![workload("db", 2)], &[]))
        .unwrap();
    assert_eq!(store.load().workloads().len(), 2);
}

#[test]
fn nothing_new_is_no_new_revision() {
    let (mut feed, store) = settled();
    let before = (store.revision(), feed.in_force());
    feed.take(push(ADDRESS, vec![], &[])).unwrap();
    let refused = feed.take(push(POLICY, vec![beyond_ports()], &[])).unwrap();
    assert_eq!(refused.refused.len(), 1);
    assert_eq!((store.revision(), feed.in_force()), before);
}

#[test]
fn nothing_is_in_force_before_every_type_was_answered() {
    let (mut feed, store) = feed();
    let taken = feed
        .take(push(ADDRESS, vec![workload("web", 1)], &[]))
        .unwrap();
    assert_eq!(taken.accepted.len(), 1);
    assert_eq!((store.revision(), feed.in_force()), (Revision(0), None));
    feed.take(push(POLICY, vec![policy("deny")], &[])).unwrap();
    let mesh = store.load();
    assert_eq!((mesh.workloads().len(), mesh.policies().len()), (1, 1));
    let web = mesh.workload_by_uid("web").unwrap();
    assert_eq!(web.protocol, TunnelProtocol::Hbone);
    assert!(feed.in_force().is_some());
}

#[test]
fn the_good_of_a_push_is_in_force_and_the_bad_is_named_and_stays_as_it_was() {
    let (mut feed, store) = settled();
    let bad = Workload {
        addresses: vec![vec![1, 2, 3].into()],
        ..pod("web", 9)
    };
    let bad = named("web", Type::Workload(bad));
    let taken = feed
        .take(push(ADDRESS, vec![bad, workload("db", 2)], &[]))
        .unwrap();
    let [refused] = taken.refused.as_slice() else {
        panic!("{taken:?}")
    };
    assert_eq!(refused.name, "web");
    assert!(refused.reason.contains("3 bytes"), "{refused:?}");
    assert_eq!(taken.accepted.len(), 1);
    let mesh = store.load();
    let web = mesh.workload_by_uid("web").unwrap();
    assert!(web.has_address([10, 0, 0, 1].into()));
    assert!(mesh.workload_by_uid("db").is_some());
}

#[test]
fn what_is_no_resource_is_refused_for_what_it_is() {
    let (mut feed, _store) = settled();
    let resource = |change: fn(&mut Resource)| {
        let mut resource = workload("x", 3);
        change(&mut resource);
        resource
    };
    let cases: [(Resource, &str); 7] = [
        (resource(|it| it.resource = None), "has no content"),
        (resource(|it| it.name = "y".to_owned()), "named \"x\""),
        (
            resource(|it| {
                if let Some(any) = &mut it.resource {
                    any.value = vec![0xff; 40].into();
                }
            }),
            "not a workload or service",
        ),
        (
            resource(|it| {
                if let Some(any) = &mut it.resource {
                    any.type_url = POLICY.url().to_owned();
                }
            }),
            "is a type.googleapis.com/istio.security",
        ),
        (
            super::tests::resource(ADDRESS, "x", &workload::Address::default()),
            "has no workload or service",
        ),
        (named("", Type::Workload(pod("", 3))), "has no uid"),
        (
            named(
                "x",
                Type::Workload(Workload {
                    namespace: "a/b".to_owned(),
                    ..pod("x", 3)
                }),
            ),
            "no valid identity",
        ),
    ];
    for (resource, words) in cases {
        let taken = feed.take(push(ADDRESS, vec![resource], &[])).unwrap();
        assert!(taken.accepted.is_empty());
        let [refused] = taken.refused.as_slice() else {
            panic!("{taken:?}")
        };
        assert!(refused.reason.contains(words), "{words}: {refused:?}");
    }
}

#[test]
fn what_is_removed_goes_whether_it_is_a_workload_or_a_service() {
    let (mut feed, store) = settled();
    feed.take(push(ADDRESS, vec![service("h", &[10, 96, 0, 1])], &[]))
        .unwrap();
    assert_eq!(store.load().services().len(), 1);
    feed.take(push(ADDRESS, vec![], &["ns/h", "web", "never-seen"]))
        .unwrap();
    let mesh = store.load();
    assert_eq!((mesh.services().len(), mesh.workloads().len()), (0, 0));
    feed.take(push(POLICY, vec![policy("p")], &[])).unwrap();
    feed.take(push(POLICY, vec![], &["ns/p", "no name"]))
        .unwrap();
    assert_eq!(store.load().policies().len(), 0);
}

#[test]
fn an_address_goes_to_who_comes_with_it_in_whichever_order_the_end_of_the_old_is_told() {
    for together in [true, false] {
        let (mut feed, store) = settled();
        let new = vec![workload("next", 1)];
        if together {
            feed.take(push(ADDRESS, new, &["web"])).unwrap();
        } else {
            feed.take(push(ADDRESS, new, &[])).unwrap();
            feed.take(push(ADDRESS, vec![], &["web"])).unwrap();
        }
        let mesh = store.load();
        let found = mesh.workload_by_ip("", [10, 0, 0, 1].into()).unwrap();
        assert_eq!(&*found.uid, "next");
    }
}

#[test]
fn a_workload_without_addresses_is_known_by_its_name() {
    let (mut feed, store) = settled();
    let bare = Workload {
        addresses: Vec::new(),
        ..pod("bare", 0)
    };
    let taken = feed
        .take(push(
            ADDRESS,
            vec![named("bare", Type::Workload(bare))],
            &[],
        ))
        .unwrap();
    assert!(taken.refused.is_empty());
    assert!(store.load().workload_by_uid("bare").is_some());
}

fn off(pod_name: &str) -> Namespaces {
    let off = Annotations {
        direct: Some(false),
        ..Annotations::default()
    };
    let said = NamespaceAnnotations {
        pods: [(pod_name.into(), off)].into(),
        ..NamespaceAnnotations::default()
    };
    [("ns".into(), said)].into()
}

fn direct(store: &Store, uid: &str) -> bool {
    store.load().workload_by_uid(uid).unwrap().direct
}

#[test]
fn annotations_are_in_force_at_once_and_for_what_comes_later() {
    let (mut feed, store) = settled();
    let before = store.revision();
    assert_eq!(feed.annotate(off("web")), 1);
    assert!(store.revision() > before && !direct(&store, "web"));
    assert_eq!(feed.in_force().unwrap().0, store.revision());
    // What changes nothing is no new mesh.
    let before = store.revision();
    assert_eq!(feed.annotate(off("web")), 0);
    assert_eq!(store.revision(), before);
    feed.take(push(
        ADDRESS,
        vec![workload("web", 7), workload("db", 2)],
        &[],
    ))
    .unwrap();
    assert!(!direct(&store, "web") && direct(&store, "db"));
    feed.annotate(off("db"));
    assert!(direct(&store, "web") && !direct(&store, "db"));
    // A workload that leaves and comes back is the same again.
    feed.take(push(ADDRESS, vec![], &["db"])).unwrap();
    feed.take(push(ADDRESS, vec![workload("db", 2)], &[]))
        .unwrap();
    assert!(!direct(&store, "db"));
}

#[test]
fn nothing_is_in_force_before_annotations_that_are_awaited() {
    for annotations_first in [true, false] {
        let (mut feed, store) = feed();
        feed.await_annotations();
        let annotate = |feed: &mut Feed| feed.annotate(off("web"));
        if annotations_first {
            annotate(&mut feed);
        }
        feed.take(push(POLICY, vec![], &[])).unwrap();
        feed.take(push(ADDRESS, vec![workload("web", 1)], &[]))
            .unwrap();
        if !annotations_first {
            assert_eq!((store.revision(), feed.in_force()), (Revision(0), None));
            annotate(&mut feed);
        }
        assert!(!direct(&store, "web"));
        assert_eq!(store.revision(), Revision(1));
        assert!(feed.in_force().is_some());
    }
}
