//! The tunnels this node has open to others, shared by the connections of one pod to one destination.
//!
//! Invariants: pods never share a tunnel; a tunnel serves new connections only while its certificate is its pod's current one; every
//! task is tracked; the lock is never held across an await. One pool per data runtime, called by the outbound proxy.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::error::HboneError;
use super::opening::{Opening, Waiting};
use super::request::ConnectRequest;
use super::settings::PoolSettings;
use super::stream::HboneStream;
use super::tunnel::{Session, Slot, Tunnel, Unopened};
use crate::identity::WorkloadCertificate;
use crate::policy::Identity;
use crate::proxy::deadline::within;
use crate::proxy::tls::{ExpectedServer, PeerChecks};

/// Who talks to whom through a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Uid of the pod whose connections the tunnel carries.
    pub source: Arc<str>,
    /// The address it leaves the pod from; `None` for the one that the kernel chooses.
    pub from: Option<IpAddr>,
    pub identity: Identity,
    /// Where the tunnel ends, normally port 15008 of a pod or waypoint.
    pub destination: SocketAddr,
    pub expected: ExpectedServer,
}

#[derive(Debug)]
pub struct Pool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    settings: PoolSettings,
    checks: PeerChecks,
    state: Mutex<State>,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<PoolKey, Entry>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Entry {
    tunnels: Vec<Arc<Tunnel>>,
    /// Take no new streams, and live as long as the ones they carry.
    draining: Vec<Weak<Tunnel>>,
    openings: Vec<Arc<Opening>>,
}

/// What a connection finds in the pool.
enum Found {
    Slot(Slot),
    Wait(Waiting),
    Open(Arc<Opening>, Waiting),
}

impl Pool {
    pub fn new(settings: PoolSettings, checks: PeerChecks) -> Self {
        let (state, tasks) = (Mutex::default(), TaskTracker::new());
        Self {
            inner: Arc::new(Inner {
                settings,
                checks,
                state,
                tasks,
            }),
        }
    }

    /// A stream to `request.authority` through a tunnel of `key`, opened over `dial` if none has room. `certificate` is the current one
    /// of `key.identity`. Must run on a tokio runtime, which then also drives the tunnel.
    pub async fn connect<D, F, S>(
        &self,
        key: &PoolKey,
        certificate: &Arc<WorkloadCertificate>,
        request: &ConnectRequest,
        dial: D,
    ) -> Result<HboneStream, HboneError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut retried = false;
        loop {
            let (slot, reused) = self.slot(key, certificate, &dial).await?;
            let tunnel = Arc::clone(slot.tunnel());
            let error = match slot.connect(request, &self.inner.settings).await {
                Ok(stream) => return Ok(stream),
                Err(Unopened::NotProcessed(error)) => {
                    tunnel.retire();
                    error
                }
                Err(Unopened::Died(error)) => {
                    tunnel.retire();
                    if !reused {
                        return Err(error);
                    }
                    error
                }
                Err(Unopened::Final(error)) => return Err(error),
            };
            if retried {
                return Err(error);
            }
            debug!(destination = %key.destination, %error, "a pooled tunnel turned out dead; trying a fresh one");
            retried = true;
        }
    }

    /// A place in a tunnel, and whether that tunnel was there before.
    async fn slot<D, F, S>(
        &self,
        key: &PoolKey,
        certificate: &Arc<WorkloadCertificate>,
        dial: &D,
    ) -> Result<(Slot, bool), HboneError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let deadline = self.inner.settings.handshake_deadline;
        let mut waited = false;
        let search = async {
            loop {
                let waiting = match self.inner.find(key, certificate)? {
                    Found::Slot(slot) => return Ok((slot, !waited)),
                    Found::Wait(waiting) => waiting,
                    Found::Open(opening, waiting) => {
                        let task = Arc::clone(&self.inner).open(
                            key.clone(),
                            Arc::clone(certificate),
                            opening,
                            dial(),
                        );
                        self.inner.tasks.spawn(task);
                        waiting
                    }
                };
                waited = true;
                waiting
                    .outcome()
                    .await
                    .unwrap_or(Err(HboneError::Closed(key.destination)))?;
            }
        };
        // Others may take the places of a tunnel that was waited for, and again: the handshake's own deadline is not enough.
        let deadline = deadline.map(|deadline| deadline.saturating_mul(2));
        within(deadline, search).await.unwrap_or_else(|deadline| {
            Err(HboneError::Deadline {
                destination: key.destination,
                waited_for: "a place in a tunnel",
                deadline,
            })
        })
    }

    /// Ends tunnels and their streams at once: their pod or identity has gone.
    pub fn close_where(&self, mut gone: impl FnMut(&PoolKey) -> bool) {
        self.inner.state().entries.retain(|key, entry| {
            let gone = gone(key);
            if gone {
                entry.close();
            }
            !gone
        });
    }

    /// Lets streams finish, opens no new ones, and cuts what is left at the deadline.
    pub async fn shutdown(&self, deadline: Duration) {
        let entries: Vec<Entry> = {
            let mut state = self.inner.state();
            state.closed = true;
            state.entries.drain().map(|(_, entry)| entry).collect()
        };
        let closings: Vec<_> = entries
            .iter()
            .flat_map(Entry::all)
            .map(|tunnel| tunnel.closing().clone())
            .collect();
        for opening in entries.iter().flat_map(|entry| &entry.openings) {
            opening.cancel.cancel();
        }
        // The pool's hold on a tunnel is what keeps it open without streams.
        drop(entries);
        self.inner.tasks.close();
        if timeout(deadline, self.inner.tasks.wait()).await.is_err() {
            closings.iter().for_each(CancellationToken::cancel);
            self.inner.tasks.wait().await;
        }
    }

    /// Tunnels that may take new streams, for tests and metrics.
    pub fn tunnels(&self) -> usize {
        self.inner
            .state()
            .entries
            .values()
            .map(|entry| entry.tunnels.len())
            .sum()
    }

    /// Keys with a tunnel, open or on its way.
    pub fn keys(&self) -> Vec<PoolKey> {
        self.inner.state().entries.keys().cloned().collect()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        state.closed = true;
        for opening in state.entries.values().flat_map(|entry| &entry.openings) {
            opening.cancel.cancel();
        }
        // Tunnels end with their last stream.
        state.entries.clear();
    }
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.tunnels.is_empty() && self.draining.is_empty() && self.openings.is_empty()
    }

    fn all(&self) -> impl Iterator<Item = Arc<Tunnel>> {
        self.tunnels
            .iter()
            .cloned()
            .chain(self.draining.iter().filter_map(Weak::upgrade))
    }

    fn close(&self) {
        self.all().for_each(|tunnel| tunnel.close());
        self.openings
            .iter()
            .for_each(|opening| opening.cancel.cancel());
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds this lock leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(
        &self,
        key: &PoolKey,
        certificate: &Arc<WorkloadCertificate>,
    ) -> Result<Found, HboneError> {
        let now = SystemTime::now();
        let most = usize::try_from(self.settings.max_streams_per_connection)
            .unwrap_or(usize::MAX)
            .max(1);
        let mut state = self.state();
        if state.closed {
            return Err(HboneError::Closed(key.destination));
        }
        let entry = state.entries.entry(key.clone()).or_default();
        // One that is no longer usable ends with its last stream.
        let drained = entry
            .tunnels
            .extract_if(.., |tunnel| !tunnel.usable(certificate, now));
        entry
            .draining
            .extend(drained.map(|tunnel| Arc::downgrade(&tunnel)));
        if let Some(slot) = entry.tunnels.iter().find_map(Tunnel::slot) {
            return Ok(Found::Slot(slot));
        }
        if let Some(waiting) = entry
            .openings
            .iter()
            .find_map(|opening| opening.join(certificate, most))
        {
            return Ok(Found::Wait(waiting));
        }
        let opening = Opening::new(Arc::clone(certificate));
        let waiting = opening
            .join(certificate, most)
            .ok_or(HboneError::Closed(key.destination))?;
        entry.openings.push(Arc::clone(&opening));
        Ok(Found::Open(opening, waiting))
    }

    /// Opens a tunnel, tells those who wait, and drives it to its end.
    async fn open<F, S>(
        self: Arc<Self>,
        key: PoolKey,
        certificate: Arc<WorkloadCertificate>,
        opening: Arc<Opening>,
        dial: F,
    ) where
        F: Future<Output = io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (destination, deadline) = (key.destination, self.settings.handshake_deadline);
        let handshake = async {
            let io = dial.await.map_err(|error| HboneError::Dial {
                destination,
                error: Arc::new(error),
            })?;
            Tunnel::open(
                io,
                destination,
                certificate,
                &key.expected,
                &self.settings,
                &self.checks,
            )
            .await
        };
        let opened = tokio::select! {
            opened = within(deadline, handshake) => opened.unwrap_or_else(|deadline| Err(HboneError::Deadline {
                destination,
                waited_for: "the handshake",
                deadline,
            })),
            () = opening.cancel.cancelled() => Err(HboneError::Closed(destination)),
        };
        let driven = {
            let mut state = self.state();
            let entry = state.entries.get_mut(&key);
            let wanted = !opening.cancel.is_cancelled();
            let driven = match (opened, entry) {
                (Ok((tunnel, session)), Some(entry)) if wanted => {
                    entry.tunnels.push(Arc::clone(&tunnel));
                    Ok((tunnel, session))
                }
                (Ok(_), _) => Err(HboneError::Closed(destination)),
                (Err(error), _) => Err(error),
            };
            state.forget(&key, &opening);
            driven
        };
        opening.finish(driven.as_ref().map(|_| ()).map_err(HboneError::clone));
        drop(opening);
        if let Ok((tunnel, session)) = driven {
            let (weak, idle) = (Arc::downgrade(&tunnel), self.settings.idle);
            let (closing, revoked) = (tunnel.closing().clone(), tunnel.revoked().clone());
            drop(tunnel);
            let pool = Arc::downgrade(&self);
            drop(self);
            drive(session, &weak, &closing, &revoked, idle, &pool, &key).await;
            if let Some(pool) = pool.upgrade() {
                pool.remove(&key, &weak);
            }
        }
    }

    fn remove(&self, key: &PoolKey, gone: &Weak<Tunnel>) {
        let mut state = self.state();
        if let Some(entry) = state.entries.get_mut(key) {
            entry
                .tunnels
                .retain(|tunnel| !std::ptr::eq(Arc::as_ptr(tunnel), gone.as_ptr()));
            entry.draining.retain(|tunnel| !tunnel.ptr_eq(gone));
        }
        state.tidy(key);
    }

    /// Removes the tunnel if it is idle for that long; else says when to look again.
    fn expire(&self, key: &PoolKey, tunnel: &Weak<Tunnel>, idle: Duration) -> Duration {
        // Under the lock, so that nobody takes a place meanwhile.
        let mut state = self.state();
        let Some(since) = tunnel.upgrade().and_then(|tunnel| tunnel.idle_since()) else {
            return idle;
        };
        let left = idle.saturating_sub(Instant::now().saturating_duration_since(since));
        if left.is_zero() {
            if let Some(entry) = state.entries.get_mut(key) {
                entry
                    .tunnels
                    .retain(|other| !std::ptr::eq(Arc::as_ptr(other), tunnel.as_ptr()));
            }
            state.tidy(key);
            return idle;
        }
        left
    }
}

impl State {
    fn forget(&mut self, key: &PoolKey, opening: &Arc<Opening>) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.openings.retain(|other| !Arc::ptr_eq(other, opening));
        }
        self.tidy(key);
    }

    /// Keys of destinations that are gone must not stay.
    fn tidy(&mut self, key: &PoolKey) {
        if self.entries.get(key).is_some_and(Entry::is_empty) {
            self.entries.remove(key);
        }
    }
}

/// Drives the session until the peer or we close it. It ends by itself when neither the pool nor a stream holds the tunnel.
async fn drive<S>(
    session: Session<S>,
    tunnel: &Weak<Tunnel>,
    closing: &CancellationToken,
    revoked: &CancellationToken,
    idle: Duration,
    pool: &Weak<Inner>,
    key: &PoolKey,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Session {
        http2,
        mut peer_revoked,
    } = session;
    let mut http2 = std::pin::pin!(http2);
    let mut wait = idle;
    loop {
        tokio::select! {
            ended = &mut http2 => {
                if let Err(error) = ended {
                    debug!(destination = %key.destination, %error, "a tunnel failed");
                }
                return;
            }
            () = closing.cancelled() => return,
            () = &mut peer_revoked => {
                warn!(destination = %key.destination, expected = %key.expected, "a tunnel is closed: its server's certificate was revoked");
                // In this order: who finds it closed asks why.
                revoked.cancel();
                closing.cancel();
                return;
            }
            () = sleep(wait) => {
                wait = pool.upgrade().map_or(idle, |pool| pool.expire(key, tunnel, idle));
            }
        }
    }
}
