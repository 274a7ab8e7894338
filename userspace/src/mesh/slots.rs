//! From weights to slots of equal chance: the alias method, in whole numbers.
//!
//! Pure. Invariant: drawing a slot and then a random number of 32 bits finds each weight with its share, exact to 2^-32 per
//! slot. Called by `node` for the kernel part, which draws twice for each connection to a service.

/// One of a table's slots; each is drawn equally often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AliasSlot {
    /// Which of the weights it belongs to.
    pub own: usize,
    /// Its own weight is found where a random number is not above this.
    pub threshold: u32,
    /// The slot whose weight is found otherwise.
    pub alias: u32,
}

/// As many slots as there are weights that are not zero.
pub fn alias_table(weights: &[u32]) -> Vec<AliasSlot> {
    let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    let owners: Vec<usize> = weights
        .iter()
        .enumerate()
        .filter(|(_, weight)| **weight > 0)
        .map(|(own, _)| own)
        .collect();
    let mut slots: Vec<AliasSlot> = owners
        .iter()
        .zip(0..)
        .map(|(own, alias)| AliasSlot {
            own: *own,
            threshold: u32::MAX,
            alias,
        })
        .collect();
    // In units in which each slot holds `total`. All that is left at the end fills its slots exactly, because nothing is rounded
    // until a slot is written.
    let count = owners.len() as u128;
    let (mut small, mut large): (Vec<_>, Vec<_>) = owners
        .iter()
        .filter_map(|own| weights.get(*own))
        .map(|weight| u128::from(*weight) * count)
        .zip(0u32..)
        .partition(|(share, _)| *share < total);
    while let (Some((share, slot)), Some((rest, giver))) = (small.pop(), large.pop()) {
        if let Some(slot) = slots.get_mut(slot as usize) {
            slot.threshold = threshold(share, total);
            slot.alias = giver;
        }
        let rest = rest - (total - share);
        let list = if rest < total { &mut small } else { &mut large };
        list.push((rest, giver));
    }
    slots
}

/// The largest of the numbers that find the slot's own weight. At least one of them does: a share is never zero.
fn threshold(share: u128, total: u128) -> u32 {
    let numbers = ((share << 32) + total / 2)
        .checked_div(total)
        .unwrap_or_default();
    u32::try_from(numbers.saturating_sub(1)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// How often each weight is found.
    fn shares(weights: &[u32]) -> Vec<f64> {
        let slots = alias_table(weights);
        let mut shares = vec![0.0; weights.len()];
        for slot in &slots {
            let own = (f64::from(slot.threshold) + 1.0) / 2f64.powi(32);
            shares[slot.own] += own / slots.len() as f64;
            shares[slots[slot.alias as usize].own] += (1.0 - own) / slots.len() as f64;
        }
        shares
    }

    fn assert_shares(weights: &[u32]) {
        let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
        for (share, weight) in shares(weights).into_iter().zip(weights) {
            let expected = f64::from(*weight) / total;
            assert!(
                (share - expected).abs() < 1e-6,
                "{share} instead of {expected}"
            );
        }
    }

    #[test]
    fn one_weight_is_always_found() {
        for weight in [1, 7, u32::MAX] {
            let slot = AliasSlot {
                own: 0,
                threshold: u32::MAX,
                alias: 0,
            };
            assert_eq!(alias_table(&[weight]), [slot]);
        }
    }

    #[test]
    fn equal_weights_need_no_alias() {
        let slots = alias_table(&[5; 100]);
        assert_eq!(slots.len(), 100);
        assert!(slots.iter().all(|slot| slot.threshold == u32::MAX));
    }

    #[test]
    fn a_weight_of_zero_is_never_found() {
        assert_eq!(alias_table(&[]), []);
        assert_eq!(alias_table(&[0, 0]), []);
        let slots = alias_table(&[0, 3, 0, 1, 0]);
        assert_eq!(slots.len(), 2);
        assert!(slots.iter().all(|slot| slot.own % 2 == 1));
        assert_shares(&[0, 3, 0, 1, 0]);
    }

    #[test]
    fn the_smallest_weight_beside_the_largest_is_still_found() {
        let slots = alias_table(&[1, u32::MAX]);
        assert_eq!(slots[0].own, 0);
        assert_eq!(
            slots[0].threshold, 1,
            "two of 2^32 numbers of half of the slots"
        );
        assert_shares(&[1, u32::MAX]);
    }

    #[test]
    fn many_of_the_largest_weights_do_not_overflow() {
        assert_shares(&vec![u32::MAX; 4096]);
        let mut mixed = vec![u32::MAX; 4095];
        mixed.push(1);
        assert_shares(&mixed);
    }

    fn weight() -> impl Strategy<Value = u32> {
        prop_oneof![Just(0), Just(1), 0..100u32, any::<u32>(), Just(u32::MAX)]
    }

    proptest! {
        #[test]
        fn every_weight_has_its_share(weights in prop::collection::vec(weight(), 1..300)) {
            if weights.iter().any(|weight| *weight > 0) {
                assert_shares(&weights);
            }
        }

        #[test]
        fn every_alias_is_a_slot(weights in prop::collection::vec(weight(), 0..300)) {
            let slots = alias_table(&weights);
            prop_assert!(slots.iter().all(|slot| (slot.alias as usize) < slots.len() && weights[slot.own] > 0));
        }
    }
}
