//! Since when a pod's policies are attached: for direct flows that are to be left alone by those that came later. Nothing is remembered over
//! a restart of the agent: whatever is attached then has always been.

use std::{collections::HashMap, sync::Arc};

use crate::policy::PolicyName;

/// The moments, in nanoseconds of the boot's monotonic clock, at which policies were attached to a workload that had been known. Clones
/// share what does not change.
#[derive(Clone, Debug, Default)]
pub struct Attached(Arc<HashMap<PolicyName, u64>>);

impl Attached {
    /// Notes what a workload lists now that listed `before`.
    pub fn change(&mut self, before: &[PolicyName], now: &[PolicyName], at: u64) {
        let since = now.iter().filter_map(|name| match before.contains(name) {
            true => Some((name.clone(), *self.0.get(name)?)),
            false => Some((name.clone(), at)),
        });
        let since: HashMap<_, _> = since.collect();
        if since != *self.0 {
            self.0 = Arc::new(since);
        }
    }

    /// Whether any came later than another.
    pub fn differ(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether a policy was attached when a flow was opened.
    pub fn counts(&self, policy: &PolicyName, opened: u64) -> bool {
        self.0.get(policy).is_none_or(|since| *since <= opened)
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
        attached.change(&first, &both, 10);
        assert!(attached.differ());
        // Another change leaves what is attached as it is.
        attached.change(&both, &both, 20);
        let counts = |opened| {
            both.iter()
                .map(|name| attached.counts(name, opened))
                .collect()
        };
        let counts: [Vec<bool>; 3] = [9, 10, 30].map(counts);
        assert_eq!(counts, [[true, false], [true, true], [true, true]]);
    }

    #[test]
    fn a_policy_that_comes_back_is_attached_anew_and_one_that_is_gone_is_forgotten() {
        let one = names(&["ns/one"]);
        let mut attached = Attached::default();
        attached.change(&[], &one, 10);
        attached.change(&one, &[], 20);
        assert!(!attached.differ());
        attached.change(&[], &one, 30);
        assert!(!attached.counts(&one[0], 15));
    }
}
