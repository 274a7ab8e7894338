//! Mutual TLS between agents: TLS 1.3 only, both sides prove a SPIFFE id, nothing is resumed.
//!
//! Invariants: a handshake that succeeds has proved the peer's chain at that moment and its identity; no session, ticket or early data
//! crosses into another connection. Called by `proxy::hbone` and the listeners.

mod config;
mod handshake;
mod rejection;
mod revoked;
#[cfg(test)]
mod tests;
mod verify;

use rustls::pki_types::CertificateDer;

use crate::identity::Revocations;
use crate::identity::spiffe::{self, SpiffeError};
use crate::policy::Identity;

pub use config::{ConfigError, ExpectedServer, client_config, server_config};
pub use handshake::{Accepted, Connected, accept, connect};
pub use rejection::{HandshakeError, PeerRejection};
pub use revoked::RevocationWatch;

/// What a peer's certificates are looked at with, beside the roots.
#[derive(Debug, Clone, Default)]
pub struct PeerChecks {
    pub revocations: Revocations,
    pub names: CertificateNames,
    pub knobs: TestKnobs,
}

/// What a peer's certificate may be named, beside names that are no URIs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CertificateNames {
    /// One SPIFFE id and no other URI.
    #[default]
    One,
    /// Several URIs, of which the first that is a workload's SPIFFE id counts.
    FirstOfSeveral,
}

impl PeerChecks {
    fn identity_of(&self, leaf: &CertificateDer<'_>) -> Result<Identity, SpiffeError> {
        match self.names {
            CertificateNames::One => spiffe::identity_of(leaf),
            CertificateNames::FirstOfSeveral => spiffe::first_identity_of(leaf),
        }
    }
}

/// Switches single checks off, so that a test can show that it would see their absence. Passed in, never global. Has no fields, and so
/// switches nothing, unless the crate is built with the feature `test-knobs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TestKnobs {
    /// The server admits peers that present no certificate.
    #[cfg(feature = "test-knobs")]
    pub skip_client_certificate: bool,
    /// Chains are not verified, neither signatures of issuers nor times.
    #[cfg(feature = "test-knobs")]
    pub skip_chain: bool,
    /// The client accepts any SPIFFE id from the server.
    #[cfg(feature = "test-knobs")]
    pub skip_server_identity: bool,
    /// The server admits clients of other trust domains.
    #[cfg(feature = "test-knobs")]
    pub skip_trust_domain: bool,
    /// Revocation lists are not asked in a handshake.
    #[cfg(feature = "test-knobs")]
    pub skip_revocation_lists: bool,
    /// A tunnel that is open outlives the revocation of its peer.
    #[cfg(feature = "test-knobs")]
    pub keep_revoked_tunnels: bool,
    /// The own certificate is presented when it has expired as well.
    #[cfg(feature = "test-knobs")]
    pub present_expired: bool,
}

#[cfg(feature = "test-knobs")]
impl TestKnobs {
    fn client_certificate_required(self) -> bool {
        !self.skip_client_certificate
    }

    fn chain_verified(self) -> bool {
        !self.skip_chain
    }

    fn server_identity_verified(self) -> bool {
        !self.skip_server_identity
    }

    fn revocation_lists_asked(self) -> bool {
        !self.skip_revocation_lists
    }

    fn revoked_tunnels_closed(self) -> bool {
        !self.keep_revoked_tunnels
    }

    fn trust_domain_verified(self) -> bool {
        !self.skip_trust_domain
    }

    fn expired_withheld(self) -> bool {
        !self.present_expired
    }
}

#[cfg(not(feature = "test-knobs"))]
impl TestKnobs {
    const fn client_certificate_required(self) -> bool {
        true
    }

    const fn chain_verified(self) -> bool {
        true
    }

    const fn server_identity_verified(self) -> bool {
        true
    }

    const fn revocation_lists_asked(self) -> bool {
        true
    }

    const fn revoked_tunnels_closed(self) -> bool {
        true
    }

    const fn trust_domain_verified(self) -> bool {
        true
    }

    const fn expired_withheld(self) -> bool {
        true
    }
}
