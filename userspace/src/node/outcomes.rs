//! Why flows that were worth a short-circuit were not given one. Written when that is decided, read while they are open and taken
//! at their end, which the kernel tells on another way.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::kernel::FlowName;

/// Flows remembered at most.
const MOST: usize = 65_536;

/// The reasons by flow.
#[derive(Debug, Default)]
pub struct Outcomes(Mutex<HashMap<FlowName, &'static str>>);

impl Outcomes {
    /// Remembers a flow. Where there is no more room, flows that `is_open` denies are forgotten: their end was told before. If that
    /// is not enough, so are all.
    pub fn note(&self, flow: FlowName, reason: &'static str, is_open: impl Fn(&FlowName) -> bool) {
        if self.lock().len() >= MOST {
            self.make_room(is_open);
        }
        self.lock().insert(flow, reason);
    }

    fn make_room(&self, is_open: impl Fn(&FlowName) -> bool) {
        // Not under the lock: the kernel is asked about each.
        let known: Vec<_> = self.lock().keys().copied().collect();
        let ended: Vec<_> = known.into_iter().filter(|flow| !is_open(flow)).collect();
        let mut kept = self.lock();
        for flow in &ended {
            kept.remove(flow);
        }
        // Asking about all of them again for each flow would cost more than they are worth.
        if kept.len() > MOST / 2 {
            kept.clear();
        }
    }

    /// The reason, if there is one.
    pub fn of(&self, flow: &FlowName) -> Option<&'static str> {
        self.lock().get(flow).copied()
    }

    /// The same of a flow that has ended.
    pub fn take(&self, flow: &FlowName) -> Option<&'static str> {
        self.lock().remove(flow)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<FlowName, &'static str>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use culvert_abi::FlowKey;

    use super::*;

    fn flow(sequence: u32) -> FlowName {
        let key = FlowKey {
            netns_cookie: 1,
            client: [0; 16],
            server: [0; 16],
            client_port: 1,
            server_port: 2,
            padding: 0,
        };
        (key, sequence)
    }

    fn full(is_open: impl Fn(&FlowName) -> bool) -> Outcomes {
        let outcomes = Outcomes::default();
        for sequence in 0..=MOST as u32 {
            outcomes.note(flow(sequence), "blocking", &is_open);
        }
        outcomes
    }

    #[test]
    fn an_outcome_is_told_until_it_is_taken() {
        let outcomes = Outcomes::default();
        outcomes.note(flow(1), "blocking", |_| true);
        assert_eq!(outcomes.of(&flow(1)), Some("blocking"));
        assert_eq!(outcomes.take(&flow(1)), Some("blocking"));
        assert_eq!(outcomes.of(&flow(1)), None);
    }

    #[test]
    fn open_flows_outlast_those_whose_end_nobody_took() {
        let outcomes = full(|(_, sequence)| *sequence < 10);
        assert_eq!(outcomes.lock().len(), 11);
        assert_eq!(outcomes.of(&flow(9)), Some("blocking"));
    }

    #[test]
    fn when_too_many_are_open_all_but_the_newest_are_forgotten() {
        let outcomes = full(|_| true);
        assert_eq!(outcomes.lock().len(), 1);
    }
}
