//! [`evaluate`] against the naive evaluation, over policies and connections from alphabets so small that most conditions
//! are met about as often as not.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::naive::{Said, dry_run_refusals, judge};
use super::*;

const NAMES: &[&str] = &["a", "b", "ab", "ba"];
const IPS: &[&str] = &[
    "10.0.0.1",
    "10.0.0.2",
    "10.1.0.1",
    "fd00::1",
    "fd00::2",
    "::ffff:10.0.0.1",
];
const NETS: &[&str] = &[
    "10.0.0.1/32",
    "10.0.0.0/30",
    "10.0.0.0/8",
    "0.0.0.0/0",
    "fd00::/64",
    "fd00::1/128",
    "::/0",
];
const PORTS: &[u16] = &[80, 81, 443];

fn identity() -> impl Strategy<Value = Identity> {
    (select(NAMES), select(NAMES), select(NAMES))
        .prop_map(|(td, ns, sa)| Identity::new(td, ns, sa).unwrap())
}

fn connection() -> impl Strategy<Value = Connection> {
    (
        proptest::option::weighted(0.8, identity()),
        select(IPS),
        select(IPS),
        select(PORTS),
    )
        .prop_map(|(source, source_ip, ip, port)| {
            let destination = SocketAddr::new(ip.parse().unwrap(), port);
            Connection::new(source, source_ip.parse::<IpAddr>().unwrap(), destination)
        })
}

fn text(values: impl Strategy<Value = String>) -> impl Strategy<Value = StringMatch> {
    (values, 0..4u8).prop_map(|(value, kind)| match kind {
        0 => StringMatch::Exact(value.into()),
        1 => StringMatch::Prefix(value.into()),
        2 => StringMatch::Suffix(value.into()),
        _ => StringMatch::Presence,
    })
}

fn namespace_text() -> impl Strategy<Value = String> {
    select(NAMES).prop_map(str::to_owned)
}

fn principal_text() -> impl Strategy<Value = String> {
    prop_oneof![
        identity().prop_map(|identity| identity.principal().to_owned()),
        identity().prop_map(|identity| identity.to_string()),
        select(&["a", "b", "a/ns/", "sa/a", "/b", ""][..]).prop_map(str::to_owned),
    ]
}

/// Mostly unset, as most fields of most matches are.
fn field<T: std::fmt::Debug>(values: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![4 => Just(()).prop_map(|()| 0..1usize), 2 => Just(1..3usize)].prop_flat_map({
        let values = Arc::new(values);
        move |length| vec(values.clone(), length)
    })
}

fn nets() -> impl Strategy<Value = Vec<IpNet>> {
    field(select(NETS).prop_map(|net| net.parse().unwrap()))
}

fn service_accounts() -> impl Strategy<Value = Vec<ServiceAccountMatch>> {
    field(
        (select(NAMES), select(NAMES)).prop_map(|(namespace, service_account)| {
            ServiceAccountMatch {
                namespace: namespace.into(),
                service_account: service_account.into(),
            }
        }),
    )
}

fn one_match() -> impl Strategy<Value = Match> {
    let identity = (
        field(text(namespace_text())),
        field(text(namespace_text())),
        field(text(principal_text())),
        field(text(principal_text())),
        service_accounts(),
        service_accounts(),
    );
    let address = (
        nets(),
        nets(),
        nets(),
        nets(),
        field(select(PORTS)),
        field(select(PORTS)),
    );
    (identity, address).prop_map(|(identity, address)| Match {
        namespaces: identity.0,
        not_namespaces: identity.1,
        principals: identity.2,
        not_principals: identity.3,
        service_accounts: identity.4,
        not_service_accounts: identity.5,
        source_ips: address.0,
        not_source_ips: address.1,
        destination_ips: address.2,
        not_destination_ips: address.3,
        destination_ports: address.4,
        not_destination_ports: address.5,
    })
}

fn policies() -> impl Strategy<Value = Vec<Authorization>> {
    let clause = vec(one_match(), 0..4).prop_map(|matches| Clause { matches });
    let rule = vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    let policy = (
        vec(rule, 0..3),
        any::<bool>(),
        proptest::bool::weighted(0.2),
    );
    vec(policy, 0..5).prop_map(|policies| {
        let named = policies
            .into_iter()
            .enumerate()
            .map(|(index, (rules, allow, dry_run))| Authorization {
                name: PolicyName::new("ns", &format!("p{index}")).unwrap(),
                scope: Scope::Namespace,
                action: if allow { Action::Allow } else { Action::Deny },
                dry_run,
                rules,
            });
        named.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn both_evaluations_agree(
        policies in policies(),
        connection in connection(),
        unknown in prop_oneof![4 => Just(0usize), 1 => Just(1usize)],
        strict in proptest::bool::weighted(0.8),
    ) {
        let expected = judge(&policies, unknown, strict, &connection);
        let dry = dry_run_refusals(&policies, &connection);
        let applicable = Applicable {
            policies: policies.into_iter().map(Arc::new).collect(),
            unknown: vec![PolicyName::new("ns", "missing").unwrap(); unknown],
        };
        let evaluation = evaluate(&applicable, &connection, Strictness { unknown_policy_refuses: strict });

        let agrees = match (&evaluation.decision, &expected) {
            (Decision::Allow(permit), Said::Allowed { by }) => match permit.policy() {
                Some(name) => by.contains(&name.to_string()),
                None => by.is_empty(),
            },
            (Decision::Deny(DenyReason::MatchedDeny(name)), Said::DeniedBy(by)) => by.contains(&name.to_string()),
            (Decision::Deny(DenyReason::UnknownPolicy(_)), Said::DeniedForUnknown) => true,
            (Decision::Deny(DenyReason::NoAllowMatched), Said::DeniedForLackOfAllow) => true,
            _ => false,
        };
        prop_assert!(agrees, "{:?}, expected {expected:?}", evaluation.decision);

        let mut would_deny: Vec<_> = evaluation.would_deny.iter().map(ToString::to_string).collect();
        would_deny.sort();
        prop_assert_eq!(would_deny, dry);
    }

    /// What `looks_at_addresses` promises to those who keep a decision for other pods of the same identity.
    #[test]
    fn a_decision_that_does_not_look_at_addresses_is_the_same_from_everywhere(
        policies in policies(),
        connection in connection(),
        elsewhere in select(IPS),
    ) {
        let applicable = Applicable { policies: policies.into_iter().map(Arc::new).collect(), unknown: vec![] };
        let moved = Connection::new(connection.source().cloned(), elsewhere.parse().unwrap(), connection.destination());
        if !applicable.looks_at_addresses() {
            let decide = |connection| evaluate(&applicable, connection, Strictness::default()).decision;
            prop_assert_eq!(decide(&connection), decide(&moved));
        }
    }
}
