//! A tunnel on its way: one handshake that any number of connections wait for.
//!
//! The handshake runs in a task of the pool, so that it goes on for the others when the connection that began it is given up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::HboneError;
use crate::identity::WorkloadCertificate;

pub(super) type Outcome = Result<(), HboneError>;

#[derive(Debug)]
pub(super) struct Opening {
    certificate: Arc<WorkloadCertificate>,
    waiting: AtomicUsize,
    outcome: watch::Sender<Option<Outcome>>,
    pub(super) cancel: CancellationToken,
}

/// One connection that waits for an opening.
pub(super) struct Waiting {
    opening: Arc<Opening>,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Opening {
    pub(super) fn new(certificate: Arc<WorkloadCertificate>) -> Arc<Self> {
        Arc::new(Self {
            certificate,
            waiting: AtomicUsize::new(0),
            outcome: watch::Sender::new(None),
            cancel: CancellationToken::new(),
        })
    }

    /// Joins those who wait, unless they will fill the tunnel already.
    pub(super) fn join(
        self: &Arc<Self>,
        certificate: &Arc<WorkloadCertificate>,
        most: usize,
    ) -> Option<Waiting> {
        let same = Arc::ptr_eq(&self.certificate, certificate) && !self.cancel.is_cancelled();
        if !same || self.waiting.load(Ordering::Relaxed) >= most {
            return None;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Some(Waiting {
            opening: Arc::clone(self),
            outcome: self.outcome.subscribe(),
        })
    }

    pub(super) fn finish(&self, outcome: Outcome) {
        self.outcome.send_replace(Some(outcome));
    }
}

impl Waiting {
    /// None if the task that opens the tunnel has vanished.
    pub(super) async fn outcome(mut self) -> Option<Outcome> {
        let cancel = self.opening.cancel.clone();
        tokio::select! {
            outcome = self.outcome.wait_for(Option::is_some) => outcome.ok().and_then(|outcome| outcome.clone()),
            () = cancel.cancelled() => None,
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.opening.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
