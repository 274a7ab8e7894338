//! Authorization policies as data: what istiod or the local file says, already checked by the source that read it.
//!
//! Made by the sources in `xds`, kept by `mesh`, judged by [`evaluate`](super::evaluate).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;

/// The name of a policy, `namespace/name`, as workloads refer to it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyName(Arc<str>);

/// A text that is not a policy's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a policy's name; write it as namespace/name")]
pub struct PolicyNameError(String);

/// One authorization policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    /// Where it lives and what it is called.
    pub name: PolicyName,
    /// To which workloads it applies.
    pub scope: Scope,
    /// What a match means.
    pub action: Action,
    /// Evaluated and reported, never decisive.
    pub dry_run: bool,
    /// ORed; without any, the policy never matches.
    pub rules: Vec<Rule>,
}

/// To which workloads a policy applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// All of the mesh. Istiod gives it to the policies of the root namespace.
    Global,
    /// All workloads of the policy's namespace.
    Namespace,
    /// The workloads that list it.
    WorkloadSelector,
}

/// What it means that a policy matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// The connection is allowed unless a DENY matches; one that no ALLOW matches is refused.
    Allow,
    /// The connection is refused.
    Deny,
}

/// One rule of a policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// ANDed; without any, the rule always matches.
    pub clauses: Vec<Clause>,
}

/// One clause of a rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Clause {
    /// ORed; without any, the clause always matches.
    pub matches: Vec<Match>,
}

/// Conditions on a connection. Those that are set are ANDed, the values of one are ORed, and of a `not_` condition no value
/// may match. With nothing set it never matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match {
    /// The source's namespace.
    pub namespaces: Vec<StringMatch>,
    /// The source's namespace is none of these; also true without an identity.
    pub not_namespaces: Vec<StringMatch>,
    /// The source's identity, without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// The source's identity is none of these; also true without an identity.
    pub not_principals: Vec<StringMatch>,
    /// The source's service account with its namespace.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// The source's service account is none of these; also true without an identity.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The source's address.
    pub source_ips: Vec<IpNet>,
    /// The source's address is in none of these.
    pub not_source_ips: Vec<IpNet>,
    /// The destination's address.
    pub destination_ips: Vec<IpNet>,
    /// The destination's address is in none of these.
    pub not_destination_ips: Vec<IpNet>,
    /// The port that the destination's application listens on.
    pub destination_ports: Vec<u16>,
    /// The destination's port is none of these.
    pub not_destination_ports: Vec<u16>,
}

/// A condition on a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StringMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Begins with.
    Prefix(Arc<str>),
    /// Ends with.
    Suffix(Arc<str>),
    /// There is one.
    Presence,
}

/// A condition on a service account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub service_account: Arc<str>,
}

impl PolicyName {
    /// Joins the two parts.
    ///
    /// # Errors
    /// A part is empty or contains a slash.
    pub fn new(namespace: &str, name: &str) -> Result<Self, PolicyNameError> {
        let joined = format!("{namespace}/{name}");
        if namespace.is_empty() || name.is_empty() || namespace.contains('/') || name.contains('/')
        {
            return Err(PolicyNameError(joined));
        }
        Ok(Self(joined.into()))
    }

    /// The namespace of the policy.
    pub fn namespace(&self) -> &str {
        self.0
            .split_once('/')
            .map_or("", |(namespace, _)| namespace)
    }

    /// The name within its namespace.
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, name)| name)
    }

    /// `namespace/name`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PolicyName {
    type Err = PolicyNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, name) = text
            .split_once('/')
            .ok_or_else(|| PolicyNameError(text.to_owned()))?;
        Self::new(namespace, name)
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyName({self})")
    }
}

impl Match {
    /// True if the outcome depends on where the connection comes from, not only on who opened it.
    pub fn looks_at_source_ips(&self) -> bool {
        !self.source_ips.is_empty() || !self.not_source_ips.is_empty()
    }

    /// True if the outcome depends on which of a workload's addresses is the destination.
    pub fn looks_at_destination_ips(&self) -> bool {
        !self.destination_ips.is_empty() || !self.not_destination_ips.is_empty()
    }
}

impl Authorization {
    /// All conditions of all rules.
    pub(super) fn matches(&self) -> impl Iterator<Item = &Match> {
        self.rules
            .iter()
            .flat_map(|rule| &rule.clauses)
            .flat_map(|clause| &clause.matches)
    }
}
