//! The SPIFFE identity of a workload: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
//!
//! Invariant: an [`Identity`] has exactly that shape. Its parts are not empty and hold only the characters that the SPIFFE
//! standard allows, so nothing in it needs escaping and equal identities are equal byte for byte. Made by `mesh` from
//! workloads and by `identity` from certificates.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

const SCHEME: &str = "spiffe://";

/// The longest identity, in bytes of its URI (SPIFFE-ID, section 2.3).
const MAX_URI: usize = 2048;

/// The longest trust domain, in bytes (SPIFFE-ID, section 2.1).
const MAX_TRUST_DOMAIN: usize = 255;

/// A workload's identity. Cloning copies one pointer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// `<trust domain>/ns/<namespace>/sa/<service account>`. No part contains a slash, so the text determines the lengths.
    principal: Arc<str>,
    trust_domain_len: usize,
    namespace_len: usize,
}

/// Why a text or its parts are not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The text is not of the one accepted shape.
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Shape(String),
    /// One part is empty.
    #[error("the {0} of an identity is empty; name it")]
    Empty(Part),
    /// One part holds a character that an identity cannot hold.
    #[error("the {part} {value:?} of an identity may hold only {}", part.alphabet())]
    Character {
        /// Which part.
        part: Part,
        /// The part as given, shortened.
        value: String,
    },
    /// Longer than a peer would accept.
    #[error(
        "an identity of {0} bytes is too long; {MAX_URI} are allowed, of which {MAX_TRUST_DOMAIN} for the trust domain"
    )]
    TooLong(usize),
}

/// A part of an identity, for errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The trust domain.
    TrustDomain,
    /// The Kubernetes namespace.
    Namespace,
    /// The Kubernetes service account.
    ServiceAccount,
}

impl Identity {
    /// Joins the three parts.
    ///
    /// # Errors
    /// A part is empty, too long or holds a character that SPIFFE does not allow there.
    pub fn new(
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        let length = SCHEME.len()
            + trust_domain.len()
            + "/ns/".len()
            + namespace.len()
            + "/sa/".len()
            + service_account.len();
        if length > MAX_URI || trust_domain.len() > MAX_TRUST_DOMAIN {
            return Err(IdentityError::TooLong(length));
        }
        Part::TrustDomain.check(trust_domain)?;
        Part::Namespace.check(namespace)?;
        Part::ServiceAccount.check(service_account)?;
        Ok(Self {
            principal: format!("{trust_domain}/ns/{namespace}/sa/{service_account}").into(),
            trust_domain_len: trust_domain.len(),
            namespace_len: namespace.len(),
        })
    }

    /// Reads an identity from its URI, accepting only the exact shape.
    ///
    /// # Errors
    /// Anything else: another scheme or path, a missing, empty or extra part, a port, query, fragment or escape.
    pub fn parse(uri: &str) -> Result<Self, IdentityError> {
        if uri.len() > MAX_URI {
            return Err(IdentityError::TooLong(uri.len()));
        }
        let shape = || IdentityError::Shape(shortened(uri));
        let mut parts = uri.strip_prefix(SCHEME).ok_or_else(shape)?.split('/');
        match (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) {
            (
                Some(trust_domain),
                Some("ns"),
                Some(namespace),
                Some("sa"),
                Some(service_account),
                None,
            ) => Self::new(trust_domain, namespace, service_account),
            _ => Err(shape()),
        }
    }

    /// The trust domain, such as `cluster.local`.
    pub fn trust_domain(&self) -> &str {
        self.part(0..self.trust_domain_len)
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        let start = self.trust_domain_len + "/ns/".len();
        self.part(start..start + self.namespace_len)
    }

    /// The service account.
    pub fn service_account(&self) -> &str {
        let start = self.trust_domain_len + "/ns/".len() + self.namespace_len + "/sa/".len();
        self.part(start..self.principal.len())
    }

    /// The identity as policies write it: without `spiffe://`.
    pub fn principal(&self) -> &str {
        &self.principal
    }

    fn part(&self, range: Range<usize>) -> &str {
        // Always within the text, see the field; an empty part would match no policy's exact value.
        self.principal.get(range).unwrap_or_default()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.principal)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({self})")
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        Self::parse(uri)
    }
}

impl Part {
    fn check(self, value: &str) -> Result<(), IdentityError> {
        if value.is_empty() {
            return Err(IdentityError::Empty(self));
        }
        let letters = |byte: u8| match self {
            Part::TrustDomain => byte.is_ascii_lowercase(),
            Part::Namespace | Part::ServiceAccount => byte.is_ascii_alphabetic(),
        };
        let allowed = value.bytes().all(|byte| {
            letters(byte) || byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'_')
        });
        // A URI library would resolve these two away.
        if !allowed || matches!(value, "." | "..") {
            return Err(IdentityError::Character {
                part: self,
                value: shortened(value),
            });
        }
        Ok(())
    }

    fn alphabet(self) -> &'static str {
        match self {
            Part::TrustDomain => "a-z, 0-9, `.`, `-` and `_`, and not be `.` or `..`",
            Part::Namespace | Part::ServiceAccount => {
                "letters, digits, `.`, `-` and `_`, and not be `.` or `..`"
            }
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::TrustDomain => "trust domain",
            Part::Namespace => "namespace",
            Part::ServiceAccount => "service account",
        })
    }
}

/// What an error quotes of a text from outside.
fn shortened(text: &str) -> String {
    const QUOTED: usize = 128;
    match text.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_one_shape_is_accepted_and_taken_apart() {
        let identity: Identity = "spiffe://cluster.local/ns/web/sa/front-end"
            .parse()
            .unwrap();
        assert_eq!(identity.trust_domain(), "cluster.local");
        assert_eq!(identity.namespace(), "web");
        assert_eq!(identity.service_account(), "front-end");
        assert_eq!(identity.principal(), "cluster.local/ns/web/sa/front-end");
        assert_eq!(
            identity.to_string(),
            "spiffe://cluster.local/ns/web/sa/front-end"
        );
    }

    #[test]
    fn every_other_shape_is_refused() {
        for uri in [
            "",
            "spiffe://",
            "cluster.local/ns/web/sa/x",
            "https://cluster.local/ns/web/sa/x",
            "SPIFFE://cluster.local/ns/web/sa/x",
            " spiffe://cluster.local/ns/web/sa/x",
            "spiffe:/cluster.local/ns/web/sa/x",
            "spiffe:///ns/web/sa/x",
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/web",
            "spiffe://cluster.local/ns/web/sa",
            "spiffe://cluster.local/ns/web/sa/",
            "spiffe://cluster.local/ns//sa/x",
            "spiffe://cluster.local//ns/web/sa/x",
            "spiffe://cluster.local/ns/web/sa/x/",
            "spiffe://cluster.local/ns/web/sa/x/y",
            "spiffe://cluster.local/sa/x/ns/web",
            "spiffe://cluster.local/NS/web/sa/x",
            "spiffe://cluster.local/ns/web/sa/x?y",
            "spiffe://cluster.local/ns/web/sa/x#y",
            "spiffe://cluster.local/ns/web/sa/x%2fy",
            "spiffe://cluster.local/ns/web/sa/x\0",
            "spiffe://cluster.local/ns/web/sa/x\n",
            "spiffe://cluster.local/ns/web/sa/xé",
            "spiffe://cluster.local/ns/../sa/x",
            "spiffe://cluster.local/ns/web/sa/.",
            "spiffe://cluster.local:443/ns/web/sa/x",
            "spiffe://user@cluster.local/ns/web/sa/x",
            "spiffe://Cluster.local/ns/web/sa/x",
            "spiffe://*/ns/web/sa/x",
        ] {
            assert!(Identity::parse(uri).is_err(), "{uri:?} was accepted");
        }
    }

    #[test]
    fn length_is_bounded() {
        let uri = |length: usize| {
            let prefix = "spiffe://td/ns/ns/sa/";
            format!("{prefix}{}", "a".repeat(length - prefix.len()))
        };
        assert!(Identity::parse(&uri(MAX_URI)).is_ok());
        assert_eq!(
            Identity::parse(&uri(MAX_URI + 1)),
            Err(IdentityError::TooLong(MAX_URI + 1))
        );
        assert!(Identity::new(&"d".repeat(MAX_TRUST_DOMAIN), "ns", "sa").is_ok());
        assert!(Identity::new(&"d".repeat(MAX_TRUST_DOMAIN + 1), "ns", "sa").is_err());
    }

    #[test]
    fn a_part_cannot_bring_segments_of_its_own() {
        assert!(Identity::new("td", "a/sa/b", "c").is_err());
        assert!(Identity::new("td/ns/a", "b", "c").is_err());
    }

    #[test]
    fn an_error_quotes_a_bounded_part_of_its_input() {
        let error = Identity::parse(&"é".repeat(1000)).unwrap_err();
        assert!(error.to_string().len() < 500);
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_reproduced_exactly(uri in prop_oneof![
            any::<String>(),
            "spiffe://[a-z./%?#:@-]{0,30}",
            "(spiffe://)?[a-zA-Z.]{0,4}/(ns|sa|)/[a-z.%*]{0,4}/(sa|ns|)/[a-zA-Z.\0é/?#-]{0,4}(/[a-z]{0,2})?",
        ]) {
            if let Ok(identity) = Identity::parse(&uri) {
                prop_assert_eq!(identity.to_string(), uri);
                let again = Identity::new(identity.trust_domain(), identity.namespace(), identity.service_account());
                prop_assert_eq!(again, Ok(identity));
            }
        }

        #[test]
        fn valid_parts_come_back(td in "[a-z0-9_-][a-z0-9._-]{0,20}", ns in "[a-z0-9-]{1,20}", sa in "[A-Za-z0-9-]{1,20}") {
            let identity = Identity::parse(&format!("spiffe://{td}/ns/{ns}/sa/{sa}")).unwrap();
            prop_assert_eq!(identity.trust_domain(), td);
            prop_assert_eq!(identity.namespace(), ns);
            prop_assert_eq!(identity.service_account(), sa);
        }
    }
}
