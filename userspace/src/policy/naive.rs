//! A second evaluation, written from the rules' description alone and as plainly as possible: every rule is spelled out
//! without shortcuts, over plain strings and bits. Only tests use it, to be compared with [`evaluate`](super::evaluate).

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Action, Authorization, Clause, Connection, Match, Rule, StringMatch};

/// What the naive evaluation says.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Allowed { by: Vec<String> },
    DeniedBy(Vec<String>),
    DeniedForUnknown,
    DeniedForLackOfAllow,
}

/// All matching policies are named, since the order in which the real one finds them is its own.
pub fn judge(
    policies: &[Authorization],
    unknown: usize,
    strict: bool,
    connection: &Connection,
) -> Said {
    let mut matching_denies = vec![];
    let mut matching_allows = vec![];
    let mut allow_policies = 0;
    for policy in policies {
        if policy.dry_run {
            continue;
        }
        let name = policy.name.to_string();
        if policy.action == Action::Allow {
            allow_policies += 1;
            if policy_matches(policy, connection) {
                matching_allows.push(name);
            }
        } else if policy_matches(policy, connection) {
            matching_denies.push(name);
        }
    }
    if !matching_denies.is_empty() {
        Said::DeniedBy(matching_denies)
    } else if unknown > 0 && strict {
        Said::DeniedForUnknown
    } else if allow_policies > 0 && matching_allows.is_empty() {
        Said::DeniedForLackOfAllow
    } else {
        Said::Allowed {
            by: matching_allows,
        }
    }
}

/// Those dry-run policies that make a difference for the worse once all of them are enforced.
pub fn dry_run_refusals(policies: &[Authorization], connection: &Connection) -> Vec<String> {
    let mut allow_matches = false;
    for policy in policies {
        if policy.action == Action::Allow && policy_matches(policy, connection) {
            allow_matches = true;
        }
    }
    let mut refusing = vec![];
    for policy in policies {
        let refuses = match policy.action {
            Action::Deny => policy_matches(policy, connection),
            Action::Allow => !allow_matches,
        };
        if policy.dry_run && refuses {
            refusing.push(policy.name.to_string());
        }
    }
    refusing.sort();
    refusing
}

fn policy_matches(policy: &Authorization, connection: &Connection) -> bool {
    let mut result = false;
    for rule in &policy.rules {
        if rule_matches(rule, connection) {
            result = true;
        }
    }
    result
}

fn rule_matches(rule: &Rule, connection: &Connection) -> bool {
    if rule.clauses.is_empty() {
        return true;
    }
    let mut result = true;
    for clause in &rule.clauses {
        if !clause_matches(clause, connection) {
            result = false;
        }
    }
    result
}

fn clause_matches(clause: &Clause, connection: &Connection) -> bool {
    if clause.matches.is_empty() {
        return true;
    }
    let mut result = false;
    for one in &clause.matches {
        if match_matches(one, connection) {
            result = true;
        }
    }
    result
}

fn match_matches(one: &Match, connection: &Connection) -> bool {
    let text = connection.source().map(|identity| identity.to_string());
    let text = text.as_deref().map(|uri| uri.replacen("spiffe://", "", 1));
    let parts: Option<Vec<&str>> = text.as_deref().map(|text| text.split('/').collect());
    // [trust domain, ns, namespace, sa, service account]
    let namespace: Option<&str> = parts.as_ref().map(|parts| parts[2]);
    let account: Option<&str> = parts.as_ref().map(|parts| parts[4]);

    // For each field that is set: is it satisfied?
    let mut satisfied = vec![];
    if !one.namespaces.is_empty() {
        satisfied.push(count_strings(&one.namespaces, namespace) > 0);
    }
    if !one.not_namespaces.is_empty() {
        satisfied.push(count_strings(&one.not_namespaces, namespace) == 0);
    }
    if !one.principals.is_empty() {
        satisfied.push(count_strings(&one.principals, text.as_deref()) > 0);
    }
    if !one.not_principals.is_empty() {
        satisfied.push(count_strings(&one.not_principals, text.as_deref()) == 0);
    }
    let accounts = |list: &[super::ServiceAccountMatch]| {
        list.iter()
            .filter(|wanted| {
                (namespace, account) == (Some(&*wanted.namespace), Some(&*wanted.service_account))
            })
            .count()
    };
    if !one.service_accounts.is_empty() {
        satisfied.push(accounts(&one.service_accounts) > 0);
    }
    if !one.not_service_accounts.is_empty() {
        satisfied.push(accounts(&one.not_service_accounts) == 0);
    }
    if !one.source_ips.is_empty() {
        satisfied.push(count_nets(&one.source_ips, connection.source_ip()) > 0);
    }
    if !one.not_source_ips.is_empty() {
        satisfied.push(count_nets(&one.not_source_ips, connection.source_ip()) == 0);
    }
    if !one.destination_ips.is_empty() {
        satisfied.push(count_nets(&one.destination_ips, connection.destination().ip()) > 0);
    }
    if !one.not_destination_ips.is_empty() {
        satisfied.push(count_nets(&one.not_destination_ips, connection.destination().ip()) == 0);
    }
    let port = connection.destination().port();
    if !one.destination_ports.is_empty() {
        satisfied.push(
            one.destination_ports
                .iter()
                .filter(|wanted| **wanted == port)
                .count()
                > 0,
        );
    }
    if !one.not_destination_ports.is_empty() {
        satisfied.push(
            one.not_destination_ports
                .iter()
                .filter(|wanted| **wanted == port)
                .count()
                == 0,
        );
    }
    // A match with no field set never matches.
    !satisfied.is_empty() && !satisfied.contains(&false)
}

fn count_strings(values: &[StringMatch], text: Option<&str>) -> usize {
    let Some(text) = text else { return 0 };
    let mut count = 0;
    for value in values {
        let (head, tail) = (
            |n: usize| text.get(..n),
            |n: usize| text.len().checked_sub(n).and_then(|at| text.get(at..)),
        );
        let hit = match value {
            StringMatch::Exact(wanted) => wanted.chars().eq(text.chars()),
            StringMatch::Prefix(wanted) => head(wanted.len()) == Some(wanted),
            StringMatch::Suffix(wanted) => tail(wanted.len()) == Some(wanted),
            StringMatch::Presence => text.chars().count() > 0,
        };
        if hit {
            count += 1;
        }
    }
    count
}

fn count_nets(nets: &[IpNet], ip: IpAddr) -> usize {
    nets.iter()
        .filter(|net| bits(net.addr()).starts_with(&bits(ip)[..1]) && common(net, ip))
        .count()
}

/// The first bits of net and address, as many as the prefix is long, are the same.
fn common(net: &IpNet, ip: IpAddr) -> bool {
    let length = 1 + usize::from(net.prefix_len());
    bits(net.addr())[..length] == bits(ip)[..length]
}

/// An address as text: its family, then each bit.
fn bits(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => format!("4{:032b}", u32::from(ip)),
        IpAddr::V6(ip) => format!("6{:0128b}", u128::from(ip)),
    }
}
