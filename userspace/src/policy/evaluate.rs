//! The decision about one connection under the policies of its destination.
//!
//! Invariants: a dry-run policy never decides; a policy that is referenced but not known refuses, unless the operator
//! relaxed that; a [`Permit`] is made here and nowhere else. Called by `mesh::Mesh::authorize`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{
    Action, Authorization, Clause, Identity, Match, PolicyName, Rule, ServiceAccountMatch,
    StringMatch,
};

/// What policies judge: who opens a connection to what. IPv4-mapped addresses are turned into IPv4, so that a policy on
/// IPv4 addresses cannot be passed by another spelling.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Connection {
    source: Option<Identity>,
    source_ip: IpAddr,
    destination: SocketAddr,
}

/// The policies that apply to one destination workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applicable {
    /// Those that are known, each once.
    pub policies: Vec<Arc<Authorization>>,
    /// Those that the workload refers to and that are not known.
    pub unknown: Vec<PolicyName>,
}

/// How strictly to read what is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strictness {
    /// Refuse where a policy is referenced but not known, instead of ignoring the reference.
    pub unknown_policy_refuses: bool,
}

/// The outcome for one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evaluation {
    /// What happens to it.
    pub decision: Decision,
    /// The dry-run policies that would refuse it if all of them were enforced: each DENY that matches; each ALLOW, if no
    /// ALLOW at all matches. To be logged.
    pub would_deny: Vec<PolicyName>,
}

/// What happens to a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// It may be carried.
    Allow(Permit),
    /// It is refused before the application reads a byte.
    Deny(DenyReason),
}

/// Leave to carry a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permit {
    policy: Option<PolicyName>,
}

/// Why a connection is refused.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DenyReason {
    /// This DENY policy matches.
    MatchedDeny(PolicyName),
    /// There are ALLOW policies and none of them matches.
    NoAllowMatched,
    /// The workload refers to this policy, which is not known yet: it might refuse.
    UnknownPolicy(PolicyName),
}

/// Decides about `connection` under the policies that apply to its destination.
///
/// A DENY that matches refuses, whatever else is there. Then an unknown policy refuses. Without any ALLOW policy the rest is
/// allowed, otherwise one of them must match.
pub fn evaluate(
    applicable: &Applicable,
    connection: &Connection,
    strictness: Strictness,
) -> Evaluation {
    Evaluation {
        decision: decide(applicable, connection, strictness),
        would_deny: would_deny(applicable, connection),
    }
}

fn decide(applicable: &Applicable, connection: &Connection, strictness: Strictness) -> Decision {
    let enforced = |action| applicable.of(action).filter(|policy| !policy.dry_run);

    if let Some(policy) = enforced(Action::Deny).find(|policy| policy.covers(connection)) {
        return Decision::Deny(DenyReason::MatchedDeny(policy.name.clone()));
    }
    if strictness.unknown_policy_refuses
        && let Some(name) = applicable.unknown.first()
    {
        return Decision::Deny(DenyReason::UnknownPolicy(name.clone()));
    }
    let mut allows = enforced(Action::Allow).peekable();
    if allows.peek().is_none() {
        return Decision::Allow(Permit { policy: None });
    }
    match allows.find(|policy| policy.covers(connection)) {
        Some(policy) => Decision::Allow(Permit {
            policy: Some(policy.name.clone()),
        }),
        None => Decision::Deny(DenyReason::NoAllowMatched),
    }
}

fn would_deny(applicable: &Applicable, connection: &Connection) -> Vec<PolicyName> {
    let dry = |action| applicable.of(action).filter(|policy| policy.dry_run);
    let mut names: Vec<_> = dry(Action::Deny)
        .filter(|policy| policy.covers(connection))
        .map(|policy| policy.name.clone())
        .collect();
    // Policies without dry runs, nearly all of them, stop here.
    if dry(Action::Allow).next().is_some()
        && !applicable
            .of(Action::Allow)
            .any(|policy| policy.covers(connection))
    {
        names.extend(dry(Action::Allow).map(|policy| policy.name.clone()));
    }
    names
}

impl Applicable {
    /// True if a decision depends on the source's address: then it holds for one source pod, not for all of its identity.
    pub fn looks_at_addresses(&self) -> bool {
        self.deciding_matches().any(Match::looks_at_source_ips)
    }

    /// True if a decision depends on which of the destination's addresses is used.
    pub fn looks_at_destination_ips(&self) -> bool {
        self.deciding_matches().any(Match::looks_at_destination_ips)
    }

    /// True if there is something to log beside the decision.
    pub fn has_dry_run(&self) -> bool {
        self.policies.iter().any(|policy| policy.dry_run)
    }

    fn deciding_matches(&self) -> impl Iterator<Item = &Match> {
        self.policies
            .iter()
            .filter(|policy| !policy.dry_run)
            .flat_map(|policy| policy.matches())
    }

    fn of(&self, action: Action) -> impl Iterator<Item = &Authorization> {
        self.policies
            .iter()
            .map(AsRef::as_ref)
            .filter(move |policy| policy.action == action)
    }
}

impl Connection {
    /// `source` is the verified identity of the client, if it has one; `destination` the address and port that the
    /// destination's application listens on, not that of a service or of the agent.
    pub fn new(source: Option<Identity>, source_ip: IpAddr, destination: SocketAddr) -> Self {
        Self {
            source,
            source_ip: source_ip.to_canonical(),
            destination: SocketAddr::new(destination.ip().to_canonical(), destination.port()),
        }
    }

    /// The verified identity of the client.
    pub fn source(&self) -> Option<&Identity> {
        self.source.as_ref()
    }

    /// The address of the client, never IPv4-mapped.
    pub fn source_ip(&self) -> IpAddr {
        self.source_ip
    }

    /// The address and port of the destination, never IPv4-mapped.
    pub fn destination(&self) -> SocketAddr {
        self.destination
    }
}

impl Authorization {
    fn covers(&self, connection: &Connection) -> bool {
        self.rules.iter().any(|rule| rule.covers(connection))
    }
}

impl Rule {
    fn covers(&self, connection: &Connection) -> bool {
        self.clauses.iter().all(|clause| clause.covers(connection))
    }
}

impl Clause {
    fn covers(&self, connection: &Connection) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|one| one.covers(connection))
    }
}

impl Match {
    fn covers(&self, connection: &Connection) -> bool {
        let source = connection.source.as_ref();
        let mut fields = Fields::default();

        let namespace = |value: &StringMatch| source.is_some_and(|id| value.covers(id.namespace()));
        fields.any_and_none(&self.namespaces, &self.not_namespaces, namespace);
        let principal = |value: &StringMatch| source.is_some_and(|id| value.covers(id.principal()));
        fields.any_and_none(&self.principals, &self.not_principals, principal);
        let service_account =
            |value: &ServiceAccountMatch| source.is_some_and(|id| value.covers(id));
        fields.any_and_none(
            &self.service_accounts,
            &self.not_service_accounts,
            service_account,
        );

        let (source_ip, destination) = (connection.source_ip, connection.destination);
        fields.any_and_none(&self.source_ips, &self.not_source_ips, |net| {
            net.contains(&source_ip)
        });
        fields.any_and_none(&self.destination_ips, &self.not_destination_ips, |net| {
            net.contains(&destination.ip())
        });
        fields.any_and_none(
            &self.destination_ports,
            &self.not_destination_ports,
            |port| *port == destination.port(),
        );

        fields.outcome()
    }
}

/// The fields of one match seen so far.
#[derive(Default)]
struct Fields {
    set: bool,
    failed: bool,
}

impl Fields {
    /// Takes in a field and its `not_` twin. An empty field is not set and says nothing.
    fn any_and_none<T>(&mut self, any: &[T], none: &[T], covers: impl Fn(&T) -> bool) {
        self.set |= !any.is_empty() || !none.is_empty();
        // A condition that is already lost is not looked at again.
        self.failed = self.failed
            || (!any.is_empty() && !any.iter().any(&covers))
            || none.iter().any(&covers);
    }

    fn outcome(self) -> bool {
        self.set && !self.failed
    }
}

impl StringMatch {
    fn covers(&self, text: &str) -> bool {
        match self {
            Self::Exact(value) => text == &**value,
            Self::Prefix(value) => text.starts_with(&**value),
            Self::Suffix(value) => text.ends_with(&**value),
            Self::Presence => !text.is_empty(),
        }
    }
}

impl ServiceAccountMatch {
    fn covers(&self, identity: &Identity) -> bool {
        identity.namespace() == &*self.namespace
            && identity.service_account() == &*self.service_account
    }
}

impl Permit {
    /// The ALLOW policy that matched; none where the destination has no ALLOW policy.
    pub fn policy(&self) -> Option<&PolicyName> {
        self.policy.as_ref()
    }
}

impl Evaluation {
    /// True if the connection may be carried.
    pub fn is_allowed(&self) -> bool {
        matches!(self.decision, Decision::Allow(_))
    }
}

impl Default for Strictness {
    fn default() -> Self {
        Self {
            unknown_policy_refuses: true,
        }
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MatchedDeny(name) => write!(f, "denied by policy {name}"),
            Self::NoAllowMatched => f.write_str("no ALLOW policy matches"),
            Self::UnknownPolicy(name) => write!(f, "policy {name} applies but is not known yet"),
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow(Permit { policy: Some(name) }) => write!(f, "allowed by policy {name}"),
            Self::Allow(Permit { policy: None }) => f.write_str("allowed, no ALLOW policy applies"),
            Self::Deny(reason) => reason.fmt(f),
        }
    }
}
