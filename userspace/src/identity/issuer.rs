//! The seam behind which certificates come from: the development CA, or a certificate authority over the network.
//!
//! Called by `Certificates` only. An issuer may take long and may fail; the caller sets deadlines and tries again.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::certificate::{MalformedCertificate, Roots, WorkloadCertificate};
use super::dev_ca::{DevCa, DevCaError};
use crate::policy::Identity;

/// Why no certificate was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error(transparent)]
    DevCa(#[from] DevCaError),
    #[error("the issuer's answer for {identity} is unusable: {error}")]
    Malformed {
        identity: Identity,
        error: MalformedCertificate,
    },
    #[error("the issuer's answer for {identity} is unusable: {reason}")]
    Unusable { identity: Identity, reason: String },
    #[error("the issuer answered the request for {asked} with a certificate for {got}")]
    WrongIdentity { asked: Identity, got: Identity },
    #[error(
        "the issuer answered the request for {identity} with a certificate that has already expired; compare the clocks"
    )]
    Expired { identity: Identity },
    #[error(
        "the issuer answered the request for {identity} with a certificate that is revoked by a list in CRL_PATH; look for its authority's own certificate there"
    )]
    Revoked { identity: Identity },
    #[error("the issuer did not answer the request for {identity} within {deadline:?}")]
    Deadline {
        identity: Identity,
        deadline: Duration,
    },
    #[error("the issuer cannot be reached for {identity}: {reason}")]
    Unavailable { identity: Identity, reason: String },
    #[error("the issuer refuses {identity}: {reason}")]
    Refused { identity: Identity, reason: String },
}

/// The future of one request for a certificate.
pub type Issuing<'a> =
    Pin<Box<dyn Future<Output = Result<WorkloadCertificate, IssueError>> + Send + 'a>>;

/// A source of certificates.
pub trait Issuer: Send + Sync + 'static {
    /// Asks for one certificate with a fresh key. Must be safe to drop at any point.
    fn issue<'a>(&'a self, identity: &'a Identity, now: SystemTime) -> Issuing<'a>;

    /// The roots as they are known now.
    fn roots(&self) -> Roots;
}

/// The development CA as an issuer of certificates with one fixed lifetime.
pub struct DevCaIssuer {
    ca: Arc<DevCa>,
    ttl: Duration,
}

impl DevCaIssuer {
    pub fn new(ca: Arc<DevCa>, ttl: Duration) -> Self {
        Self { ca, ttl }
    }
}

impl Issuer for DevCaIssuer {
    fn issue<'a>(&'a self, identity: &'a Identity, now: SystemTime) -> Issuing<'a> {
        // A P-256 key and signature take well under a millisecond: no need for a blocking thread.
        Box::pin(async move { Ok(self.ca.issue(identity, self.ttl, now)?) })
    }

    fn roots(&self) -> Roots {
        self.ca.roots().clone()
    }
}
