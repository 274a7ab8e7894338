//! The certificates this node holds: one for each identity that has a pod here, and none for any other.
//!
//! Invariants: an identity without pods has no entry, so its key is gone; an expired certificate is never handed out. Enrolment calls
//! `acquire` and `release`, the proxy `current`, and one task drives `run`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::certificate::{PROVIDER, Roots, WorkloadCertificate};
use super::crl::{RevocationLists, Revocations};
use super::issuer::{IssueError, Issuer};
use super::knobs::TestKnobs;
use super::renewal::{Now, Renewal, RenewalSettings};
use crate::policy::Identity;

#[cfg(test)]
mod tests;

/// Why there is no certificate to present.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    #[error("no pod on this node has the identity {0}")]
    NotHeld(Identity),
    #[error("the certificate of {0} has not been issued yet")]
    Pending(Identity),
    #[error("no certificate could be had for {identity}: {reason}")]
    Failed { identity: Identity, reason: String },
    #[error("the certificate of {0} has expired and could not be renewed")]
    Expired(Identity),
}

/// The store. Cheap to clone.
#[derive(Clone)]
pub struct Certificates {
    inner: Arc<Inner>,
}

struct Inner {
    issuer: Arc<dyn Issuer>,
    settings: RenewalSettings,
    revocations: Revocations,
    knobs: TestKnobs,
    slots: Mutex<HashMap<Identity, Slot>>,
    changed: Notify,
}

struct Slot {
    pods: usize,
    renewal: Renewal,
    last_failure: Option<String>,
    /// Tells waiters that something about this slot is new.
    news: watch::Sender<()>,
}

type Fetched = (Identity, Result<WorkloadCertificate, IssueError>);

impl Certificates {
    /// An empty store. Nothing is fetched until [`Certificates::run`] runs.
    pub fn new(
        issuer: Arc<dyn Issuer>,
        settings: RenewalSettings,
        revocations: Revocations,
        knobs: TestKnobs,
    ) -> Self {
        let inner = Inner {
            issuer,
            settings,
            revocations,
            knobs,
            slots: Mutex::default(),
            changed: Notify::new(),
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// A pod of this identity has appeared. To be paired with one [`Certificates::release`].
    pub fn acquire(&self, identity: &Identity) {
        match self.slots().entry(identity.clone()) {
            Entry::Occupied(mut slot) => {
                let slot = slot.get_mut();
                slot.pods = slot.pods.saturating_add(1);
            }
            Entry::Vacant(slot) => {
                slot.insert(Slot {
                    pods: 1,
                    renewal: Renewal::default(),
                    last_failure: None,
                    news: watch::Sender::new(()),
                });
                self.inner.changed.notify_one();
            }
        }
    }

    /// A pod of this identity has gone. True when it was the last: key and certificate are dropped with it.
    pub fn release(&self, identity: &Identity) -> bool {
        let mut slots = self.slots();
        let Some(slot) = slots.get_mut(identity) else {
            warn!(%identity, "an identity was released that is not held");
            return false;
        };
        slot.pods = slot.pods.saturating_sub(1);
        let last = slot.pods == 0;
        if last {
            slots.remove(identity);
        }
        last
    }

    /// The certificate to present for `identity` at `now`: one that is held and has not expired.
    pub fn current(
        &self,
        identity: &Identity,
        now: SystemTime,
    ) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        let slots = self.slots();
        let slot = slots
            .get(identity)
            .ok_or_else(|| CertificateError::NotHeld(identity.clone()))?;
        let usable = match self.inner.knobs.expired_withheld() {
            true => slot.renewal.usable(now),
            false => slot.renewal.latest(),
        };
        if let Some(certificate) = usable {
            return Ok(Arc::clone(certificate));
        }
        Err(match (&slot.last_failure, slot.renewal.latest()) {
            (_, Some(_)) => CertificateError::Expired(identity.clone()),
            (Some(reason), None) => CertificateError::Failed {
                identity: identity.clone(),
                reason: reason.clone(),
            },
            (None, None) => CertificateError::Pending(identity.clone()),
        })
    }

    /// Waits while the first certificate of `identity` is on its way. The caller sets a deadline.
    pub async fn ready(
        &self,
        identity: &Identity,
    ) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        loop {
            let news = self.slots().get(identity).map(|slot| slot.news.subscribe());
            match self.current(identity, SystemTime::now()) {
                Err(CertificateError::Pending(_)) => {}
                settled => return settled,
            }
            if let Some(mut news) = news {
                // An error means that the slot has gone; the next look says so.
                let _ = news.changed().await;
            }
        }
    }

    /// Every identity held, with its certificate if there is one.
    pub fn held(&self) -> Vec<(Identity, Option<Arc<WorkloadCertificate>>)> {
        self.slots()
            .iter()
            .map(|(identity, slot)| (identity.clone(), slot.renewal.latest().cloned()))
            .collect()
    }

    /// The identities whose certificate is revoked. It is presented until there is another: peers without the list take it.
    pub fn revoked(&self) -> Vec<Identity> {
        self.slots()
            .iter()
            .filter(|(_, slot)| slot.renewal.revoked())
            .map(|(identity, _)| identity.clone())
            .collect()
    }

    /// Why the last attempts failed, one for each identity that asks again, in the order of their names.
    pub fn failures(&self) -> Vec<String> {
        let slots = self.slots();
        let failing = slots.iter().filter_map(|(identity, slot)| {
            Some((identity.to_string(), slot.last_failure.clone()?))
        });
        let mut failing: Vec<_> = failing.collect();
        failing.sort_unstable();
        failing.into_iter().map(|(_, reason)| reason).collect()
    }

    /// The issuer's roots as they are known now.
    pub fn roots(&self) -> Roots {
        self.inner.issuer.roots()
    }

    /// Fetches and renews until `shutdown`. Run it once, on the control runtime.
    pub async fn run(&self, shutdown: CancellationToken) {
        let mut requests: JoinSet<Fetched> = JoinSet::new();
        // A ticker, not a timer to the next renewal: timers do not see the wall clock being set, nor a suspended machine.
        let mut ticks = tokio::time::interval(self.inner.settings.check_every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut lists = self.inner.revocations.subscribe();
        loop {
            self.begin_due(&mut requests, Now::read());
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = ticks.tick() => {}
                () = self.inner.changed.notified() => {}
                () = others(&mut lists) => self.look_up(),
                Some(done) = requests.join_next() => match done {
                    Ok((identity, result)) => self.finish(&identity, result, Now::read()),
                    Err(error) => warn!(%error, "a request for a certificate ended unexpectedly"),
                },
            }
        }
        requests.shutdown().await;
    }

    /// Looks all certificates up in the lists that are in force now.
    fn look_up(&self) {
        let lists = self.inner.revocations.current();
        for (identity, slot) in self.slots().iter_mut() {
            if slot.renewal.look_up(&lists) {
                error!(%identity, "the own certificate is revoked by a list in CRL_PATH; peers that have the list refuse it, and another one is asked for");
            }
        }
    }

    fn begin_due(&self, requests: &mut JoinSet<Fetched>, now: Now) {
        let mut slots = self.slots();
        // Who has none to present first, and always with some places for them: renewals have half of a certificate's life.
        for (is_new, most) in self.inner.settings.places() {
            for (identity, slot) in slots.iter_mut() {
                if requests.len() >= most {
                    break;
                }
                if slot.renewal.usable(now.wall).is_none() == is_new && slot.renewal.begin(now) {
                    let (inner, identity) = (Arc::clone(&self.inner), identity.clone());
                    requests.spawn(async move {
                        let result = inner.fetch(&identity, now.wall).await;
                        (identity, result)
                    });
                }
            }
        }
    }

    fn finish(
        &self,
        identity: &Identity,
        result: Result<WorkloadCertificate, IssueError>,
        now: Now,
    ) {
        let mut slots = self.slots();
        // The last pod may have gone meanwhile: then the new key is dropped here.
        let Some(slot) = slots.get_mut(identity) else {
            return;
        };
        match result {
            Ok(certificate) => {
                debug!(%identity, until = ?certificate.validity().not_after, "certificate issued");
                slot.renewal
                    .succeeded(Arc::new(certificate), now, &self.inner.settings);
                slot.renewal.look_up(&self.inner.revocations.current());
                slot.last_failure = None;
            }
            Err(error) => {
                warn!(%identity, %error, "no certificate; trying again later");
                slot.renewal.failed(now, &self.inner.settings, chance());
                slot.last_failure = Some(error.to_string());
            }
        }
        slot.news.send_replace(());
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Identity, Slot>> {
        // No code that holds this lock leaves the map half changed.
        self.inner
            .slots
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    async fn fetch(
        &self,
        identity: &Identity,
        now: SystemTime,
    ) -> Result<WorkloadCertificate, IssueError> {
        let deadline = self.settings.request_deadline;
        let certificate = tokio::time::timeout(deadline, self.issuer.issue(identity, now))
            .await
            .map_err(|_| IssueError::Deadline {
                identity: identity.clone(),
                deadline,
            })??;
        if certificate.identity() != identity {
            return Err(IssueError::WrongIdentity {
                asked: identity.clone(),
                got: certificate.identity().clone(),
            });
        }
        if certificate.validity().expired(SystemTime::now()) {
            return Err(IssueError::Expired {
                identity: identity.clone(),
            });
        }
        if certificate.is_revoked(&self.revocations.current()) {
            return Err(IssueError::Revoked {
                identity: identity.clone(),
            });
        }
        Ok(certificate)
    }
}

/// Ends when other lists come into force, if ever they do.
async fn others(lists: &mut Option<watch::Receiver<Arc<RevocationLists>>>) {
    let Some(changed) = lists.as_mut().map(watch::Receiver::changed) else {
        return std::future::pending().await;
    };
    if changed.await.is_err() {
        std::future::pending().await
    }
}

fn chance() -> u16 {
    let mut bytes = [0; 2];
    // Without randomness the waits are merely less spread.
    let _ = PROVIDER.secure_random.fill(&mut bytes);
    u16::from_le_bytes(bytes)
}
