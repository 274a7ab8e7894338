//! The SPIFFE id of a certificate: exactly one URI name, and that one a workload's id; or, for who asks for it, the first of several.
//!
//! Names of other kinds (DNS, IP, mail) are not looked at. Called for certificates of peers and for those an issuer returns.

use rustls::pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::policy::Identity;

/// Longest URI name that is looked at; SPIFFE allows no longer id.
const MAX_ID_BYTES: usize = 2048;

/// Why a certificate proves no workload's identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    #[error("the certificate is not valid DER: {0}")]
    NotX509(String),
    #[error("the certificate's subject alternative names cannot be read: {0}")]
    MalformedNames(String),
    #[error("the certificate must carry exactly one URI name, but carries {0}")]
    UriCount(usize),
    #[error("none of the certificate's {0} URI names is a workload's SPIFFE id")]
    NoIdentity(usize),
    #[error("the certificate's URI name has {0} bytes, a SPIFFE id at most {MAX_ID_BYTES}")]
    TooLong(usize),
    #[error("the certificate's URI name `{uri}` is not a workload's SPIFFE id: {reason}")]
    NotAnIdentity { uri: String, reason: String },
}

/// The identity that `certificate` states. Says nothing about whether anyone vouches for it.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, SpiffeError> {
    identity_in(&parse(certificate)?)
}

/// The first of the identities that `certificate` states, whatever else it is named: as ztunnel has it.
pub fn first_identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, SpiffeError> {
    let certificate = parse(certificate)?;
    let uris = uris(&certificate)?;
    let short = uris.iter().filter(|uri| uri.len() <= MAX_ID_BYTES);
    let mut identities = short.filter_map(|uri| Identity::parse(uri).ok());
    identities.next().ok_or(SpiffeError::NoIdentity(uris.len()))
}

/// Reads one DER certificate and nothing after it.
pub(crate) fn parse<'a>(
    certificate: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, SpiffeError> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok((rest, _)) => Err(SpiffeError::NotX509(format!(
            "{} bytes follow it",
            rest.len()
        ))),
        Err(error) => Err(SpiffeError::NotX509(error.to_string())),
    }
}

pub(crate) fn identity_in(certificate: &X509Certificate<'_>) -> Result<Identity, SpiffeError> {
    let uri = only_uri(certificate)?;
    if uri.len() > MAX_ID_BYTES {
        return Err(SpiffeError::TooLong(uri.len()));
    }
    Identity::parse(uri).map_err(|error| SpiffeError::NotAnIdentity {
        uri: uri.escape_debug().to_string(),
        reason: error.to_string(),
    })
}

/// The one URI name of a certificate, whatever it says.
pub(crate) fn only_uri<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, SpiffeError> {
    match uris(certificate)?.as_slice() {
        [uri] => Ok(uri),
        uris => Err(SpiffeError::UriCount(uris.len())),
    }
}

fn uris<'a>(certificate: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, SpiffeError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| SpiffeError::MalformedNames(error.to_string()))?;
    let names = names
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    if names
        .iter()
        .any(|name| matches!(name, GeneralName::Invalid(..)))
    {
        return Err(SpiffeError::MalformedNames(
            "a name cannot be decoded".into(),
        ));
    }
    let uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    Ok(uris.collect())
}
