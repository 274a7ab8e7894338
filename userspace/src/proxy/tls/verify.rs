//! Verification of a peer's certificate: chain to the roots now and unrevoked, then the SPIFFE id.
//!
//! Invariant: both verifiers do the chain first, so that an identity is never compared, or logged as the peer's, on an unproved chain.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};

use super::config::ExpectedServer;
use super::{PeerChecks, PeerRejection};
use crate::identity::certificate::PROVIDER;
use crate::policy::Identity;

/// What both directions have in common.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) checks: PeerChecks,
}

impl Chain {
    /// The identity of a leaf whose chain holds at `now` for `usage`.
    fn identity(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<Identity, PeerRejection> {
        let PeerChecks {
            revocations, knobs, ..
        } = &self.checks;
        if knobs.chain_verified() {
            let lists = match knobs.revocation_lists_asked() {
                true => revocations.current(),
                false => Arc::default(),
            };
            EndEntityCert::try_from(leaf)
                .and_then(|leaf| lists.verify(&leaf, intermediates, &self.roots, now, usage))
                .map_err(PeerRejection::from_webpki)
                .inspect_err(|rejection| {
                    if *rejection == PeerRejection::Revoked {
                        revocations.count(|counts| counts.refused += 1);
                    }
                })?;
        }
        Ok(self.checks.identity_of(leaf)?)
    }
}

/// A server's judge of clients: any identity of its own trust domain.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) chain: Chain,
    pub(super) trust_domain: String,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.chain.checks.knobs.client_certificate_required()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Peers have one certificate each; hints would only name our roots to strangers.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let usage = KeyUsage::client_auth();
        let peer = self
            .chain
            .identity(leaf, intermediates, now, usage)
            .map_err(PeerRejection::into_tls)?;
        if self.chain.checks.knobs.trust_domain_verified()
            && peer.trust_domain() != self.trust_domain
        {
            return Err(PeerRejection::TrustDomain {
                peer,
                own: self.trust_domain.clone(),
            }
            .into_tls());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// A client's judge of servers: exactly the expected identities, whatever name or address was dialled.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) chain: Chain,
    pub(super) expected: ExpectedServer,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _dialled: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let usage = KeyUsage::server_auth();
        let peer = self
            .chain
            .identity(leaf, intermediates, now, usage)
            .map_err(PeerRejection::into_tls)?;
        if self.chain.checks.knobs.server_identity_verified() && !self.expected.contains(&peer) {
            return Err(PeerRejection::NotExpected {
                peer,
                expected: self.expected.to_string(),
            }
            .into_tls());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &PROVIDER.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER
            .signature_verification_algorithms
            .supported_schemes()
    }
}
