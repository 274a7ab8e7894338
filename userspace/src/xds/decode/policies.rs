//! Authorization policies.

use std::sync::Arc;

use ipnet::IpNet;

use super::{ResourceError, few, ip, port, range, unknown};
use crate::policy::{
    Action, Authorization, Clause, Match, PolicyName, Rule, Scope, ServiceAccountMatch, StringMatch,
};
use crate::wire::istio::security as wire;

/// A policy.
///
/// # Errors
/// The first field that is wrong.
pub fn policy(message: wire::Authorization) -> Result<Authorization, ResourceError> {
    few("rules", message.rules.len())?;
    Ok(Authorization {
        name: PolicyName::new(&message.namespace, &message.name)?,
        scope: match wire::Scope::try_from(message.scope) {
            Ok(wire::Scope::Global) => Scope::Global,
            Ok(wire::Scope::Namespace) => Scope::Namespace,
            Ok(wire::Scope::WorkloadSelector) => Scope::WorkloadSelector,
            Err(_) => return Err(unknown("scope", message.scope)),
        },
        action: match wire::Action::try_from(message.action) {
            Ok(wire::Action::Allow) => Action::Allow,
            Ok(wire::Action::Deny) => Action::Deny,
            Err(_) => return Err(unknown("action", message.action)),
        },
        dry_run: message.dry_run,
        rules: all(message.rules, rule)?,
    })
}

fn rule(message: wire::Rule) -> Result<Rule, ResourceError> {
    few("clauses", message.clauses.len())?;
    let clause = |message: wire::Clause| {
        few("matches", message.matches.len())?;
        Ok(Clause {
            matches: all(message.matches, one_match)?,
        })
    };
    Ok(Rule {
        clauses: all(message.clauses, clause)?,
    })
}

fn one_match(message: wire::Match) -> Result<Match, ResourceError> {
    let nets = |field, list: Vec<wire::Address>| all(list, |address| net(field, &address));
    let ports = |list: Vec<u32>| all(list, |number| port("destination port", number));
    Ok(Match {
        namespaces: all(message.namespaces, |it| string("namespace", it))?,
        not_namespaces: all(message.not_namespaces, |it| string("namespace", it))?,
        principals: all(message.principals, principal)?,
        not_principals: all(message.not_principals, principal)?,
        service_accounts: all(message.service_accounts, account)?,
        not_service_accounts: all(message.not_service_accounts, account)?,
        source_ips: nets("source address", message.source_ips)?,
        not_source_ips: nets("source address", message.not_source_ips)?,
        destination_ips: nets("destination address", message.destination_ips)?,
        not_destination_ips: nets("destination address", message.not_destination_ips)?,
        destination_ports: ports(message.destination_ports)?,
        not_destination_ports: ports(message.not_destination_ports)?,
    })
}

pub(super) fn net(field: &'static str, message: &wire::Address) -> Result<IpNet, ResourceError> {
    range(field, ip(field, &message.address)?, message.length)
}

fn string(field: &'static str, message: wire::StringMatch) -> Result<StringMatch, ResourceError> {
    use wire::string_match::MatchType;
    Ok(match message.match_type {
        Some(MatchType::Exact(text)) => StringMatch::Exact(text.into()),
        Some(MatchType::Prefix(text)) => StringMatch::Prefix(text.into()),
        Some(MatchType::Suffix(text)) => StringMatch::Suffix(text.into()),
        Some(MatchType::Presence(())) => StringMatch::Presence,
        None => return Err(ResourceError::Missing(field)),
    })
}

/// Identities are compared without the scheme of their URI.
fn principal(message: wire::StringMatch) -> Result<StringMatch, ResourceError> {
    let bare = |text: Arc<str>| match text.strip_prefix("spiffe://") {
        Some(bare) => bare.into(),
        None => text,
    };
    Ok(match string("principal", message)? {
        StringMatch::Exact(text) => StringMatch::Exact(bare(text)),
        StringMatch::Prefix(text) => StringMatch::Prefix(bare(text)),
        other => other,
    })
}

fn account(message: wire::ServiceAccountMatch) -> Result<ServiceAccountMatch, ResourceError> {
    Ok(ServiceAccountMatch {
        namespace: message.namespace.into(),
        service_account: message.service_account.into(),
    })
}

fn all<T, U>(
    list: Vec<T>,
    one: impl Fn(T) -> Result<U, ResourceError>,
) -> Result<Vec<U>, ResourceError> {
    few("values", list.len())?;
    list.into_iter().map(one).collect()
}
