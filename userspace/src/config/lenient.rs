//! What this agent is stricter about than ztunnel, each of which an operator may have ztunnel's way by naming it in `CULVERT_LENIENT`.
//!
//! Invariant: what is not named is strict. Read by `node`, which tells each part what concerns it, and shown by `culvert status`.

use std::collections::BTreeSet;

use serde::{Serialize, Serializer};

/// One thing that may be lenient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leniency {
    UnknownPolicies,
    UnreadableResources,
    LaterPolicies,
    CertificateNames,
    Authority,
    HandshakeDeadlines,
}

impl Leniency {
    /// In the order in which they are shown.
    pub const ALL: [Self; 6] = [
        Self::UnknownPolicies,
        Self::UnreadableResources,
        Self::LaterPolicies,
        Self::CertificateNames,
        Self::Authority,
        Self::HandshakeDeadlines,
    ];

    /// The one of this name.
    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }

    /// As it is written in the setting. Never changes once released.
    pub fn name(self) -> &'static str {
        match self {
            Self::UnknownPolicies => "unknown-policies",
            Self::UnreadableResources => "unreadable-resources",
            Self::LaterPolicies => "later-policies",
            Self::CertificateNames => "certificate-names",
            Self::Authority => "authority",
            Self::HandshakeDeadlines => "handshake-deadlines",
        }
    }

    /// What it has come to, for an operator.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::UnknownPolicies => {
                "a policy that a workload refers to and that is not known is skipped"
            }
            Self::UnreadableResources => {
                "a resource is taken without those of its addresses, ports and matches that cannot be read"
            }
            Self::LaterPolicies => {
                "a policy with a selector leaves connections alone that were open before it was attached"
            }
            Self::CertificateNames => {
                "of several names in a peer's certificate the first SPIFFE id counts"
            }
            Self::Authority => {
                "a tunnel into a waypoint may name what is behind it, in the place of the pod's own addresses"
            }
            Self::HandshakeDeadlines => {
                "a peer may take as long as it wants for its TLS and HTTP/2 handshakes"
            }
        }
    }
}

/// What is lenient; nothing, unless somebody asked for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lenient(BTreeSet<Leniency>);

impl Lenient {
    /// Whether this is.
    pub fn about(&self, what: Leniency) -> bool {
        self.0.contains(&what)
    }

    /// All that is.
    pub fn iter(&self) -> impl Iterator<Item = Leniency> + '_ {
        self.0.iter().copied()
    }

    /// A line for each, for an operator.
    pub fn warnings(&self) -> impl Iterator<Item = String> + '_ {
        self.iter().map(|what| {
            format!(
                "lenient by CULVERT_LENIENT ({}): {}",
                what.name(),
                what.meaning()
            )
        })
    }
}

impl FromIterator<Leniency> for Lenient {
    fn from_iter<I: IntoIterator<Item = Leniency>>(all: I) -> Self {
        Self(all.into_iter().collect())
    }
}

impl Serialize for Lenient {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let names: Vec<_> = self.iter().map(Leniency::name).collect();
        serializer.serialize_str(&names.join(","))
    }
}
