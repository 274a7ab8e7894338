//! A workload's certificate with its private key, and the roots it was issued under.
//!
//! Invariant: a `WorkloadCertificate` carries exactly one SPIFFE id and the key of its leaf. Made by issuers, read by `proxy::tls`.

use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::certificate::X509Certificate;

use super::crl::RevocationLists;
use super::spiffe::{self, SpiffeError};
use crate::policy::Identity;

/// Cryptography of the mesh: TLS 1.3 suites only, post-quantum hybrid key exchange preferred.
pub static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![
            aws_lc_rs::kx_group::X25519MLKEM768,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP256R1,
        ],
        ..aws_lc_rs::default_provider()
    })
});

/// What is wrong with a certificate, key or root that an issuer or a file gave us.
#[derive(Debug, thiserror::Error)]
pub enum MalformedCertificate {
    #[error("there is no certificate; the issuer must return the leaf first")]
    Empty,
    #[error(transparent)]
    Names(#[from] SpiffeError),
    #[error("the private key cannot be used with the certificate: {0}")]
    Key(rustls::Error),
    #[error("root certificate {position} cannot be used as a trust anchor: {error}")]
    Root {
        position: usize,
        error: rustls::Error,
    },
    #[error("there are no root certificates; peers could not be verified")]
    NoRoots,
    #[error("the certificate ends before it begins")]
    Validity,
}

/// From when until when a certificate holds, by the wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Validity {
    pub(crate) fn of(certificate: &X509Certificate<'_>) -> Result<Self, MalformedCertificate> {
        let validity = certificate.validity();
        let parsed = at(validity.not_before.timestamp()).zip(at(validity.not_after.timestamp()));
        match parsed {
            Some((not_before, not_after)) if not_before <= not_after => Ok(Self {
                not_before,
                not_after,
            }),
            _ => Err(MalformedCertificate::Validity),
        }
    }

    pub fn expired(&self, now: SystemTime) -> bool {
        now >= self.not_after
    }

    /// Past half of its life, or outside of it: time for a new one.
    pub fn renewal_due(&self, now: SystemTime) -> bool {
        match now.duration_since(self.not_before) {
            Ok(age) => age >= self.lifetime() / 2,
            // The clock was set back: peers with the same clock would refuse it.
            Err(_) => true,
        }
    }

    fn lifetime(&self) -> Duration {
        self.not_after
            .duration_since(self.not_before)
            .unwrap_or_default()
    }
}

pub(super) fn at(unix_seconds: i64) -> Option<SystemTime> {
    let distance = Duration::from_secs(unix_seconds.unsigned_abs());
    if unix_seconds < 0 {
        UNIX_EPOCH.checked_sub(distance)
    } else {
        UNIX_EPOCH.checked_add(distance)
    }
}

/// The trust anchors that peers' certificates must lead to. Clones are the same: whoever holds one sees the issuer's latest.
#[derive(Debug, Clone)]
pub struct Roots {
    anchors: Arc<ArcSwap<Anchors>>,
}

#[derive(Debug)]
struct Anchors {
    store: Arc<RootCertStore>,
    certificates: Arc<[CertificateDer<'static>]>,
}

impl Anchors {
    fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, MalformedCertificate> {
        if certificates.is_empty() {
            return Err(MalformedCertificate::NoRoots);
        }
        let mut store = RootCertStore::empty();
        for (position, certificate) in certificates.iter().enumerate() {
            store
                .add(certificate.clone())
                .map_err(|error| MalformedCertificate::Root { position, error })?;
        }
        Ok(Self {
            store: Arc::new(store),
            certificates: certificates.into(),
        })
    }
}

impl Roots {
    pub fn new(certificates: Vec<CertificateDer<'static>>) -> Result<Self, MalformedCertificate> {
        Ok(Self {
            anchors: Arc::new(ArcSwap::from_pointee(Anchors::new(certificates)?)),
        })
    }

    /// None are known yet: nobody is trusted.
    pub fn unknown() -> Self {
        let nobody = Anchors {
            store: Arc::new(RootCertStore::empty()),
            certificates: Arc::default(),
        };
        Self {
            anchors: Arc::new(ArcSwap::from_pointee(nobody)),
        }
    }

    /// Trusts these from now on, and no others.
    ///
    /// # Errors
    /// There are none, or one cannot be used; then nothing changes.
    pub fn replace(
        &self,
        certificates: Vec<CertificateDer<'static>>,
    ) -> Result<(), MalformedCertificate> {
        self.anchors.store(Arc::new(Anchors::new(certificates)?));
        Ok(())
    }

    pub fn store(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.anchors.load().store)
    }

    pub fn certificates(&self) -> Arc<[CertificateDer<'static>]> {
        Arc::clone(&self.anchors.load().certificates)
    }
}

/// One identity's proof: chain (leaf first), private key, roots.
#[derive(Clone)]
pub struct WorkloadCertificate {
    identity: Identity,
    validity: Validity,
    key: Arc<CertifiedKey>,
    roots: Roots,
}

impl WorkloadCertificate {
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Roots,
    ) -> Result<Self, MalformedCertificate> {
        let leaf = chain.first().ok_or(MalformedCertificate::Empty)?;
        let parsed = spiffe::parse(leaf)?;
        let identity = spiffe::identity_in(&parsed)?;
        let validity = Validity::of(&parsed)?;
        let key =
            CertifiedKey::from_der(chain, key, &PROVIDER).map_err(MalformedCertificate::Key)?;
        Ok(Self {
            identity,
            validity,
            key: Arc::new(key),
            roots,
        })
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn validity(&self) -> Validity {
        self.validity
    }

    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    /// Whether it, or what it was issued under, is on one of these lists.
    pub fn is_revoked(&self, lists: &RevocationLists) -> bool {
        // The moment matters only to the chain, which held from the beginning.
        lists.revoke(self.chain(), &self.roots.store(), self.validity.not_before)
    }

    /// Leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// Chain and signing key as TLS wants them.
    pub(crate) fn certified_key(&self) -> &Arc<CertifiedKey> {
        &self.key
    }
}

impl fmt::Debug for WorkloadCertificate {
    // By hand, so that no derived field can ever print the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("validity", &self.validity)
            .finish_non_exhaustive()
    }
}
