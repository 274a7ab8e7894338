//! The certificate authority's service: certificates of the development CA for requests that prove possession of their key. Unlike
//! istiod's it gives any identity of its trust domain to whoever is admitted. Served by `dev_control_plane::run`.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use prost_types::value::Kind;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::behaviour::{Behaviour, CaFault};
use super::gate::{self, Gate};
use crate::identity::dev_ca::{DevCaError, SigningRequest};
use crate::identity::{DevCa, Validity};
use crate::policy::Identity;
use crate::wire::istio::v1::auth::istio_certificate_service_server::IstioCertificateService;
use crate::wire::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};

const IMPERSONATED: &str = "ImpersonatedIdentity";
/// For who asks for no lifetime in particular.
const USUAL_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Istiod's own limit.
const LONGEST_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
/// A request takes some 300 bytes.
const MOST_REQUEST_BYTES: usize = 16 * 1024;

/// The service.
#[derive(Debug)]
pub struct Authority {
    ca: Arc<DevCa>,
    /// Takes the other's place when it is told to.
    next: OnceLock<Arc<DevCa>>,
    /// Signs in its place when it is told to.
    intermediate: OnceLock<Arc<DevCa>>,
    gate: Gate,
    behaviour: watch::Receiver<Arc<Behaviour>>,
}

/// What is to be signed and handed out.
struct Grant {
    ca: Arc<DevCa>,
    identity: Identity,
    validity: Validity,
    roots: Vec<CertificateDer<'static>>,
}

impl Authority {
    /// Signs with `ca`.
    pub fn new(ca: Arc<DevCa>, gate: Gate, behaviour: watch::Receiver<Arc<Behaviour>>) -> Self {
        Self {
            ca,
            next: OnceLock::new(),
            intermediate: OnceLock::new(),
            gate,
            behaviour,
        }
    }

    /// The chain for a request, leaf first. What its headers show is for the log.
    fn chain(
        &self,
        request: &IstioCertificateRequest,
        faults: &[CaFault],
        headers: &str,
    ) -> Result<Vec<String>, Status> {
        if request.csr.len() > MOST_REQUEST_BYTES {
            return Err(Status::invalid_argument(format!(
                "a certificate signing request of {} bytes; {MOST_REQUEST_BYTES} are allowed",
                request.csr.len()
            )));
        }
        let signing = SigningRequest::from_pem(&request.csr)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let identity = impersonated(request)?;
        if *signing.identity() != identity {
            return Err(Status::invalid_argument(format!(
                "the certificate signing request asks for {}, {IMPERSONATED} for {identity}; they must be the same",
                signing.identity()
            )));
        }
        let validity = self.ca.validity_from(SystemTime::now(), lifetime(request));
        let mut grant = Grant {
            ca: Arc::clone(&self.ca),
            identity,
            validity: validity.map_err(|error| refusal(&error))?,
            roots: self.ca.roots().certificates().to_vec(),
        };
        for fault in faults {
            grant.distort(fault, self)?;
        }
        let chain = grant.carry_out(&signing).map_err(|error| refusal(&error))?;
        let by_next = self
            .next
            .get()
            .is_some_and(|next| Arc::ptr_eq(next, &grant.ca));
        let lifetime = lifetime(request);
        tracing::debug!(identity = %grant.identity, by_next, ?lifetime, headers, "a certificate was issued");
        Ok(chain)
    }

    fn next(&self) -> Result<&Arc<DevCa>, Status> {
        if let Some(next) = self.next.get() {
            return Ok(next);
        }
        let new = stranger(&self.ca)?;
        Ok(self.next.get_or_init(|| new))
    }

    fn intermediate(&self) -> Result<&Arc<DevCa>, Status> {
        if let Some(intermediate) = self.intermediate.get() {
            return Ok(intermediate);
        }
        let new = self.ca.intermediate(SystemTime::now());
        let new = Arc::new(new.map_err(|error| refusal(&error))?);
        Ok(self.intermediate.get_or_init(|| new))
    }
}

impl Grant {
    fn distort(&mut self, fault: &CaFault, authority: &Authority) -> Result<(), Status> {
        let impossible = || Status::internal("cannot misbehave as told");
        match fault {
            CaFault::DelayMs(_) => {}
            CaFault::Refuse => return Err(Status::permission_denied("told to refuse")),
            CaFault::OtherIdentity => {
                self.identity = Identity::new(self.ca.trust_domain(), "somewhere", "else")
                    .map_err(|_| impossible())?;
            }
            CaFault::Expired => {
                let ago =
                    |hours: u64| SystemTime::now().checked_sub(Duration::from_secs(hours * 3600));
                let (not_before, not_after) = ago(2).zip(ago(1)).ok_or_else(impossible)?;
                self.validity = Validity {
                    not_before,
                    not_after,
                };
            }
            CaFault::OtherRoot => {
                let other = stranger(&self.ca)?;
                self.be_of(&other);
            }
            CaFault::LeafOnly => self.roots.clear(),
            CaFault::UnrelatedRoot => {
                self.roots = stranger(&self.ca)?.roots().certificates().to_vec();
            }
            CaFault::BothRoots => {
                let next = authority.next()?.roots().certificates();
                self.roots.extend(next.iter().cloned());
            }
            CaFault::NextRoot(accounts) => {
                let account = self.identity.service_account();
                if accounts.is_empty() || accounts.iter().any(|one| one == account) {
                    self.be_of(authority.next()?);
                }
            }
            CaFault::Intermediate => self.be_of(authority.intermediate()?),
        }
        Ok(())
    }

    fn be_of(&mut self, ca: &Arc<DevCa>) {
        self.ca = Arc::clone(ca);
        self.roots = ca.roots().certificates().to_vec();
    }

    fn carry_out(&self, signing: &SigningRequest) -> Result<Vec<String>, DevCaError> {
        let leaf = self
            .ca
            .sign_request(signing, &self.identity, self.validity)?;
        let above = self.ca.intermediates().iter().chain(&self.roots);
        Ok(std::iter::once(&leaf).chain(above).map(pem).collect())
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Authority {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.gate.admit(request.metadata()).await?;
        let behaviour = Arc::clone(&self.behaviour.borrow());
        if let Some(delay) = behaviour.ca_delay() {
            tokio::time::sleep(delay).await;
        }
        let headers = gate::shown(request.metadata());
        match self.chain(request.get_ref(), &behaviour.ca, &headers) {
            Ok(cert_chain) => Ok(Response::new(IstioCertificateResponse { cert_chain })),
            Err(status) => {
                tracing::warn!(reason = status.message(), "a certificate was refused");
                Err(status)
            }
        }
    }
}

/// A CA of the same trust domain that nobody knows.
fn stranger(ca: &DevCa) -> Result<Arc<DevCa>, Status> {
    let other = DevCa::in_memory(ca.trust_domain(), SystemTime::now());
    Ok(Arc::new(other.map_err(|error| refusal(&error))?))
}

/// A certificate in PEM.
pub fn pem(certificate: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new("CERTIFICATE", certificate.as_ref()))
}

fn impersonated(request: &IstioCertificateRequest) -> Result<Identity, Status> {
    let fields = request.metadata.as_ref().map(|metadata| &metadata.fields);
    let value = fields.and_then(|fields| fields.get(IMPERSONATED)?.kind.as_ref());
    let Some(Kind::StringValue(uri)) = value else {
        return Err(Status::invalid_argument(format!(
            "name the identity in the metadata, as the text {IMPERSONATED}"
        )));
    };
    Identity::parse(uri)
        .map_err(|error| Status::invalid_argument(format!("{IMPERSONATED}: {error}")))
}

fn lifetime(request: &IstioCertificateRequest) -> Duration {
    match u64::try_from(request.validity_duration) {
        Ok(seconds @ 1..) => Duration::from_secs(seconds).min(LONGEST_LIFETIME),
        _ => USUAL_LIFETIME,
    }
}

fn refusal(error: &DevCaError) -> Status {
    match error {
        DevCaError::ForeignIdentity { .. } => Status::permission_denied(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}
