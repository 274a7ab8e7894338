//! Asking the control plane for addresses and services as they are needed, where it is not asked for everything.
//!
//! Invariants: what was asked for once stays asked for, so an answer is final until the control plane says otherwise; the number of names
//! is bounded. The proxy asks before it takes an address for one outside the mesh; `client` sends and hears.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};

use super::session::Taken;
use crate::mesh::{Destination, NetworkAddress, ServiceName, Store};

/// The most names that are asked for: pods may connect to any address there is.
const MOST_NAMES: usize = 65_536;
/// With those of this node's own pods, which have room whatever others connect to.
const MOST_WITH_OWN: usize = MOST_NAMES + 16_384;
/// Names on their way to the control plane.
const WAITING: usize = 4096;
/// How long a connection waits for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why it is not known what is at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DemandError {
    /// No answer.
    #[error("the control plane has not said within {} s what is at the destination", PATIENCE.as_secs())]
    Deadline,
    /// Too many others.
    #[error("the agent follows {MOST_NAMES} addresses and takes no more")]
    TooMany,
    /// The client has ended.
    #[error("the agent is stopping")]
    Stopping,
}

/// Who asks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Demand {
    asks: mpsc::Sender<String>,
    store: Arc<Store>,
    answers: Arc<Answers>,
    patience: Duration,
}

/// The client's part.
#[derive(Debug)]
pub struct Demanded {
    pub asks: mpsc::Receiver<String>,
    pub answers: Arc<Answers>,
}

/// What is known of the names that were asked for.
#[derive(Debug)]
pub struct Answers {
    /// Whether there was an answer.
    names: Mutex<HashMap<String, bool>>,
    news: watch::Sender<()>,
}

impl Answers {
    /// Notes what a push says. To be called once it is in force.
    pub fn hear(&self, taken: &Taken) {
        let accepted = taken.accepted.iter().map(|(name, _)| &**name);
        let removed = taken.removed.iter().map(String::as_str);
        let mut names = self.names();
        for name in accepted.chain(removed) {
            if let Some(answered) = names.get_mut(name) {
                *answered = true;
            }
        }
        drop(names);
        self.news.send_replace(());
    }

    fn names(&self) -> std::sync::MutexGuard<'_, HashMap<String, bool>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there was an answer, and whether the name is new, which enters it. `None` if there is no room for it among so many.
    fn enter(&self, name: &str, most: usize) -> Option<(bool, bool)> {
        let mut names = self.names();
        if let Some(answered) = names.get(name) {
            return Some((*answered, false));
        }
        if names.len() >= most {
            return None;
        }
        names.insert(name.to_owned(), false);
        Some((false, true))
    }

    fn is_answered(&self, name: &str) -> bool {
        self.names().get(name).copied().unwrap_or_default()
    }

    fn settle(&self, name: &str) {
        if let Some(answered) = self.names().get_mut(name) {
            *answered = true;
        }
    }
}

impl Demand {
    /// Asks for what `store` will hold.
    pub fn new(store: Arc<Store>) -> (Self, Demanded) {
        let (sender, asks) = mpsc::channel(WAITING);
        let answers = Arc::new(Answers {
            names: Mutex::default(),
            news: watch::Sender::new(()),
        });
        let demand = Self {
            asks: sender,
            store,
            answers: Arc::clone(&answers),
            patience: PATIENCE,
        };
        (demand, Demanded { asks, answers })
    }

    /// Returns when the store holds what is at an address, or it is known that nothing of the mesh is.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn address(&self, network: &str, ip: IpAddr) -> Result<(), DemandError> {
        let is_known = || self.holds(network, ip);
        let name = NetworkAddress::new(network, ip).to_string();
        self.wait(&name, is_known).await
    }

    /// The same of a service.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn service(&self, name: &ServiceName) -> Result<(), DemandError> {
        let is_known = || self.store.load().service_by_name(name.as_str()).is_some();
        self.wait(name.as_str(), is_known).await
    }

    /// Asks what is at addresses of this node's own pods. Returns when all of it is known, or when it has taken as long as a connection
    /// would wait: [`Self::knows`] tells what is not.
    pub async fn own_addresses(&self, network: &str, ips: &[IpAddr]) {
        let asked = ips.iter().filter(|ip| {
            let name = NetworkAddress::new(network, **ip).to_string();
            !self.knows(network, **ip) && self.ask(&name, MOST_WITH_OWN).is_ok()
        });
        let asked: Vec<IpAddr> = asked.copied().collect();
        let mut news = self.answers.news.subscribe();
        let all_known = async {
            while !asked.iter().all(|ip| self.knows(network, *ip)) {
                if news.changed().await.is_err() {
                    return;
                }
            }
        };
        // What is not known is asked about again by whoever needs it.
        let _ = tokio::time::timeout(self.patience, all_known).await;
    }

    /// Whether the store holds what is at an address, or it is known that nothing of the mesh is.
    pub fn knows(&self, network: &str, ip: IpAddr) -> bool {
        let name = NetworkAddress::new(network, ip).to_string();
        self.answers.is_answered(&name) || self.holds(network, ip)
    }

    fn holds(&self, network: &str, ip: IpAddr) -> bool {
        self.store.load().lookup(network, ip, None) != Destination::Unknown
    }

    /// Asks for a name that was not asked for; whether there was an answer already.
    fn ask(&self, name: &str, most: usize) -> Result<bool, DemandError> {
        let (answered, new) = self.answers.enter(name, most).ok_or(DemandError::TooMany)?;
        if new {
            // Nobody takes names while the control plane is gone: what finds no room must be asked for by the next one.
            self.asks.try_send(name.to_owned()).map_err(|error| {
                self.answers.names().remove(name);
                match error {
                    TrySendError::Full(_) => DemandError::Deadline,
                    TrySendError::Closed(_) => DemandError::Stopping,
                }
            })?;
        }
        Ok(answered)
    }

    async fn wait(&self, name: &str, is_known: impl Fn() -> bool) -> Result<(), DemandError> {
        let mut news = self.answers.news.subscribe();
        if self.ask(name, MOST_NAMES)? || is_known() {
            return Ok(());
        }
        let waiting = async {
            loop {
                news.changed().await.map_err(|_| DemandError::Stopping)?;
                // The answer to an address may be a workload, under that one's name.
                if is_known() {
                    self.answers.settle(name);
                }
                if self.answers.is_answered(name) {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(self.patience, waiting)
            .await
            .unwrap_or(Err(DemandError::Deadline))
    }
}

#[cfg(test)]
mod tests;
