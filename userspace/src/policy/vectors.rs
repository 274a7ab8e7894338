//! Fixed vectors: every rule of authorization, one test each, named by the rule.

use std::sync::Arc;

use super::*;

fn from(identity: &str, source_ip: &str, destination: &str) -> Connection {
    let source = (!identity.is_empty()).then(|| format!("spiffe://{identity}").parse().unwrap());
    Connection::new(
        source,
        source_ip.parse().unwrap(),
        destination.parse().unwrap(),
    )
}

/// The client of most tests.
fn client() -> Connection {
    from("td/ns/web/sa/front", "10.0.0.1", "10.0.0.9:80")
}

/// The same client in plaintext: no identity.
fn plaintext() -> Connection {
    from("", "10.0.0.1", "10.0.0.9:80")
}

fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Authorization {
    let name = PolicyName::new("ns", name).unwrap();
    Authorization {
        name,
        scope: Scope::Namespace,
        action,
        dry_run: false,
        rules,
    }
}

fn allow(name: &str, rules: Vec<Rule>) -> Authorization {
    policy(name, Action::Allow, rules)
}

fn deny(name: &str, rules: Vec<Rule>) -> Authorization {
    policy(name, Action::Deny, rules)
}

fn dry(policy: Authorization) -> Authorization {
    Authorization {
        dry_run: true,
        ..policy
    }
}

/// A rule of one clause: any of these.
fn any_of(matches: impl Into<Vec<Match>>) -> Vec<Rule> {
    vec![Rule {
        clauses: vec![Clause {
            matches: matches.into(),
        }],
    }]
}

fn everything() -> Vec<Rule> {
    vec![Rule::default()]
}

fn nothing() -> Vec<Rule> {
    any_of([Match {
        destination_ports: vec![1],
        ..Match::default()
    }])
}

fn principals(values: &[StringMatch]) -> Match {
    Match {
        principals: values.to_vec(),
        ..Match::default()
    }
}

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(text.into())
}

fn port(port: u16) -> Match {
    Match {
        destination_ports: vec![port],
        ..Match::default()
    }
}

fn account(namespace: &str, service_account: &str) -> ServiceAccountMatch {
    ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: service_account.into(),
    }
}

fn applicable(policies: Vec<Authorization>) -> Applicable {
    Applicable {
        policies: policies.into_iter().map(Arc::new).collect(),
        unknown: vec![],
    }
}

fn outcome(policies: Vec<Authorization>, connection: &Connection) -> String {
    evaluate(&applicable(policies), connection, Strictness::default())
        .decision
        .to_string()
}

fn covers(one: Match, connection: &Connection) -> bool {
    let decision = evaluate(
        &applicable(vec![allow("a", any_of([one]))]),
        connection,
        Strictness::default(),
    );
    decision.is_allowed()
}

#[test]
fn no_policy_allows() {
    assert_eq!(
        outcome(vec![], &client()),
        "allowed, no ALLOW policy applies"
    );
    assert_eq!(
        outcome(vec![], &plaintext()),
        "allowed, no ALLOW policy applies"
    );
}

#[test]
fn a_deny_that_matches_refuses_also_beside_an_allow_that_matches() {
    for policies in [
        vec![deny("d", everything()), allow("a", everything())],
        vec![allow("a", everything()), deny("d", everything())],
        vec![deny("other", nothing()), deny("d", everything())],
    ] {
        assert_eq!(outcome(policies, &client()), "denied by policy ns/d");
    }
}

#[test]
fn a_deny_that_does_not_match_leaves_the_rest_to_the_allows() {
    assert_eq!(
        outcome(vec![deny("d", nothing())], &client()),
        "allowed, no ALLOW policy applies"
    );
    assert_eq!(
        outcome(
            vec![deny("d", nothing()), allow("a", everything())],
            &client()
        ),
        "allowed by policy ns/a"
    );
    assert_eq!(
        outcome(vec![deny("d", nothing()), allow("a", nothing())], &client()),
        "no ALLOW policy matches"
    );
}

#[test]
fn with_allow_policies_one_of_them_must_match() {
    assert_eq!(
        outcome(vec![allow("a", nothing())], &client()),
        "no ALLOW policy matches"
    );
    assert_eq!(
        outcome(
            vec![allow("a", nothing()), allow("b", everything())],
            &client()
        ),
        "allowed by policy ns/b"
    );
}

#[test]
fn a_policy_without_rules_never_matches() {
    assert_eq!(
        outcome(vec![deny("d", vec![])], &client()),
        "allowed, no ALLOW policy applies"
    );
    assert_eq!(
        outcome(vec![allow("a", vec![])], &client()),
        "no ALLOW policy matches"
    );
}

#[test]
fn a_rule_without_clauses_and_a_clause_without_matches_always_match() {
    assert_eq!(
        outcome(vec![deny("d", vec![Rule::default()])], &client()),
        "denied by policy ns/d"
    );
    assert_eq!(
        outcome(vec![deny("d", any_of([]))], &client()),
        "denied by policy ns/d"
    );
    assert_eq!(
        outcome(vec![deny("d", any_of([]))], &plaintext()),
        "denied by policy ns/d"
    );
}

#[test]
fn a_match_with_no_field_set_never_matches() {
    assert!(!covers(Match::default(), &client()));
    assert_eq!(
        outcome(vec![deny("d", any_of([Match::default()]))], &client()),
        "allowed, no ALLOW policy applies"
    );
    // Nor does it spoil its clause.
    assert_eq!(
        outcome(
            vec![deny("d", any_of([Match::default(), port(80)]))],
            &client()
        ),
        "denied by policy ns/d"
    );
}

#[test]
fn rules_are_ored() {
    let rules = [nothing(), everything()].concat();
    assert_eq!(
        outcome(vec![allow("a", rules)], &client()),
        "allowed by policy ns/a"
    );
    assert_eq!(
        outcome(vec![allow("a", [nothing(), nothing()].concat())], &client()),
        "no ALLOW policy matches"
    );
}

#[test]
fn clauses_of_a_rule_are_anded() {
    let clause = |one: Match| Clause { matches: vec![one] };
    let rule = |ports: [u16; 2]| {
        vec![Rule {
            clauses: vec![
                clause(principals(&[StringMatch::Presence])),
                clause(port(ports[0])),
                clause(port(ports[1])),
            ],
        }]
    };
    assert_eq!(
        outcome(vec![allow("a", rule([80, 80]))], &client()),
        "allowed by policy ns/a"
    );
    assert_eq!(
        outcome(vec![allow("a", rule([80, 81]))], &client()),
        "no ALLOW policy matches"
    );
    assert_eq!(
        outcome(vec![allow("a", rule([81, 80]))], &client()),
        "no ALLOW policy matches"
    );
    assert_eq!(
        outcome(vec![allow("a", rule([80, 80]))], &plaintext()),
        "no ALLOW policy matches"
    );
}

#[test]
fn matches_of_a_clause_are_ored() {
    assert_eq!(
        outcome(vec![allow("a", any_of([port(81), port(80)]))], &client()),
        "allowed by policy ns/a"
    );
    assert_eq!(
        outcome(vec![allow("a", any_of([port(81), port(82)]))], &client()),
        "no ALLOW policy matches"
    );
}

#[test]
fn fields_of_a_match_are_anded() {
    let both = |principal: &str, port: u16| Match {
        principals: vec![exact(principal)],
        destination_ports: vec![port],
        ..Match::default()
    };
    assert!(covers(both("td/ns/web/sa/front", 80), &client()));
    assert!(!covers(both("td/ns/web/sa/front", 81), &client()));
    assert!(!covers(both("td/ns/web/sa/other", 80), &client()));
}

#[test]
fn a_field_and_its_not_twin_are_anded() {
    let one = |not: &str| Match {
        source_ips: vec!["10.0.0.0/8".parse().unwrap()],
        not_source_ips: vec![not.parse().unwrap()],
        ..Match::default()
    };
    assert!(covers(one("10.9.0.0/16"), &client()));
    assert!(!covers(one("10.0.0.0/24"), &client()));
}

#[test]
fn values_of_a_field_are_ored() {
    assert!(covers(
        principals(&[exact("x"), exact("td/ns/web/sa/front")]),
        &client()
    ));
    assert!(!covers(principals(&[exact("x"), exact("y")]), &client()));
}

#[test]
fn of_a_not_field_no_value_may_match() {
    let not = |ports: &[u16]| Match {
        not_destination_ports: ports.to_vec(),
        ..Match::default()
    };
    assert!(covers(not(&[81, 82]), &client()));
    assert!(!covers(not(&[81, 80]), &client()));
    assert!(!covers(not(&[80, 81]), &client()));
}

#[test]
fn strings_match_exact_prefix_suffix_and_presence() {
    let prefix = |text: &str| StringMatch::Prefix(text.into());
    let suffix = |text: &str| StringMatch::Suffix(text.into());
    for (value, expected) in [
        (exact("td/ns/web/sa/front"), true),
        (exact("td/ns/web/sa/fron"), false),
        (exact("td/ns/web/sa/front "), false),
        (exact("TD/ns/web/sa/front"), false),
        (exact(""), false),
        (prefix("td/ns/web/"), true),
        (prefix("td/ns/web/sa/front"), true),
        (prefix("td/ns/web/sa/front-end"), false),
        (prefix("/td"), false),
        (prefix(""), true),
        (suffix("/sa/front"), true),
        (suffix("td/ns/web/sa/front"), true),
        (suffix("x/td/ns/web/sa/front"), false),
        (suffix("fron"), false),
        (suffix(""), true),
        (StringMatch::Presence, true),
    ] {
        assert_eq!(
            covers(principals(std::slice::from_ref(&value)), &client()),
            expected,
            "{value:?}"
        );
    }
}

#[test]
fn principals_are_compared_without_the_scheme() {
    assert!(covers(
        principals(&[exact("td/ns/web/sa/front")]),
        &client()
    ));
    assert!(!covers(
        principals(&[exact("spiffe://td/ns/web/sa/front")]),
        &client()
    ));
}

#[test]
fn namespaces_are_the_sources() {
    let namespaces = |text: &str| Match {
        namespaces: vec![exact(text)],
        ..Match::default()
    };
    assert!(covers(namespaces("web"), &client()));
    assert!(
        !covers(namespaces("ns"), &client()),
        "the policy's own namespace"
    );
    let not = Match {
        not_namespaces: vec![exact("web")],
        ..Match::default()
    };
    assert!(!covers(not.clone(), &client()));
    assert!(covers(
        not,
        &from("td/ns/db/sa/front", "10.0.0.1", "10.0.0.9:80")
    ));
}

#[test]
fn service_accounts_match_with_their_namespace() {
    let one = |namespace, name| Match {
        service_accounts: vec![account(namespace, name)],
        ..Match::default()
    };
    assert!(covers(one("web", "front"), &client()));
    assert!(!covers(one("db", "front"), &client()));
    assert!(!covers(one("web", "fron"), &client()));
    assert!(!covers(one("", "front"), &client()));
    let not = Match {
        not_service_accounts: vec![account("web", "front")],
        ..Match::default()
    };
    assert!(!covers(not, &client()));
}

#[test]
fn without_an_identity_positive_conditions_on_it_fail_and_negative_ones_hold() {
    let presence = || vec![StringMatch::Presence];
    for positive in [
        Match {
            namespaces: presence(),
            ..Match::default()
        },
        Match {
            principals: presence(),
            ..Match::default()
        },
        Match {
            principals: vec![StringMatch::Prefix("".into())],
            ..Match::default()
        },
        Match {
            service_accounts: vec![account("", "")],
            ..Match::default()
        },
    ] {
        assert!(!covers(positive.clone(), &plaintext()), "{positive:?}");
    }
    for negative in [
        Match {
            not_namespaces: presence(),
            ..Match::default()
        },
        Match {
            not_principals: presence(),
            ..Match::default()
        },
        Match {
            not_service_accounts: vec![account("web", "front")],
            ..Match::default()
        },
    ] {
        assert!(covers(negative.clone(), &plaintext()), "{negative:?}");
    }
}

#[test]
fn strict_mutual_tls_is_a_deny_on_the_absence_of_a_principal() {
    let strict = || {
        deny(
            "strict",
            any_of([Match {
                not_principals: vec![StringMatch::Presence],
                ..Match::default()
            }]),
        )
    };
    assert_eq!(
        outcome(vec![strict()], &plaintext()),
        "denied by policy ns/strict"
    );
    assert_eq!(
        outcome(vec![strict()], &client()),
        "allowed, no ALLOW policy applies"
    );
}

#[test]
fn addresses_match_by_prefix_and_family() {
    let source = |net: &str| Match {
        source_ips: vec![net.parse().unwrap()],
        ..Match::default()
    };
    let destination = |net: &str| Match {
        destination_ips: vec![net.parse().unwrap()],
        ..Match::default()
    };
    for (net, expected) in [
        ("10.0.0.1/32", true),
        ("10.0.0.0/31", true),
        ("10.0.0.2/31", false),
        ("10.255.0.0/8", true),
        ("0.0.0.0/0", true),
        ("::/0", false),
        ("11.0.0.0/8", false),
    ] {
        assert_eq!(covers(source(net), &client()), expected, "{net}");
    }
    assert!(covers(destination("10.0.0.9/32"), &client()));
    assert!(
        !covers(destination("10.0.0.1/32"), &client()),
        "the source's address"
    );
    assert!(!covers(
        Match {
            not_destination_ips: vec!["10.0.0.0/8".parse().unwrap()],
            ..Match::default()
        },
        &client()
    ));

    let six = from("", "fd00::1", "[fd00::9]:80");
    assert!(covers(source("fd00::/64"), &six));
    assert!(!covers(source("0.0.0.0/0"), &six));
}

#[test]
fn an_ipv4_mapped_address_is_its_ipv4_address() {
    let mapped = from("", "::ffff:10.0.0.1", "[::ffff:10.0.0.9]:80");
    assert_eq!(mapped, plaintext());
    assert!(covers(
        Match {
            source_ips: vec!["10.0.0.1/32".parse().unwrap()],
            ..Match::default()
        },
        &mapped
    ));
    assert!(covers(
        Match {
            destination_ips: vec!["10.0.0.9/32".parse().unwrap()],
            ..Match::default()
        },
        &mapped
    ));
}

#[test]
fn the_port_is_the_destinations() {
    assert!(covers(port(80), &client()));
    assert!(!covers(port(8080), &client()));
}

#[test]
fn an_unknown_policy_refuses_unless_relaxed() {
    let unknown = |policies| Applicable {
        unknown: vec![PolicyName::new("ns", "late").unwrap()],
        ..applicable(policies)
    };
    let decide = |policies, unknown_policy_refuses| {
        evaluate(
            &unknown(policies),
            &client(),
            Strictness {
                unknown_policy_refuses,
            },
        )
        .decision
        .to_string()
    };
    assert_eq!(
        decide(vec![], true),
        "policy ns/late applies but is not known yet"
    );
    assert_eq!(
        decide(vec![allow("a", everything())], true),
        "policy ns/late applies but is not known yet"
    );
    assert_eq!(
        decide(vec![deny("d", everything())], true),
        "denied by policy ns/d"
    );
    assert_eq!(decide(vec![], false), "allowed, no ALLOW policy applies");
    assert_eq!(
        decide(vec![allow("a", nothing())], false),
        "no ALLOW policy matches"
    );
}

#[test]
fn strictness_is_the_default() {
    assert!(Strictness::default().unknown_policy_refuses);
}

#[test]
fn a_dry_run_policy_never_decides() {
    for (policies, expected) in [
        (
            vec![dry(deny("d", everything()))],
            "allowed, no ALLOW policy applies",
        ),
        (
            vec![dry(allow("a", nothing()))],
            "allowed, no ALLOW policy applies",
        ),
        (
            vec![dry(allow("a", everything())), allow("b", nothing())],
            "no ALLOW policy matches",
        ),
        (
            vec![dry(deny("d", everything())), allow("b", everything())],
            "allowed by policy ns/b",
        ),
    ] {
        assert_eq!(outcome(policies, &client()), expected);
    }
}

#[test]
fn a_dry_run_policy_that_would_refuse_is_reported() {
    for (policies, expected) in [
        (vec![dry(deny("d", everything()))], vec!["ns/d"]),
        (vec![dry(deny("d", nothing()))], vec![]),
        (vec![deny("d", everything())], vec![]),
        (vec![dry(allow("a", nothing()))], vec!["ns/a"]),
        (vec![dry(allow("a", everything()))], vec![]),
        (
            vec![dry(allow("a", nothing())), allow("b", everything())],
            vec![],
        ),
        (
            vec![dry(allow("a", nothing())), dry(allow("b", nothing()))],
            vec!["ns/a", "ns/b"],
        ),
    ] {
        let evaluation = evaluate(&applicable(policies), &client(), Strictness::default());
        let reported: Vec<_> = evaluation
            .would_deny
            .iter()
            .map(PolicyName::as_str)
            .collect();
        assert_eq!(reported, expected);
    }
}

#[test]
fn whether_a_decision_looks_at_addresses_is_known() {
    let net = || vec!["10.0.0.0/8".parse().unwrap()];
    let source = || {
        any_of([
            port(80),
            Match {
                source_ips: net(),
                ..Match::default()
            },
        ])
    };
    let not_source = || {
        any_of([Match {
            not_source_ips: net(),
            ..Match::default()
        }])
    };
    let destination = || {
        any_of([Match {
            destination_ips: net(),
            ..Match::default()
        }])
    };
    let not_destination = || {
        any_of([Match {
            not_destination_ips: net(),
            ..Match::default()
        }])
    };
    let looks = |policy: Authorization| {
        let applicable = applicable(vec![allow("first", everything()), policy]);
        (
            applicable.looks_at_addresses(),
            applicable.looks_at_destination_ips(),
        )
    };
    assert_eq!(looks(allow("a", any_of([port(80)]))), (false, false));
    assert_eq!(looks(allow("a", source())), (true, false));
    assert_eq!(looks(deny("d", not_source())), (true, false));
    assert_eq!(looks(deny("d", destination())), (false, true));
    assert_eq!(looks(allow("a", not_destination())), (false, true));
    assert_eq!(looks(dry(allow("a", source()))), (false, false));
}

#[test]
fn a_policys_name_has_two_parts() {
    let name: PolicyName = "ns/a".parse().unwrap();
    assert_eq!(
        (name.namespace(), name.name(), name.as_str()),
        ("ns", "a", "ns/a")
    );
    for text in ["", "/", "a", "ns/", "/a", "ns/a/b"] {
        assert!(text.parse::<PolicyName>().is_err(), "{text:?}");
    }
}
