//! Certificates from Istio's certificate authority, over gRPC.
//!
//! Invariants: a private key never leaves this process; an answer counts only if its chain leads from the key's leaf to the roots that
//! it brings. A root goes on being trusted, once another has taken its place, as long as certificates under it may be in use.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use webpki::{EndEntityCert, KeyUsage};

use super::certificate::{PROVIDER, Roots, WorkloadCertificate};
use super::issuer::{IssueError, Issuer, Issuing};
use super::knobs::TestKnobs;
use super::spiffe;
use crate::control_channel::{ChannelError, ControlChannel};
use crate::policy::Identity;
use crate::wire::istio::v1::auth::IstioCertificateRequest;
use crate::wire::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;

#[cfg(test)]
mod tests;

/// Certificates in an answer, and bytes of it: more than any real chain with its roots has.
const MOST_CERTIFICATES: usize = 64;
const MOST_BYTES: usize = 1 << 20;
/// Less than what a request may take in all (`RenewalSettings::request_deadline`).
const ANSWER: Duration = Duration::from_secs(9);

/// The authority.
pub struct CaClient {
    channel: ControlChannel,
    ttl: Duration,
    knobs: TestKnobs,
    /// Kept between requests, and given up when one fails.
    connection: Mutex<Option<Channel>>,
    trusted: std::sync::Mutex<Vec<Trusted>>,
    roots: Roots,
}

/// A root, and until when certificates under it may be in use.
struct Trusted {
    root: CertificateDer<'static>,
    until: SystemTime,
}

/// An answer taken apart.
struct Answer {
    /// Leaf first.
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
}

impl CaClient {
    /// Asks for certificates of this lifetime. Nothing is connected to yet.
    pub fn new(channel: ControlChannel, ttl: Duration, knobs: TestKnobs) -> Self {
        Self {
            channel,
            ttl,
            knobs,
            connection: Mutex::default(),
            trusted: std::sync::Mutex::default(),
            roots: Roots::unknown(),
        }
    }

    async fn ask(&self, identity: &Identity) -> Result<WorkloadCertificate, IssueError> {
        let (key, csr) = request_of(identity)?;
        let answer = self.exchange(identity, csr).await?;
        let unusable = |reason: String| IssueError::Unusable {
            identity: identity.clone(),
            reason,
        };
        let answer = Answer::read(&answer).map_err(unusable)?;
        answer.verify(SystemTime::now()).map_err(unusable)?;
        let Answer { chain, roots } = answer;
        let malformed = |error| IssueError::Malformed {
            identity: identity.clone(),
            error,
        };
        let certificate =
            WorkloadCertificate::new(chain, key, self.roots.clone()).map_err(malformed)?;
        // What is issued for somebody else, or too late, must not change whom we trust.
        if certificate.identity() == identity {
            self.trust(roots, certificate.validity().not_after, SystemTime::now())
                .map_err(malformed)?;
        }
        Ok(certificate)
    }

    async fn exchange(&self, identity: &Identity, csr: String) -> Result<Vec<String>, IssueError> {
        let unavailable = |error: ChannelError| IssueError::Unavailable {
            identity: identity.clone(),
            reason: error.to_string(),
        };
        let mut request = Request::new(IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(impersonating(identity)),
        });
        *request.metadata_mut() = self.channel.metadata().await.map_err(unavailable)?;
        let channel = self.connected().await.map_err(unavailable)?;
        let mut service =
            IstioCertificateServiceClient::new(channel).max_decoding_message_size(MOST_BYTES);
        let call = timeout(ANSWER, service.create_certificate(request));
        let status = match call.await {
            Ok(Ok(answer)) => return Ok(answer.into_inner().cert_chain),
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded(format!("no answer within {} s", ANSWER.as_secs())),
        };
        // The next request gets a connection of its own: this one may lead to somebody who never answers.
        *self.connection.lock().await = None;
        Err(said(identity, &status))
    }

    /// One connection serves all identities. Its roots are read when it is made.
    async fn connected(&self) -> Result<Channel, ChannelError> {
        let mut connection = self.connection.lock().await;
        if let Some(channel) = &*connection {
            return Ok(channel.clone());
        }
        let channel = self.channel.connect().await?;
        *connection = Some(channel.clone());
        Ok(channel)
    }

    /// Trusts these roots, and those before them as long as certificates under them may be in use.
    fn trust(
        &self,
        roots: Vec<CertificateDer<'static>>,
        until: SystemTime,
        now: SystemTime,
    ) -> Result<(), super::MalformedCertificate> {
        let mut trusted = self
            .trusted
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        trusted.retain(|one| one.until > now && self.knobs.roots_kept());
        for root in roots {
            match trusted.iter_mut().find(|one| one.root == root) {
                Some(known) => known.until = known.until.max(until),
                None => trusted.push(Trusted { root, until }),
            }
        }
        // However many it brings: the latest.
        trusted.sort_by_key(|one| std::cmp::Reverse(one.until));
        trusted.truncate(MOST_CERTIFICATES);
        let all: Vec<_> = trusted.iter().map(|one| one.root.clone()).collect();
        if *self.roots.certificates() == *all {
            return Ok(());
        }
        tracing::info!(
            roots = all.len(),
            "the roots that peers are trusted by have changed"
        );
        self.roots.replace(all)
    }
}

impl Issuer for CaClient {
    fn issue<'a>(&'a self, identity: &'a Identity, _now: SystemTime) -> Issuing<'a> {
        Box::pin(self.ask(identity))
    }

    fn roots(&self) -> Roots {
        self.roots.clone()
    }
}

/// A new key, and the request for a certificate of it as PEM.
fn request_of(identity: &Identity) -> Result<(PrivateKeyDer<'static>, String), IssueError> {
    let failed = |error: rcgen::Error| IssueError::Unusable {
        identity: identity.clone(),
        reason: format!("no request could be made: {error}"),
    };
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let uri = identity.to_string().try_into().map_err(failed)?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    let csr = params.serialize_request(&key).map_err(failed)?;
    let csr = csr.pem().map_err(failed)?;
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    Ok((PrivateKeyDer::Pkcs8(key), csr))
}

/// Whom the certificate is for: the agent asks for its pods.
fn impersonating(identity: &Identity) -> Struct {
    let value = Value {
        kind: Some(Kind::StringValue(identity.to_string())),
    };
    Struct {
        fields: [("ImpersonatedIdentity".to_owned(), value)].into(),
    }
}

fn said(identity: &Identity, status: &Status) -> IssueError {
    let reason: String = format!("{:?}: {}", status.code(), status.message())
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(512)
        .collect();
    let identity = identity.clone();
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated | Code::InvalidArgument => {
            IssueError::Refused { identity, reason }
        }
        _ => IssueError::Unavailable { identity, reason },
    }
}

impl Answer {
    /// The leaf comes first, the roots last; a root is who vouches for itself.
    fn read(entries: &[String]) -> Result<Self, String> {
        let mut chain = Vec::new();
        for entry in entries {
            for certificate in CertificateDer::pem_slice_iter(entry.as_bytes()) {
                chain.push(certificate.map_err(|error| format!("it holds no PEM: {error}"))?);
                if chain.len() > MOST_CERTIFICATES {
                    return Err(format!("it has more than {MOST_CERTIFICATES} certificates"));
                }
            }
        }
        let is_root = |certificate: &CertificateDer<'_>| {
            spiffe::parse(certificate).is_ok_and(|parsed| parsed.subject() == parsed.issuer())
        };
        let mut roots = Vec::new();
        while chain.len() > 1 && chain.last().is_some_and(is_root) {
            roots.extend(chain.pop());
        }
        roots.reverse();
        if chain.is_empty() {
            return Err("it has no certificate".to_owned());
        }
        if roots.is_empty() {
            return Err("it has no root: peers could not be verified".to_owned());
        }
        Ok(Self { chain, roots })
    }

    /// Whether peers that trust these roots would take the leaf, from both sides.
    fn verify(&self, now: SystemTime) -> Result<(), String> {
        let store = Roots::new(self.roots.clone()).map_err(|error| error.to_string())?;
        let (leaf, others) = self.chain.split_first().ok_or("it has no certificate")?;
        let leaf = EndEntityCert::try_from(leaf).map_err(|error| error.to_string())?;
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
            let algorithms = PROVIDER.signature_verification_algorithms.all;
            leaf.verify_for_usage(
                algorithms,
                &store.store().roots,
                others,
                UnixTime::since_unix_epoch(since),
                usage,
                None,
                None,
            )
            .map_err(|error| format!("its chain does not hold: {error}"))?;
        }
        Ok(())
    }
}
