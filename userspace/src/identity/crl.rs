//! Certificate revocation lists (RFC 5280), and whether a chain of certificates is on them.
//!
//! Invariants: a set of lists is taken whole or not at all, and bounded; every certificate of a chain is looked at, each in the lists
//! that the key of its own issuer has signed. No list of an issuer says nothing about what it issued. A list that is past its next
//! update goes on to count: what it names is revoked for good, and only what was revoked since is not known. `file` reads them,
//! `proxy::tls` asks for peers, `Certificates` for the node's own.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};
use tokio::sync::watch;
use webpki::{
    Cert, CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList,
    RevocationCheckDepth, RevocationOptionsBuilder, UnknownStatusPolicy, VerifiedPath,
    anchor_from_trusted_cert,
};
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use super::certificate::PROVIDER;

mod file;
#[cfg(test)]
mod tests;

pub use file::{CrlFile, CrlFileError, CrlFileStatus};

/// The most lists in a set: some for each authority of a mesh, of which there are few.
const MOST_LISTS: usize = 1024;
/// The longest name of an issuer that is shown, in characters.
const MOST_SHOWN: usize = 200;

/// Why something is not a set of lists.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MalformedCrl {
    #[error("it is neither PEM nor DER: {0}")]
    NotPem(String),
    #[error("it holds no revocation list (`-----BEGIN X509 CRL-----`)")]
    NoList,
    #[error("it holds more than {MOST_LISTS} lists")]
    TooMany,
    #[error(
        "its list number {position} cannot be used: {reason}; a list must be complete and direct, of version 2, with a next update"
    )]
    List {
        /// From 1.
        position: usize,
        reason: String,
    },
}

/// Some lists. None say nothing.
#[derive(Default)]
pub struct RevocationLists {
    lists: Vec<List>,
}

struct List {
    signed: CertRevocationList<'static>,
    /// As a person reads it.
    issuer: String,
    next_update: Option<SystemTime>,
    certificates: usize,
}

impl RevocationLists {
    /// Reads PEM with any number of lists, among anything else, or one list as DER. Nothing but space is no list.
    ///
    /// # Errors
    /// It is something else, or one of the lists cannot be used.
    pub fn parse(content: &[u8]) -> Result<Self, MalformedCrl> {
        if content.iter().all(u8::is_ascii_whitespace) {
            return Ok(Self::default());
        }
        let mut lists = Vec::new();
        // The length of a list takes more than one byte, so that this is not the text `0…`.
        if matches!(content, [0x30, 0x80..=0xff, ..]) {
            lists.push(List::parse(content, 1)?);
            return Ok(Self { lists });
        }
        for section in CertificateRevocationListDer::pem_slice_iter(content) {
            let section = section.map_err(|error| MalformedCrl::NotPem(error.to_string()))?;
            if lists.len() == MOST_LISTS {
                return Err(MalformedCrl::TooMany);
            }
            lists.push(List::parse(&section, lists.len() + 1)?);
        }
        if lists.is_empty() {
            return Err(MalformedCrl::NoList);
        }
        Ok(Self { lists })
    }

    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// How many lists there are.
    pub fn count(&self) -> usize {
        self.lists.len()
    }

    /// How many certificates they name.
    pub fn certificates(&self) -> usize {
        self.lists.iter().map(|list| list.certificates).sum()
    }

    /// The issuers whose list should have been replaced by now.
    pub fn overdue(&self, now: SystemTime) -> impl Iterator<Item = &str> {
        self.lists
            .iter()
            .filter(move |list| list.next_update.is_some_and(|next| next <= now))
            .map(|list| list.issuer.as_str())
    }

    /// Verifies a chain to one of these roots at `now`, and that nothing of it is on a list.
    ///
    /// # Errors
    /// webpki's; `CertRevoked` if that is all that is wrong.
    pub fn verify(
        &self,
        leaf: &EndEntityCert<'_>,
        intermediates: &[CertificateDer<'_>],
        roots: &RootCertStore,
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), webpki::Error> {
        let unrevoked = |path: &VerifiedPath<'_>| self.judge(path, now, usage);
        leaf.verify_for_usage(
            PROVIDER.signature_verification_algorithms.all,
            &roots.roots,
            intermediates,
            now,
            usage,
            None,
            Some(&unrevoked),
        )
        .map(drop)
    }

    /// Whether a chain, which led to one of these roots at `then`, is revoked by now.
    pub fn revoke(
        &self,
        chain: &[CertificateDer<'_>],
        roots: &RootCertStore,
        then: SystemTime,
    ) -> bool {
        let Some((leaf, intermediates)) = chain.split_first() else {
            return false;
        };
        let Ok(leaf) = EndEntityCert::try_from(leaf) else {
            return false;
        };
        if !self.mention_any(&leaf, intermediates) {
            return false;
        }
        let then = then.duration_since(UNIX_EPOCH).unwrap_or_default();
        let then = UnixTime::since_unix_epoch(then);
        // Of several ways to a root the worst error is told, which need not be the revocation: what matters is that it held before.
        let none = Self::default();
        [KeyUsage::client_auth(), KeyUsage::server_auth()]
            .into_iter()
            .any(|usage| {
                let holds = |lists: &Self| lists.verify(&leaf, intermediates, roots, then, usage);
                holds(&none).is_ok() && holds(self).is_err()
            })
    }

    /// A quick look that may say yes too often, since names and numbers are compared, not signatures.
    fn mention_any(&self, leaf: &EndEntityCert<'_>, others: &[CertificateDer<'_>]) -> bool {
        self.mentioning(leaf).next().is_some()
            || others.iter().any(|other| {
                EndEntityCert::try_from(other)
                    .is_ok_and(|other| self.mentioning(&other).next().is_some())
            })
    }

    fn mentioning(&self, certificate: &Cert<'_>) -> impl Iterator<Item = &List> {
        let (issuer, serial) = (certificate.issuer(), certificate.serial());
        self.lists.iter().filter(move |list| {
            list.signed.issuer() == issuer
                // What cannot be looked up is left to the whole check.
                && !matches!(list.signed.find_serial(serial), Ok(None))
        })
    }

    fn judge(
        &self,
        path: &VerifiedPath<'_>,
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), webpki::Error> {
        let issuers: Vec<&Cert<'_>> = path.intermediate_certificates().collect();
        for position in 0..=issuers.len() {
            let (below, above) = issuers.split_at(position);
            let judged = below.last().copied().unwrap_or(path.end_entity());
            for list in self.mentioning(judged) {
                list.judge(path, below, above.first().copied(), now, usage)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for RevocationLists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevocationLists")
            .field("lists", &self.lists.len())
            .field("certificates", &self.certificates())
            .finish()
    }
}

impl List {
    fn parse(der: &[u8], position: usize) -> Result<Self, MalformedCrl> {
        let unusable = |reason: String| MalformedCrl::List { position, reason };
        let signed = OwnedCertRevocationList::from_der(der)
            .map_err(|error| unusable(format!("{error:?}")))?;
        // webpki keeps to itself whose list it is, for people, and until when.
        let (_, parsed) = CertificateRevocationList::from_der(der)
            .map_err(|error| unusable(error.to_string()))?;
        let issuer = parsed.issuer().to_string();
        let issuer = issuer.chars().map(|c| if c.is_control() { ' ' } else { c });
        let next_update = parsed.next_update().map(|time| time.timestamp());
        Ok(Self {
            signed: signed.into(),
            issuer: issuer.take(MOST_SHOWN).collect(),
            next_update: next_update.and_then(super::certificate::at),
            certificates: parsed.iter_revoked_certificates().count(),
        })
    }

    /// Whether this list revokes the last certificate of `below` (the leaf if there is none), which `issuer` has issued, or the
    /// path's root.
    fn judge(
        &self,
        path: &VerifiedPath<'_>,
        below: &[&Cert<'_>],
        issuer: Option<&Cert<'_>>,
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), webpki::Error> {
        // webpki takes the first list with an issuer's name for that issuer's. Names are shared: by the root before and the root
        // after a rotation, by a root and what is below it. So it is asked about one list and one issuer at a time, which is made
        // the root for that: it looks at what a root has issued first.
        let issuer = issuer.map(Cert::der);
        let anchor: TrustAnchor<'_> = match &issuer {
            Some(issuer) => anchor_from_trusted_cert(issuer)?,
            None => path.anchor().clone(),
        };
        let intermediates: Vec<_> = below.iter().map(|certificate| certificate.der()).collect();
        let signed = [&self.signed];
        let options = RevocationOptionsBuilder::new(&signed)
            .map_err(|_| webpki::Error::UnknownRevocationStatus)?
            .with_depth(RevocationCheckDepth::Chain)
            .with_status_policy(UnknownStatusPolicy::Allow)
            .with_expiration_policy(ExpirationPolicy::Ignore)
            .build();
        let judged = path.end_entity().verify_for_usage(
            PROVIDER.signature_verification_algorithms.all,
            std::slice::from_ref(&anchor),
            &intermediates,
            now,
            usage,
            Some(options),
            None,
        );
        match judged {
            // Somebody else's list, with the same name; or somebody else's certificate, which webpki tried before the right one.
            Ok(_)
            | Err(
                webpki::Error::InvalidCrlSignatureForPublicKey
                | webpki::Error::InvalidSignatureForPublicKey
                | webpki::Error::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_),
            ) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The lists that are in force. Clones are the same: whoever holds one sees the latest. The default is that there are none, ever.
#[derive(Debug, Clone, Default)]
pub struct Revocations(Option<Arc<InForce>>);

#[derive(Debug, Default)]
struct InForce {
    lists: watch::Sender<Arc<RevocationLists>>,
    counts: Mutex<RevocationCounts>,
}

/// What lists have done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RevocationCounts {
    /// Handshakes with a peer that is on a list.
    pub refused: u64,
    /// Tunnels that were open when their peer came onto a list.
    pub closed: u64,
    /// Times that lists came into force.
    pub accepted: u64,
    /// Times that a changed file was of no use.
    pub rejected: u64,
}

impl Revocations {
    /// Others may take the place of these.
    pub fn new(lists: RevocationLists) -> Self {
        let revocations = InForce::default();
        revocations.lists.send_replace(Arc::new(lists));
        Self(Some(Arc::new(revocations)))
    }

    pub fn current(&self) -> Arc<RevocationLists> {
        let in_force = self.0.as_ref();
        in_force.map_or_else(Arc::default, |in_force| {
            Arc::clone(&in_force.lists.borrow())
        })
    }

    /// These are in force from now on, and no others.
    pub fn replace(&self, lists: RevocationLists) {
        if let Some(in_force) = &self.0 {
            in_force.lists.send_replace(Arc::new(lists));
        }
    }

    /// Tells when others come into force, if ever they may.
    pub fn subscribe(&self) -> Option<watch::Receiver<Arc<RevocationLists>>> {
        self.0.as_ref().map(|in_force| in_force.lists.subscribe())
    }

    pub fn counts(&self) -> RevocationCounts {
        let in_force = self.0.as_ref();
        in_force.map_or_else(RevocationCounts::default, |in_force| *in_force.counts())
    }

    pub(crate) fn count(&self, change: impl FnOnce(&mut RevocationCounts)) {
        if let Some(in_force) = &self.0 {
            change(&mut in_force.counts());
        }
    }
}

impl InForce {
    fn counts(&self) -> MutexGuard<'_, RevocationCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
