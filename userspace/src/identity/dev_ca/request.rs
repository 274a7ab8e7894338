//! A request for a certificate (PKCS #10), as far as the development CA believes it: whoever made it holds the private key, the key
//! is of the one kind that workloads have, and it asks for one identity. Made from what a client sends, signed by `DevCa`.

use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY};
use x509_parser::prelude::FromDer;

use crate::policy::Identity;

#[cfg(test)]
mod tests;

/// The length of an uncompressed point of P-256.
const POINT_BYTES: usize = 65;

/// Why a request is not signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Not a request.
    #[error(
        "the certificate signing request cannot be read: {0}; send one PKCS #10 request in PEM"
    )]
    Malformed(String),
    /// Another kind of key.
    #[error("the key of the certificate signing request is not a P-256 key in uncompressed form")]
    Key,
    /// Not made by the owner of the key.
    #[error("the signature of the certificate signing request is not by its key")]
    Signature,
    /// Not one name.
    #[error(
        "the certificate signing request must ask for exactly one name, a URI, but asks for {0} names"
    )]
    Names(usize),
    /// Not an identity.
    #[error("the certificate signing request asks for {0:?}, which is no workload's SPIFFE id")]
    Identity(String),
}

/// A request whose signature was verified.
#[derive(Debug, Clone)]
pub struct SigningRequest {
    identity: Identity,
    key: RequestedKey,
}

/// The public key of a request.
#[derive(Debug, Clone)]
pub(super) struct RequestedKey(Vec<u8>);

impl SigningRequest {
    /// Reads a request in PEM.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn from_pem(pem: &str) -> Result<Self, RequestError> {
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| RequestError::Malformed(error.to_string()))?;
        let request = match X509CertificationRequest::from_der(&der) {
            Ok(([], request)) => request,
            Ok((rest, _)) => {
                let reason = format!("{} bytes follow it", rest.len());
                return Err(RequestError::Malformed(reason));
            }
            Err(error) => return Err(RequestError::Malformed(error.to_string())),
        };
        let info = &request.certification_request_info.subject_pki;
        let curve = info
            .algorithm
            .parameters
            .as_ref()
            .and_then(|curve| curve.as_oid().ok());
        let point = info.subject_public_key.data.as_ref();
        if info.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY
            || curve != Some(OID_EC_P256)
            || point.len() != POINT_BYTES
        {
            return Err(RequestError::Key);
        }
        request
            .verify_signature()
            .map_err(|_| RequestError::Signature)?;
        Ok(Self {
            identity: only_identity(&request)?,
            key: RequestedKey(point.to_vec()),
        })
    }

    /// Whom it asks for.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(super) fn key(&self) -> &RequestedKey {
        &self.key
    }
}

impl PublicKeyData for RequestedKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

fn only_identity(request: &X509CertificationRequest<'_>) -> Result<Identity, RequestError> {
    let names: Vec<_> = request
        .requested_extensions()
        .into_iter()
        .flatten()
        .filter_map(|extension| match extension {
            ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
            _ => None,
        })
        .flatten()
        .collect();
    match names.as_slice() {
        [GeneralName::URI(uri)] => Identity::parse(uri)
            .map_err(|_| RequestError::Identity(uri.chars().take(200).collect())),
        names => Err(RequestError::Names(names.len())),
    }
}
