//! How many connections a port of a pod takes at a time, in all and from one address.
//!
//! Invariant: a permit is counted until it is dropped, and an address without a permit is not remembered. `pod` asks for each connection
//! it accepts, `hbone_server` again for each tunnel.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What is left to take.
#[derive(Debug)]
pub(super) struct Budget {
    most: usize,
    most_of_one: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_source: HashMap<IpAddr, usize>,
}

/// One connection's place.
#[derive(Debug)]
pub(super) struct Permit {
    budget: Arc<Budget>,
    source: IpAddr,
}

impl Budget {
    /// At most `most` connections, of which one address may have `most_of_one`.
    pub fn new(most: usize, most_of_one: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            most_of_one,
            taken: Mutex::default(),
        })
    }

    /// A place for a connection from `source`, if there is one.
    pub fn take(self: &Arc<Self>, source: IpAddr) -> Option<Permit> {
        let mut taken = self.taken();
        let of_source = taken.by_source.get(&source).copied().unwrap_or_default();
        if taken.all >= self.most || of_source >= self.most_of_one {
            return None;
        }
        taken.all += 1;
        taken.by_source.insert(source, of_source + 1);
        Some(Permit {
            budget: Arc::clone(self),
            source,
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut taken = self.budget.taken();
        taken.all = taken.all.saturating_sub(1);
        if let Some(of_source) = taken.by_source.get_mut(&self.source) {
            *of_source = of_source.saturating_sub(1);
            if *of_source == 0 {
                taken.by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn one_address_gets_its_share_and_all_together_the_whole() {
        let budget = Budget::new(5, 2);
        let mut held: Vec<_> = [1, 1, 2, 2, 3]
            .map(|last| budget.take(address(last)).unwrap())
            .into();
        assert!(budget.take(address(4)).is_none(), "beyond the whole");
        held.pop();
        assert!(budget.take(address(1)).is_none(), "beyond the share");
        assert!(budget.take(address(4)).is_some());
    }

    #[test]
    fn what_ends_is_given_back_and_forgotten() {
        let budget = Budget::new(1, 1);
        for last in 0..200 {
            assert!(budget.take(address(last)).is_some());
        }
        assert_eq!(budget.taken().all, 0);
        assert!(budget.taken().by_source.is_empty());
    }
}
