//! The live feed of flows behind `culvert flows`: a bounded ring of the latest, and a bounded channel to each follower.
//! Publishing never waits; a follower that is too slow loses the oldest and is told how many.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, broadcast};

use super::record::FlowRecord;

/// Events a follower may lag behind.
const FOLLOWER_LAG: usize = 1024;
/// Events kept for those who come later.
pub(super) const RECENT: usize = 512;

/// Something that happened to a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event", deny_unknown_fields)]
pub enum FlowEvent {
    /// It was established.
    Opened {
        /// When, in milliseconds since 1970.
        time_ms: u64,
        /// What is known so far.
        flow: FlowRecord,
    },
    /// It is still open; told now and then.
    Report {
        /// When, in milliseconds since 1970.
        time_ms: u64,
        /// What it has come to by now.
        flow: FlowRecord,
    },
    /// It ended, or was refused.
    Closed {
        /// When, in milliseconds since 1970.
        time_ms: u64,
        /// All of it.
        flow: FlowRecord,
    },
}

impl FlowEvent {
    /// The connection.
    pub fn flow(&self) -> &FlowRecord {
        match self {
            Self::Opened { flow, .. } | Self::Report { flow, .. } | Self::Closed { flow, .. } => {
                flow
            }
        }
    }
}

/// The publishing end.
#[derive(Debug)]
pub struct Feed {
    live: broadcast::Sender<Arc<FlowEvent>>,
    joined: Notify,
    recent: Mutex<VecDeque<Arc<FlowEvent>>>,
}

/// What a follower gets next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// An event.
    Event(Arc<FlowEvent>),
    /// So many events were lost, because this follower was too slow.
    Lost(u64),
}

/// The following end.
#[derive(Debug)]
pub struct Follower {
    earlier: VecDeque<Arc<FlowEvent>>,
    live: broadcast::Receiver<Arc<FlowEvent>>,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            live: broadcast::Sender::new(FOLLOWER_LAG),
            joined: Notify::new(),
            recent: Mutex::new(VecDeque::with_capacity(RECENT)),
        }
    }
}

impl Feed {
    /// Publishes an event to the followers of this moment and keeps it for a while.
    pub fn publish(&self, event: FlowEvent) {
        self.publish_all(&[Arc::new(event)]);
    }

    /// Publishes events in their order.
    pub fn publish_all(&self, events: &[Arc<FlowEvent>]) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, so that a new follower sees each event once.
        if self.is_followed() {
            for event in events {
                // The last follower may have gone just now.
                let _ = self.live.send(event.clone());
            }
        }
        let kept = events.len().min(RECENT);
        let overdue = (recent.len() + kept).saturating_sub(RECENT);
        let overdue = overdue.min(recent.len());
        recent.drain(..overdue);
        recent.extend(events.iter().skip(events.len() - kept).cloned());
    }

    /// Tells those who follow now, and nobody who comes later.
    pub fn whisper(&self, event: FlowEvent) {
        let _ = self.live.send(Arc::new(event));
    }

    /// Whether anybody follows.
    pub fn is_followed(&self) -> bool {
        self.live.receiver_count() > 0
    }

    /// Waits until somebody begins to follow. Safe to cancel.
    pub async fn joined(&self) {
        self.joined.notified().await;
    }

    /// Follows from now on, beginning with at most `earlier` of the latest events.
    pub fn follow(&self, earlier: usize) -> Follower {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let skipped = recent.len().saturating_sub(earlier);
        let follower = Follower {
            earlier: recent.iter().skip(skipped).cloned().collect(),
            live: self.live.subscribe(),
        };
        self.joined.notify_one();
        follower
    }
}

impl Follower {
    /// The next event, in order; `None` once the feed is gone. Safe to cancel.
    pub async fn next(&mut self) -> Option<Next> {
        if let Some(event) = self.earlier.pop_front() {
            return Some(Next::Event(event));
        }
        match self.live.recv().await {
            Ok(event) => Some(Next::Event(event)),
            Err(RecvError::Lagged(lost)) => Some(Next::Lost(lost)),
            Err(RecvError::Closed) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(time_ms: u64) -> FlowEvent {
        FlowEvent::Closed {
            time_ms,
            flow: FlowRecord::default(),
        }
    }

    #[tokio::test]
    async fn a_follower_gets_earlier_and_live_events_once_each() {
        let feed = Feed::default();
        (0..5).for_each(|n| feed.publish(event(n)));
        let mut follower = feed.follow(2);
        feed.publish(event(5));
        for n in 3..6 {
            assert_eq!(follower.next().await, Some(Next::Event(Arc::new(event(n)))));
        }
        drop(feed);
        assert_eq!(follower.next().await, None);
    }

    #[tokio::test]
    async fn a_slow_follower_is_told_what_it_lost_and_others_lose_nothing() {
        let feed = Feed::default();
        let mut slow = feed.follow(0);
        let mut quick = feed.follow(0);
        for n in 0..(FOLLOWER_LAG as u64 + 10) {
            feed.publish(event(n));
            assert_eq!(quick.next().await, Some(Next::Event(Arc::new(event(n)))));
        }
        assert_eq!(slow.next().await, Some(Next::Lost(10)));
        assert_eq!(slow.next().await, Some(Next::Event(Arc::new(event(10)))));
    }

    #[test]
    fn the_ring_is_bounded() {
        let feed = Feed::default();
        (0..10_000).for_each(|n| feed.publish(event(n)));
        assert_eq!(feed.follow(usize::MAX).earlier.len(), RECENT);
    }
}
