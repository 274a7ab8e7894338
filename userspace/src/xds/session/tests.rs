use super::*;

fn session(on_demand: bool) -> Session {
    let node = Node {
        id: "ztunnel~10.0.0.1~pod.ns~ns.svc.cluster.local".to_owned(),
        ..Node::default()
    };
    Session::new(node, on_demand)
}

fn response(kind: ResourceType, nonce: &str) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind.url().to_owned(),
        nonce: nonce.to_owned(),
        ..DeltaDiscoveryResponse::default()
    }
}

fn taken(nonce: &str, accepted: &[(&str, &str)], removed: &[&str]) -> Taken {
    Taken {
        kind: ResourceType::Address,
        nonce: nonce.to_owned(),
        removed: removed.iter().map(|name| (*name).to_owned()).collect(),
        accepted: accepted
            .iter()
            .map(|(name, version)| ((*name).into(), (*version).into()))
            .collect(),
        refused: Vec::new(),
    }
}

#[test]
fn everything_is_asked_for_at_first() {
    let requests = session(false).opening();
    assert_eq!(requests.len(), 2);
    for (request, kind) in requests.iter().zip(ResourceType::ALL) {
        assert_eq!(request.type_url, kind.url());
        assert!(request.node.is_some());
        assert!(request.resource_names_subscribe.is_empty());
        assert!(request.resource_names_unsubscribe.is_empty());
        assert!(request.initial_resource_versions.is_empty());
    }
}

#[test]
fn a_new_connection_tells_what_is_known() {
    let mut session = session(false);
    session.answer(taken("1", &[("a", "1"), ("b", ""), ("c", "1")], &[]));
    session.answer(taken("2", &[("a", "2")], &["c", "never-seen"]));
    let opening = session.opening();
    let versions = &opening[0].initial_resource_versions;
    assert_eq!(versions.len(), 2);
    assert_eq!(versions["a"], "2");
    assert_eq!(versions["b"], "");
    assert!(opening[1].initial_resource_versions.is_empty());
}

#[test]
fn what_was_refused_keeps_the_version_in_force_and_is_named() {
    let mut session = session(false);
    session.answer(taken("1", &[("a", "1")], &[]));
    let reply = session.answer(Taken {
        refused: vec![Refused {
            name: "a".to_owned(),
            reason: "has no uid".to_owned(),
        }],
        ..taken("2", &[("b", "1")], &[])
    });
    assert_eq!(reply.response_nonce, "2");
    let detail = reply.error_detail.unwrap();
    assert_eq!(detail.message, "1 refused; a has no uid");
    let versions = &session.opening()[0].initial_resource_versions;
    assert_eq!((versions["a"].as_str(), versions["b"].as_str()), ("1", "1"));
}

#[test]
fn a_refusal_of_much_is_not_endless() {
    let refused = (0..10_000).map(|number| Refused {
        name: format!("name-{number}-{}", "x".repeat(1000)),
        reason: "y".repeat(1000),
    });
    let refused: Vec<_> = refused.collect();
    let reply = session(false).answer(Taken {
        refused,
        ..taken("1", &[], &[])
    });
    assert!(reply.error_detail.unwrap().message.len() < MOST_TEXT + 8);
}

#[test]
fn an_accepted_push_is_acknowledged() {
    let mut session = session(false);
    let push = session
        .receive(response(ResourceType::Authorization, "7"))
        .unwrap();
    let reply = session.answer(Taken {
        kind: push.kind,
        nonce: push.nonce,
        ..taken("", &[], &[])
    });
    assert_eq!(reply.response_nonce, "7");
    assert_eq!(reply.type_url, ResourceType::Authorization.url());
    assert!(reply.error_detail.is_none());
    assert!(!session.is_answered());
    session.answer(taken("8", &[], &[]));
    assert!(session.is_answered());
}

#[test]
fn what_cannot_be_answered_ends_the_connection() {
    let session = session(false);
    let other = DeltaDiscoveryResponse {
        type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned(),
        nonce: "1".to_owned(),
        ..DeltaDiscoveryResponse::default()
    };
    assert!(matches!(
        session.receive(other),
        Err(ProtocolError::Type(_))
    ));
    let silent = response(ResourceType::Address, "");
    assert!(matches!(
        session.receive(silent),
        Err(ProtocolError::Nonce(_))
    ));
}

#[test]
fn on_demand_asks_for_nothing_but_names() {
    let mut session = session(true);
    let opening = session.opening();
    assert_eq!(opening[0].resource_names_unsubscribe, ["*"]);
    assert!(opening[1].resource_names_unsubscribe.is_empty());
    let asked = session.subscribe("/10.0.0.1").unwrap();
    assert_eq!(asked.resource_names_subscribe, ["/10.0.0.1"]);
    assert!(session.subscribe("/10.0.0.1").is_none());
    let opening = session.opening();
    assert_eq!(opening[0].resource_names_subscribe, ["/10.0.0.1"]);
}
