//! Who asked for whom: the pairs that verdicts were given for, so that they are given again before the next connection
//! asks, and so that no pod's share of the table grows beyond its bound.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
};

use culvert_abi::VerdictKey;

use crate::{kernel::NetnsCookie, policy::Identity};

/// Verdicts that are kept on behalf of one pod: with 250 pods, Kubernetes' usual bound being 110, the table is not full.
pub const PER_POD: usize = 1024;

/// A pair, as policy sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub source: Source,
    pub destination: SocketAddr,
    /// What was decided last: one of `culvert_abi::action`.
    pub action: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Identity(Identity),
    /// Policies of the destination look at addresses.
    Pod(NetnsCookie),
}

#[derive(Debug, Default)]
pub struct Pairs {
    known: HashMap<VerdictKey, (NetnsCookie, Pair)>,
    /// By the pod that asked first, in the order of asking.
    of_pod: HashMap<NetnsCookie, VecDeque<VerdictKey>>,
}

impl Pairs {
    /// Notes a pair at the expense of `asker`; returns what has to make room for it.
    pub fn remember(
        &mut self,
        asker: NetnsCookie,
        key: VerdictKey,
        pair: Pair,
    ) -> Option<VerdictKey> {
        if let Some((_, known)) = self.known.get_mut(&key) {
            *known = pair;
            return None;
        }
        self.known.insert(key, (asker, pair));
        let own = self.of_pod.entry(asker).or_default();
        own.push_back(key);
        if own.len() <= PER_POD {
            return None;
        }
        let oldest = own.pop_front()?;
        self.known.remove(&oldest);
        Some(oldest)
    }

    /// The pairs whose destination has one of these addresses.
    pub fn towards(
        &self,
        mut is_wanted: impl FnMut(SocketAddr) -> bool,
    ) -> Vec<(NetnsCookie, Pair)> {
        self.known
            .values()
            .filter(|(_, pair)| is_wanted(pair.destination))
            .cloned()
            .collect()
    }

    /// Forgets the pairs that `is_gone` names, and returns under which keys they were kept.
    pub fn forget(
        &mut self,
        mut is_gone: impl FnMut(NetnsCookie, &Pair) -> bool,
    ) -> Vec<VerdictKey> {
        let gone = self
            .known
            .extract_if(|_, (asker, pair)| is_gone(*asker, pair));
        let gone = gone.map(|(key, _)| key).collect();
        let known = &self.known;
        self.of_pod.retain(|_, keys| {
            keys.retain(|key| known.contains_key(key));
            !keys.is_empty()
        });
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(source: u32, port: u16) -> VerdictKey {
        VerdictKey {
            source,
            workload: 1,
            port,
            scope: culvert_abi::scope::IDENTITY,
            padding: 0,
        }
    }

    fn pair(port: u16) -> Pair {
        Pair {
            source: Source::Pod(NetnsCookie(1)),
            destination: SocketAddr::new([10, 0, 0, 1].into(), port),
            action: culvert_abi::action::DENY,
        }
    }

    #[test]
    fn a_pod_that_asks_for_everything_loses_only_its_own() {
        let mut pairs = Pairs::default();
        let (quiet, loud) = (NetnsCookie(1), NetnsCookie(2));
        assert_eq!(pairs.remember(quiet, key(1, 80), pair(80)), None);
        let mut evicted = Vec::new();
        for port in 1..=u16::MAX {
            evicted.extend(pairs.remember(loud, key(2, port), pair(port)));
        }
        assert_eq!(evicted.len(), usize::from(u16::MAX) - PER_POD);
        assert!(evicted.iter().all(|key| key.source == 2));
        assert_eq!(pairs.towards(|_| true).len(), PER_POD + 1);
    }

    #[test]
    fn what_is_forgotten_makes_room() {
        let mut pairs = Pairs::default();
        let pod = NetnsCookie(1);
        for port in 1..=PER_POD as u16 {
            assert_eq!(pairs.remember(pod, key(1, port), pair(port)), None);
        }
        let gone = pairs.forget(|_, pair| pair.destination.port() <= 10);
        assert_eq!(gone.len(), 10);
        for port in 2001..=2010 {
            assert_eq!(pairs.remember(pod, key(1, port), pair(port)), None);
        }
        assert!(pairs.remember(pod, key(1, 3000), pair(3000)).is_some());
    }
}
