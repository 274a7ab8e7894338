//! Peers whose certificates are revoked while a tunnel to them is open.
//!
//! Invariant: lists that come into force at any time after the watch began are either asked in the handshake or noticed here. Each tunnel
//! looks for itself, on its own thread.

use std::future::{Future, pending};
use std::sync::Arc;
use std::time::SystemTime;

use rustls::{CommonState, RootCertStore};
use tokio::sync::watch;

use super::PeerChecks;
use crate::identity::{RevocationLists, WorkloadCertificate};

/// Begun before a handshake.
pub struct RevocationWatch {
    checks: PeerChecks,
    /// None where lists never change.
    news: Option<watch::Receiver<Arc<RevocationLists>>>,
    /// The handshake's: the chain may have led to a root that is not trusted any more by the time it is looked at.
    roots: Arc<RootCertStore>,
    since: SystemTime,
}

impl RevocationWatch {
    /// For a handshake in which `certificate` is presented.
    pub fn begin(checks: &PeerChecks, certificate: &WorkloadCertificate) -> Self {
        let news = match checks.knobs.revoked_tunnels_closed() {
            true => checks.revocations.subscribe(),
            false => None,
        };
        Self {
            checks: checks.clone(),
            news,
            roots: certificate.roots().store(),
            since: SystemTime::now(),
        }
    }

    /// Ends when the peer of this finished handshake is revoked; otherwise never.
    pub fn peer_revoked(self, state: &CommonState) -> impl Future<Output = ()> + Send + use<> {
        let peer = self
            .news
            .zip(state.peer_certificates())
            .map(|(news, chain)| {
                let chain: Vec<_> = chain.iter().map(|one| one.clone().into_owned()).collect();
                (news, chain)
            });
        let (checks, roots, since) = (self.checks, self.roots, self.since);
        async move {
            let Some((mut news, chain)) = peer else {
                return pending().await;
            };
            // An error means that no list will ever change.
            while news.changed().await.is_ok() {
                let lists = Arc::clone(&news.borrow_and_update());
                if lists.revoke(&chain, &roots, since) {
                    checks.revocations.count(|counts| counts.closed += 1);
                    return;
                }
            }
            pending().await
        }
    }
}
