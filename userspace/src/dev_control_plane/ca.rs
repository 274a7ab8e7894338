//! The certificate authority's service: certificates of the development CA for requests that prove possession of their key. Unlike
//! istiod's it gives any identity of its trust domain to whoever is admitted. Served by `dev_control_plane::run`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost_types::value::Kind;
use rustls::pki_types::CertificateDer;
use tonic::{Request, Response, Status};

use super::gate::Gate;
use crate::identity::DevCa;
use crate::identity::dev_ca::{DevCaError, SigningRequest};
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
    gate: Gate,
}

impl Authority {
    /// Signs with `ca`.
    pub fn new(ca: Arc<DevCa>, gate: Gate) -> Self {
        Self { ca, gate }
    }

    fn certificate(&self, request: &IstioCertificateRequest) -> Result<Vec<String>, Status> {
        let invalid = |error: &dyn std::fmt::Display| Status::invalid_argument(error.to_string());
        if request.csr.len() > MOST_REQUEST_BYTES {
            let reason = format!(
                "a certificate signing request of {} bytes; {MOST_REQUEST_BYTES} are allowed",
                request.csr.len()
            );
            return Err(invalid(&reason));
        }
        let signing = SigningRequest::from_pem(&request.csr).map_err(|error| invalid(&error))?;
        let impersonated = impersonated(request)?;
        if *signing.identity() != impersonated {
            return Err(invalid(&format!(
                "the certificate signing request asks for {}, {IMPERSONATED} for {impersonated}; they must be the same",
                signing.identity()
            )));
        }
        let validity = self.ca.validity_from(SystemTime::now(), lifetime(request));
        let leaf =
            validity.and_then(|validity| self.ca.sign_request(&signing, &impersonated, validity));
        let leaf = leaf.map_err(|error| refusal(&error))?;
        let roots = self.ca.roots().certificates();
        Ok(std::iter::once(&leaf)
            .chain(roots.iter())
            .map(pem)
            .collect())
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Authority {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.gate.admit(request.metadata()).await?;
        let outcome = self.certificate(request.get_ref());
        match &outcome {
            Ok(_) => tracing::debug!("a certificate was issued"),
            Err(status) => tracing::warn!(reason = status.message(), "a certificate was refused"),
        }
        let cert_chain = outcome?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
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
