//! A certificate authority in one directory, for development and tests: unsafe for production, its key lies on the node's disk.
//!
//! Invariants: the directory holds at most one root, whole or not at all, readable by its owner only; all agents that open the directory
//! share it. Key and certificate are one file, so that one rename publishes both.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{fmt, io};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use self::store::Store;
use super::certificate::{MalformedCertificate, Roots, Validity, WorkloadCertificate};
use super::spiffe;
use crate::policy::Identity;

mod request;
mod store;
#[cfg(test)]
mod tests;

pub use request::{RequestError, SigningRequest};

const ROOT_NAME: &str = "Culvert development CA";
const INTERMEDIATE_NAME: &str = "Culvert development intermediate CA";
const ROOT_LIFETIME: Duration = Duration::from_secs(3652 * 24 * 3600);
/// Clocks of two nodes differ a little: a new certificate already holds this long ago.
const BACK_DATED: Duration = Duration::from_secs(60);
const SERVER_USES: &[ExtendedKeyUsagePurpose] = &[ExtendedKeyUsagePurpose::ServerAuth];
/// A workload is the server of some connections and the client of others.
const WORKLOAD_USES: &[ExtendedKeyUsagePurpose] = &[
    ExtendedKeyUsagePurpose::ServerAuth,
    ExtendedKeyUsagePurpose::ClientAuth,
];

/// Why the development CA cannot be used or issued nothing.
#[derive(Debug, thiserror::Error)]
pub enum DevCaError {
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        error: io::Error,
    },
    #[error("{} is open to others (mode {mode:03o}); run: chmod {want:o} {}", path.display(), path.display())]
    Permissions { path: PathBuf, mode: u32, want: u32 },
    #[error("another process holds {} for more than {waited:?}; end it or remove the file", path.display())]
    Locked { path: PathBuf, waited: Duration },
    #[error("{} is not a development CA: {reason}; remove it to have a new one made (certificates of the old one will be refused)", path.display())]
    Malformed { path: PathBuf, reason: String },
    #[error("{} belongs to the trust domain `{found}`, not `{wanted}`; use another directory or trust domain", path.display())]
    TrustDomain {
        path: PathBuf,
        found: String,
        wanted: String,
    },
    #[error("the root in {} has expired; remove the file to have a new one made", path.display())]
    RootExpired { path: PathBuf },
    #[error("{identity} is not of the trust domain `{trust_domain}` of the development CA")]
    ForeignIdentity {
        identity: Identity,
        trust_domain: String,
    },
    #[error("`{0}` cannot be a trust domain or an identity in a certificate")]
    BadName(String),
    #[error("the time or lifetime asked for cannot be written into a certificate")]
    Time,
    #[error("cannot make a key or certificate: {0}")]
    Crypto(#[from] rcgen::Error),
    #[error(transparent)]
    Unusable(#[from] MalformedCertificate),
}

/// An open development CA.
pub struct DevCa {
    trust_domain: Arc<str>,
    issuer: rcgen::Issuer<'static, KeyPair>,
    /// What a peer needs to get from a leaf to the root.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Roots,
    validity: Validity,
}

impl DevCa {
    /// Opens the CA in `directory`, making directory and root on first use. Blocks shortly; several processes may do so at once.
    pub fn open(directory: &Path, trust_domain: &str) -> Result<Self, DevCaError> {
        Self::open_at(directory, trust_domain, SystemTime::now())
    }

    /// [`DevCa::open`] by another clock.
    pub fn open_at(
        directory: &Path,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<Self, DevCaError> {
        let store = Store::open(directory)?;
        let pem = store.read_or_create(|| new_root(trust_domain, now))?;
        Self::from_pem(store.path(), &pem, trust_domain, now)
    }

    /// A CA of its own that is kept nowhere.
    pub fn in_memory(trust_domain: &str, now: SystemTime) -> Result<Self, DevCaError> {
        let pem = new_root(trust_domain, now)?;
        Self::from_pem(Path::new("(memory)"), &pem, trust_domain, now)
    }

    /// A CA below this one, kept nowhere, as where an operator keeps the root and gives each cluster a CA of its own.
    pub fn intermediate(&self, now: SystemTime) -> Result<Self, DevCaError> {
        let validity = self.validity_from(now, ROOT_LIFETIME)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = ca_params(INTERMEDIATE_NAME, validity)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.use_authority_key_identifier_extension = true;
        let own = params.signed_by(&key, &self.issuer)?.der().clone();
        let above = self.intermediates.iter().cloned();
        Ok(Self {
            trust_domain: Arc::clone(&self.trust_domain),
            issuer: rcgen::Issuer::new(params, key),
            intermediates: std::iter::once(own).chain(above).collect(),
            roots: self.roots.clone(),
            validity,
        })
    }

    /// A leaf with a fresh P-256 key for `identity`, valid from shortly before `now` until `ttl` after it.
    pub fn issue(
        &self,
        identity: &Identity,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<WorkloadCertificate, DevCaError> {
        self.require_own(identity)?;
        let validity = self.validity_from(now, ttl)?;
        let (leaf, key) = self.sign(vec![uri(&identity.to_string())?], validity)?;
        let above = self.intermediates.iter().cloned();
        Ok(WorkloadCertificate::new(
            std::iter::once(leaf).chain(above).collect(),
            key,
            self.roots.clone(),
        )?)
    }

    /// A leaf for `identity` with the key of `request`, which may have asked for another one: that is for the caller to compare.
    pub fn sign_request(
        &self,
        request: &SigningRequest,
        identity: &Identity,
        validity: Validity,
    ) -> Result<CertificateDer<'static>, DevCaError> {
        self.require_own(identity)?;
        let names = vec![uri(&identity.to_string())?];
        self.certify(request.key(), names, WORKLOAD_USES, validity)
    }

    /// A certificate with a fresh key for a server that is no workload. `names` are DNS names and addresses.
    pub fn issue_server(
        &self,
        names: &[String],
        validity: Validity,
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), DevCaError> {
        let names = names.iter().map(|name| match name.parse::<IpAddr>() {
            Ok(ip) => Ok(SanType::IpAddress(ip)),
            Err(_) => match name.as_str().try_into() {
                Ok(dns) => Ok(SanType::DnsName(dns)),
                Err(_) => Err(DevCaError::BadName(name.clone())),
            },
        });
        let names = names.collect::<Result<_, _>>()?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let leaf = self.certify(&key, names, SERVER_USES, validity)?;
        Ok((leaf, PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    }

    /// From shortly before `now` until `ttl` after it, or until the root expires.
    pub fn validity_from(&self, now: SystemTime, ttl: Duration) -> Result<Validity, DevCaError> {
        let not_before = now.checked_sub(BACK_DATED).ok_or(DevCaError::Time)?;
        let not_after = now.checked_add(ttl).ok_or(DevCaError::Time)?;
        Ok(Validity {
            not_before,
            not_after: not_after.min(self.validity.not_after),
        })
    }

    /// A leaf with any names, also ones that no workload may have: what a hostile peer with this root could hold.
    #[cfg(any(test, feature = "test-knobs"))]
    pub fn issue_names(
        &self,
        names: Vec<SanType>,
        validity: Validity,
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), DevCaError> {
        self.sign(names, validity)
    }

    /// A revocation list that names these certificates, as PEM.
    #[cfg(any(test, feature = "test-knobs"))]
    pub fn revocation_list(
        &self,
        revoked: &[CertificateDer<'_>],
        next_update: SystemTime,
    ) -> Result<String, DevCaError> {
        let this_update = calendar(self.validity.not_before)?;
        let revoked_certs = revoked.iter().map(|certificate| {
            let parsed =
                spiffe::parse(certificate).map_err(|error| DevCaError::Unusable(error.into()))?;
            Ok(rcgen::RevokedCertParams {
                serial_number: rcgen::SerialNumber::from_slice(parsed.raw_serial()),
                revocation_time: this_update,
                reason_code: None,
                invalidity_date: None,
            })
        });
        let params = rcgen::CertificateRevocationListParams {
            this_update,
            next_update: calendar(next_update)?,
            crl_number: rcgen::SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect::<Result<_, DevCaError>>()?,
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        Ok(params.signed_by(&self.issuer)?.pem()?)
    }

    /// The certificates between a leaf of this CA and the root, this CA's own first; none if it is the root.
    pub fn intermediates(&self) -> &[CertificateDer<'static>] {
        &self.intermediates
    }

    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    fn sign(
        &self,
        names: Vec<SanType>,
        validity: Validity,
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), DevCaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let leaf = self.certify(&key, names, WORKLOAD_USES, validity)?;
        Ok((leaf, PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    }

    fn certify(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        uses: &[ExtendedKeyUsagePurpose],
        validity: Validity,
    ) -> Result<CertificateDer<'static>, DevCaError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.not_before = calendar(validity.not_before)?;
        params.not_after = calendar(validity.not_after)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = uses.to_vec();
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(key, &self.issuer)?.der().clone())
    }

    fn require_own(&self, identity: &Identity) -> Result<(), DevCaError> {
        if identity.trust_domain() == &*self.trust_domain {
            return Ok(());
        }
        Err(DevCaError::ForeignIdentity {
            identity: identity.clone(),
            trust_domain: self.trust_domain.to_string(),
        })
    }

    fn from_pem(
        path: &Path,
        pem: &str,
        trust_domain: &str,
        now: SystemTime,
    ) -> Result<Self, DevCaError> {
        let malformed = |reason: String| DevCaError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let mut certificates = CertificateDer::pem_slice_iter(pem.as_bytes());
        let root = certificates
            .next()
            .ok_or_else(|| malformed("it holds no certificate".into()))?
            .map_err(|error| malformed(format!("its certificate cannot be read: {error}")))?;
        if certificates.next().is_some() {
            return Err(malformed("it holds more than one certificate".into()));
        }
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| malformed(format!("its private key cannot be read: {error}")))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256)
            .map_err(|_| malformed("its private key is not a P-256 key".into()))?;

        let parsed = spiffe::parse(&root).map_err(|error| malformed(error.to_string()))?;
        if !parsed.is_ca() || parsed.issuer() != parsed.subject() {
            return Err(malformed(
                "its certificate is not a self-signed root".into(),
            ));
        }
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(malformed("its private key is not the certificate's".into()));
        }
        let name = parsed
            .subject()
            .iter_common_name()
            .next()
            .and_then(|name| name.as_str().ok());
        if name != Some(ROOT_NAME) || parsed.subject().iter().count() != 1 {
            return Err(malformed(format!(
                "its certificate is not named `{ROOT_NAME}`"
            )));
        }
        let uri = spiffe::only_uri(&parsed).map_err(|error| malformed(error.to_string()))?;
        let found = uri.strip_prefix("spiffe://").unwrap_or(uri);
        if found != trust_domain {
            return Err(DevCaError::TrustDomain {
                path: path.to_owned(),
                found: found.escape_debug().to_string(),
                wanted: trust_domain.to_owned(),
            });
        }
        let validity = Validity::of(&parsed)?;
        if validity.expired(now) {
            return Err(DevCaError::RootExpired {
                path: path.to_owned(),
            });
        }
        let roots = Roots::new(vec![root.clone().into_owned()])?;
        let issuer = rcgen::Issuer::new(root_params(trust_domain, validity)?, key);
        Ok(Self {
            trust_domain: trust_domain.into(),
            issuer,
            intermediates: Vec::new(),
            roots,
            validity,
        })
    }
}

impl fmt::Debug for DevCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevCa")
            .field("trust_domain", &self.trust_domain)
            .finish_non_exhaustive()
    }
}

/// Key and certificate of a new root, in PEM.
fn new_root(trust_domain: &str, now: SystemTime) -> Result<String, DevCaError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let not_before = now.checked_sub(BACK_DATED).ok_or(DevCaError::Time)?;
    let not_after = now.checked_add(ROOT_LIFETIME).ok_or(DevCaError::Time)?;
    let root = root_params(
        trust_domain,
        Validity {
            not_before,
            not_after,
        },
    )?
    .self_signed(&key)?;
    Ok(format!("{}{}", root.pem(), key.serialize_pem()))
}

fn root_params(trust_domain: &str, validity: Validity) -> Result<CertificateParams, DevCaError> {
    // The identity parser is the judge of what a trust domain may look like.
    Identity::parse(&format!("spiffe://{trust_domain}/ns/default/sa/default"))
        .map_err(|_| DevCaError::BadName(trust_domain.to_owned()))?;
    let mut params = ca_params(ROOT_NAME, validity)?;
    params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
    // One intermediate.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    Ok(params)
}

fn ca_params(name: &str, validity: Validity) -> Result<CertificateParams, DevCaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = calendar(validity.not_before)?;
    params.not_after = calendar(validity.not_after)?;
    Ok(params)
}

fn uri(name: &str) -> Result<SanType, DevCaError> {
    Ok(SanType::URI(
        name.try_into()
            .map_err(|_| DevCaError::BadName(name.to_owned()))?,
    ))
}

fn calendar(time: SystemTime) -> Result<OffsetDateTime, DevCaError> {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .map_err(|_| DevCaError::Time)?
        .as_secs();
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .ok_or(DevCaError::Time)
}
