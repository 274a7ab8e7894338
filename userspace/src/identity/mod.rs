//! Who a pod is: SPIFFE ids, the certificates that prove them, their renewal, and the development CA.
//!
//! Nothing here opens a connection between pods; `proxy::tls` builds its configurations from what this module holds.

pub mod ca_client;
pub mod certificate;
pub mod certificates;
pub mod crl;
pub mod dev_ca;
pub mod issuer;
mod knobs;
pub mod renewal;
pub mod spiffe;

pub use ca_client::CaClient;
pub use certificate::{MalformedCertificate, Roots, Validity, WorkloadCertificate};
pub use certificates::{CertificateError, Certificates};
pub use crl::{
    CrlFile, CrlFileError, CrlFileStatus, RevocationCounts, RevocationLists, Revocations,
};
pub use dev_ca::{DevCa, DevCaError};
pub use issuer::{DevCaIssuer, IssueError, Issuer};
pub use knobs::TestKnobs;
pub use renewal::RenewalSettings;
