//! rustls configurations, one per handshake, from the certificate that is current at that moment.
//!
//! Building one costs microseconds against the handshake's hundreds, and means that a renewed certificate needs no invalidation.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};

use super::verify::{Chain, ClientVerifier, ServerVerifier};
use super::{PeerChecks, TestKnobs};
use crate::identity::WorkloadCertificate;
use crate::identity::certificate::PROVIDER;
use crate::policy::Identity;

pub(super) const ALPN_HTTP2: &[u8] = b"h2";

/// Why no configuration could be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the own certificate of {0} has expired; it is not presented")]
    Expired(Identity),
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// The identities that a client accepts from a server. Order and repetition do not matter; none accepts nobody.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ExpectedServer(Arc<[Identity]>);

impl ExpectedServer {
    pub fn one(identity: Identity) -> Self {
        Self(Arc::new([identity]))
    }

    pub fn any_of(mut identities: Vec<Identity>) -> Self {
        identities.sort_unstable_by_key(Identity::to_string);
        identities.dedup();
        Self(identities.into())
    }

    pub fn contains(&self, identity: &Identity) -> bool {
        self.0.contains(identity)
    }

    pub fn identities(&self) -> &[Identity] {
        &self.0
    }
}

impl fmt::Display for ExpectedServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, identity) in self.0.iter().enumerate() {
            let separator = if position == 0 { "" } else { " or " };
            write!(f, "{separator}{identity}")?;
        }
        if self.0.is_empty() {
            f.write_str("nobody")
        } else {
            Ok(())
        }
    }
}

/// For a server that is `certificate`'s pod: a client must prove an identity of the same trust domain.
pub fn server_config(
    certificate: &Arc<WorkloadCertificate>,
    checks: &PeerChecks,
) -> Result<Arc<ServerConfig>, ConfigError> {
    let own = OwnCertificate::new(certificate, checks.knobs)?;
    let verifier = ClientVerifier {
        chain: Chain {
            roots: certificate.roots().store(),
            checks: checks.clone(),
        },
        trust_domain: certificate.identity().trust_domain().to_owned(),
    };
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(own));
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    // A resumed session would keep an identity that policy or the roots no longer admit.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

/// For a client that is `certificate`'s pod: the server must prove to be one of `expected`.
pub fn client_config(
    certificate: &Arc<WorkloadCertificate>,
    expected: &ExpectedServer,
    checks: &PeerChecks,
) -> Result<Arc<ClientConfig>, ConfigError> {
    let own = OwnCertificate::new(certificate, checks.knobs)?;
    let verifier = ServerVerifier {
        chain: Chain {
            roots: certificate.roots().store(),
            checks: checks.clone(),
        },
        expected: expected.clone(),
    };
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(own));
    config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    // A server name would tell an observer nothing but the address it sees anyway, and peers expect none.
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// Presents one certificate while it has not expired.
#[derive(Debug)]
struct OwnCertificate {
    certificate: Arc<WorkloadCertificate>,
    knobs: TestKnobs,
}

impl OwnCertificate {
    fn new(certificate: &Arc<WorkloadCertificate>, knobs: TestKnobs) -> Result<Self, ConfigError> {
        let own = Self {
            certificate: Arc::clone(certificate),
            knobs,
        };
        match own.present() {
            Some(_) => Ok(own),
            None => Err(ConfigError::Expired(certificate.identity().clone())),
        }
    }

    /// Asked again in the handshake, which may come long after the configuration.
    fn present(&self) -> Option<Arc<CertifiedKey>> {
        let expired = self.certificate.validity().expired(SystemTime::now());
        let withheld = expired && self.knobs.expired_withheld();
        (!withheld).then(|| Arc::clone(self.certificate.certified_key()))
    }
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.present()
    }
}

impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.present()
    }

    fn has_certs(&self) -> bool {
        true
    }
}
