//! Why a handshake failed, in terms of what the peer did.
//!
//! `PeerRejection` travels through rustls as a certificate error and is recovered from the `io::Error` that tokio-rustls returns.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, OtherError};

use crate::identity::spiffe::SpiffeError;
use crate::policy::Identity;

/// What is wrong with the certificate a peer presented.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRejection {
    #[error("it has expired")]
    Expired,
    #[error("it is not valid yet; compare the clocks of the nodes")]
    NotYetValid,
    #[error("it does not lead to a root of this mesh")]
    UnknownIssuer,
    #[error("it, or one of its chain, is revoked by a list of its issuer (CRL_PATH)")]
    Revoked,
    #[error("its chain does not verify: {0}")]
    Chain(String),
    #[error(transparent)]
    Identity(#[from] SpiffeError),
    #[error("it is of {peer}, but this mesh's trust domain is `{own}`")]
    TrustDomain { peer: Identity, own: String },
    #[error("it is of {peer}, expected was {expected}")]
    NotExpected { peer: Identity, expected: String },
}

/// Why there is no authenticated connection.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("the peer's certificate is refused: {0}")]
    Peer(PeerRejection),
    #[error("the peer presented no certificate")]
    NoCertificate,
    #[error("the peer refused the handshake with the alert {0:?}; its log says why")]
    Refused(AlertDescription),
    #[error("the peer does not speak HTTP/2 over this connection (ALPN `h2`)")]
    NoHttp2,
    #[error("the TLS handshake took longer than {0:?}")]
    Deadline(Duration),
    #[error("the peer broke the TLS protocol: {0}")]
    Protocol(rustls::Error),
    #[error("the connection failed during the TLS handshake: {0}")]
    Io(io::Error),
}

impl HandshakeError {
    /// What the peer did, recovered from an error of a TLS stream.
    pub fn from_io(error: io::Error) -> Self {
        match error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        {
            Some(tls) => Self::from_tls(tls),
            None => Self::Io(error),
        }
    }

    fn from_tls(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(error) => {
                Self::Peer(PeerRejection::from_certificate_error(error))
            }
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::AlertReceived(alert) => Self::Refused(*alert),
            rustls::Error::NoApplicationProtocol => Self::NoHttp2,
            other => Self::Protocol(other.clone()),
        }
    }
}

impl PeerRejection {
    pub(super) fn into_tls(self) -> rustls::Error {
        // These have alerts of their own, which tell the peer's operator most of what they need.
        let error = match self {
            Self::Expired => CertificateError::Expired,
            Self::NotYetValid => CertificateError::NotValidYet,
            Self::UnknownIssuer => CertificateError::UnknownIssuer,
            Self::Revoked => CertificateError::Revoked,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        };
        rustls::Error::InvalidCertificate(error)
    }

    pub(super) fn from_webpki(error: webpki::Error) -> Self {
        match error {
            webpki::Error::CertExpired { .. } => Self::Expired,
            webpki::Error::CertNotValidYet { .. } => Self::NotYetValid,
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
                Self::UnknownIssuer
            }
            webpki::Error::CertRevoked => Self::Revoked,
            other => Self::Chain(format!("{other:?}")),
        }
    }

    fn from_certificate_error(error: &CertificateError) -> Self {
        match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Self::NotYetValid
            }
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::Other(OtherError(inner)) => match inner.downcast_ref::<Self>() {
                Some(rejection) => rejection.clone(),
                None => Self::Chain(inner.to_string()),
            },
            other => Self::Chain(format!("{other:?}")),
        }
    }
}
