//! The roots that vouch for the control plane's certificates.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

/// The largest file of roots, in bytes.
const MOST: u64 = 4 << 20;

static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));

/// Where roots come from.
#[derive(Clone, PartialEq, Eq)]
pub enum RootSource {
    /// A file of PEM, which may be replaced at any time.
    File(PathBuf),
    /// Those that this machine trusts.
    System,
    /// PEM itself.
    Pem(String),
}

/// Why there are no roots.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RootError {
    /// The file cannot be read.
    #[error("the roots in {} cannot be read: {reason}; mount them there, or set XDS_ROOT_CA and CA_ROOT_CA", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// There is no certificate in it, or something that is none.
    #[error("{place} holds no roots: {reason}")]
    Content {
        /// The file or setting.
        place: String,
        /// What is wrong.
        reason: String,
    },
    /// Something that should not happen.
    #[error("{0}")]
    Internal(String),
}

impl RootSource {
    /// `SYSTEM`, the text of certificates, or else a path.
    pub fn parse(text: &str) -> Option<Self> {
        match text.trim() {
            "" => None,
            "SYSTEM" => Some(Self::System),
            pem if pem.starts_with("-----BEGIN") => {
                let source = Self::Pem(pem.to_owned());
                source.store().is_ok().then_some(source)
            }
            path if path.chars().any(char::is_control) => None,
            path => Some(Self::File(PathBuf::from(path))),
        }
    }

    fn store(&self) -> Result<RootCertStore, RootError> {
        let mut store = RootCertStore::empty();
        for root in self.certificates()? {
            store.add(root).map_err(|error| self.content(error))?;
        }
        if store.is_empty() {
            return Err(self.content("there is no certificate"));
        }
        Ok(store)
    }

    /// What a client authenticates its server by, HTTP/2 only. Blocks.
    pub(super) fn client_config(&self) -> Result<Arc<ClientConfig>, RootError> {
        let store = self.store()?;
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| RootError::Internal(error.to_string()))?
            .with_root_certificates(store)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, RootError> {
        let pem = match self {
            Self::File(path) => read(path).map_err(|error| RootError::Read {
                path: path.clone(),
                reason: error.to_string(),
            })?,
            Self::Pem(text) => text.clone().into_bytes(),
            Self::System => {
                // Some of them may be unreadable or of the wrong form: those that are good vouch for their own.
                return Ok(rustls_native_certs::load_native_certs().certs);
            }
        };
        CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<_, _>>()
            .map_err(|error| self.content(error))
    }

    fn content(&self, reason: impl fmt::Display) -> RootError {
        RootError::Content {
            place: self.to_string(),
            reason: reason.to_string(),
        }
    }
}

/// A regular file of bounded size.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let file = std::fs::File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST {
        return Err(io::Error::other(format!("more than {MOST} bytes")));
    }
    Ok(bytes)
}

/// As it is written in a setting. Roots are no secret.
impl serde::Serialize for RootSource {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Pem(text) => serializer.serialize_str(text),
            other => serializer.collect_str(other),
        }
    }
}

impl fmt::Display for RootSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::System => f.write_str("SYSTEM"),
            Self::Pem(_) => f.write_str("the given PEM"),
        }
    }
}

impl fmt::Debug for RootSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
