//! Since when a pod's policies are attached: for direct flows that are to be left alone by those that came later. Nothing is remembered over
//! a restart of the agent: whatever is attached then has always been.

use std::{collections::HashMap, sync::Arc};

use crate::policy::PolicyName;

/// Of how many policies that are detached it is remembered that they were attached; more of them are forgotten.
const MOST_DETACHED: usize = 4096;

/// The moments, in nanoseconds of the boot's monotonic clock, at which policies were first attached to a workload; 0 is always. One that
/// was detached and comes back counts as if it had never gone. Clones share what does not change.
#[derive(Clone, Debug, Default)]
pub struct Attached(Arc<HashMap<PolicyName, u64>>);

impl Attached {
    /// Notes what a workload lists now that listed `before`.
    pub fn change(&mut self, before: &[PolicyName], now: &[PolicyName], at: u64) {
        if before == now {
            return;
        }
        let first = Arc::make_mut(&mut self.0);
        for name in before {
            first.entry(name.clone()).or_insert(0);
        }
        for name in now {
            first.entry(name.clone()).or_insert(at);
        }
        if first.len() > now.len().saturating_add(MOST_DETACHED) {
            first.retain(|name, _| now.contains(name));
        }
    }

    /// Whether there are flows for which it makes a difference.
    pub fn differ(&self) -> bool {
        self.0.values().any(|first| *first > 0)
    }

    /// Whether a policy was attached before a flow was opened.
    pub fn counts(&self, policy: &PolicyName, opened: u64) -> bool {
        self.0.get(policy).is_none_or(|first| *first <= opened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<PolicyName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn a_policy_counts_for_flows_that_were_opened_after_it_was_attached() {
        let (first, both) = (names(&["ns/first"]), names(&["ns/first", "ns/second"]));
        let mut attached = Attached::default();
        attached.change(&first, &first, 5);
        assert!(!attached.differ());
        attached.change(&first, &both, 10);
        assert!(attached.differ());
        // Another change leaves what is attached as it is.
        attached.change(&both, &both, 20);
        let counts = [9, 10, 30].map(|opened| {
            let each = both.iter().map(|name| attached.counts(name, opened));
            each.collect::<Vec<_>>()
        });
        assert_eq!(counts, [[true, false], [true, true], [true, true]]);
    }

    #[test]
    fn a_policy_that_comes_back_spares_only_what_it_spared_before() {
        let (old, new) = (names(&["ns/old"]), names(&["ns/new"]));
        let mut attached = Attached::default();
        attached.change(&old, &new, 10);
        attached.change(&new, &[], 20);
        attached.change(&[], &[old.clone(), new.clone()].concat(), 30);
        assert!(attached.counts(&old[0], 5));
        assert_eq!(
            [5, 15].map(|at| attached.counts(&new[0], at)),
            [false, true]
        );
    }

    #[test]
    fn what_is_detached_is_not_remembered_without_end() {
        let mut attached = Attached::default();
        let mut before = Vec::new();
        for number in 0..2 * MOST_DETACHED as u64 {
            let now = names(&[&format!("ns/p{number}")]);
            attached.change(&before, &now, number);
            before = now;
        }
        assert!(attached.0.len() <= MOST_DETACHED + 1);
    }
}
