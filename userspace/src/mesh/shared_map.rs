//! A hash map whose clones share their parts: a mesh that changes is a clone of the one before, which others go on reading.
//!
//! Invariants: a change copies the one shard it touches and the list of shards, some square root of the whole each; the number of
//! shards is a power of two that follows the number of entries. Hashes are keyed, so that names from outside cannot be made to
//! collide. Used by `indexes`.

use std::borrow::Borrow;
use std::hash::{BuildHasher as _, Hash, RandomState};
use std::sync::Arc;

use hashbrown::HashTable;

/// Entries of a shard, on average, before there are twice as many shards. A table of 256 places holds 224.
const FULL: usize = 192;
/// Below this average there are half as many.
const SPARSE: usize = FULL / 8;

#[derive(Debug, Clone)]
pub struct SharedMap<K, V> {
    shards: Arc<[Arc<Shard<K, V>>]>,
    entries: usize,
    hasher: RandomState,
}

type Shard<K, V> = HashTable<(K, V)>;

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self {
            shards: Arc::default(),
            entries: 0,
            hasher: RandomState::new(),
        }
    }
}

impl<K, V> SharedMap<K, V> {
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// In no order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&K, &V)> {
        let shards = self.shards.iter();
        Counted {
            entries: shards.flat_map(|shard| shard.iter().map(|(key, value)| (key, value))),
            left: self.entries,
        }
    }

    /// In no order.
    pub fn values(&self) -> impl ExactSizeIterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Hash + Eq, V> SharedMap<K, V> {
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let hash = self.hasher.hash_one(key);
        let shard = self.shards.get(place(hash, self.shards.len()))?;
        let found = shard.find(hash, |(other, _)| other.borrow() == key)?;
        Some(&found.1)
    }

    pub fn contains_key<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }
}

impl<K: Hash + Eq + Clone, V: Clone> SharedMap<K, V> {
    /// Nothing is copied if the key is not there.
    pub fn get_mut<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        if !self.contains_key(key) {
            return None;
        }
        let hash = self.hasher.hash_one(key);
        let shard = own_shard(&mut self.shards, hash)?;
        let found = shard.find_mut(hash, |(other, _)| other.borrow() == key)?;
        Some(&mut found.1)
    }

    /// Puts a value in the place of the one with this key.
    pub fn insert(&mut self, key: K, value: V) {
        match self.get_mut(&key) {
            Some(place) => *place = value,
            None => self.add(key, value),
        }
    }

    /// The value of a key, which is there afterwards.
    pub fn or_default(&mut self, key: &K) -> &mut V
    where
        V: Default,
    {
        if !self.contains_key(key) {
            self.add(key.clone(), V::default());
        }
        #[expect(clippy::expect_used, reason = "it was added above")]
        self.get_mut(key).expect("present")
    }

    /// Takes an entry out; false if there is none.
    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        if !self.contains_key(key) {
            return false;
        }
        let hash = self.hasher.hash_one(key);
        let hasher = &self.hasher;
        let Some(shard) = own_shard(&mut self.shards, hash) else {
            return false;
        };
        let Ok(entry) = shard.find_entry(hash, |(other, _)| other.borrow() == key) else {
            return false;
        };
        entry.remove();
        if shard.capacity() > 4 * (shard.len() + 1) {
            shard.shrink_to_fit(|(key, _)| hasher.hash_one(key));
        }
        self.entries = self.entries.saturating_sub(1);
        if self.shards.len() > 1 && self.entries < self.shards.len() * SPARSE {
            self.reshard(self.shards.len() / 2);
        }
        true
    }

    /// The key is not there yet.
    fn add(&mut self, key: K, value: V) {
        if self.entries >= self.shards.len() * FULL {
            self.reshard((self.shards.len() * 2).max(1));
        }
        let hash = self.hasher.hash_one(&key);
        let hasher = &self.hasher;
        if let Some(shard) = own_shard(&mut self.shards, hash) {
            shard.insert_unique(hash, (key, value), |(key, _)| hasher.hash_one(key));
            self.entries += 1;
        }
    }

    /// Spreads all entries over so many shards; a power of two.
    fn reshard(&mut self, count: usize) {
        let mut shards: Vec<Shard<K, V>> = (0..count).map(|_| Shard::new()).collect();
        for entry in self.shards.iter().flat_map(|shard| shard.iter()) {
            let hash = self.hasher.hash_one(&entry.0);
            if let Some(shard) = shards.get_mut(place(hash, count)) {
                shard.insert_unique(hash, entry.clone(), |(key, _)| self.hasher.hash_one(key));
            }
        }
        self.shards = shards.into_iter().map(Arc::new).collect();
    }
}

/// Entries of which it is known how many there are.
struct Counted<I> {
    entries: I,
    left: usize,
}

impl<I: Iterator> Iterator for Counted<I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        let entry = self.entries.next()?;
        self.left = self.left.saturating_sub(1);
        Some(entry)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<I: Iterator> ExactSizeIterator for Counted<I> {}

/// Which of so many shards. A table uses the lowest and the highest bits of a hash for itself.
fn place(hash: u64, shards: usize) -> usize {
    (hash >> 24) as usize & shards.wrapping_sub(1)
}

/// The shard of a hash, no longer shared with a clone. None if there are no shards.
fn own_shard<K: Clone, V: Clone>(
    shards: &mut Arc<[Arc<Shard<K, V>>]>,
    hash: u64,
) -> Option<&mut Shard<K, V>> {
    let place = place(hash, shards.len());
    Arc::make_mut(shards).get_mut(place).map(Arc::make_mut)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn contents(map: &SharedMap<u16, u32>) -> HashMap<u16, u32> {
        map.iter().map(|(key, value)| (*key, *value)).collect()
    }

    proptest! {
        /// Against the standard map; what was cloned before stays as it was.
        #[test]
        fn a_map_and_its_clone_are_two(
            before in prop::collection::vec((0..2000_u16, any::<u32>()), 0..1500),
            after in prop::collection::vec((0..2000_u16, any::<Option<u32>>()), 0..1500),
        ) {
            let (mut map, mut model) = (SharedMap::default(), HashMap::new());
            for (key, value) in before {
                map.insert(key, value);
                model.insert(key, value);
            }
            let (clone, then) = (map.clone(), model.clone());
            for (key, value) in after {
                match value {
                    Some(value) => {
                        map.insert(key, value);
                        model.insert(key, value);
                    }
                    None => prop_assert_eq!(map.remove(&key), model.remove(&key).is_some()),
                }
                prop_assert_eq!(map.get(&key), model.get(&key));
                prop_assert_eq!(map.iter().len(), model.len());
            }
            prop_assert_eq!(contents(&map), model);
            prop_assert_eq!(contents(&clone), then);
        }
    }

    #[test]
    fn it_grows_and_shrinks_with_its_entries() {
        let mut map = SharedMap::default();
        for key in 0..100_000_u32 {
            map.insert(key, key);
        }
        assert!((256..=1024).contains(&map.shards.len()));
        assert!((0..100_000).all(|key| map.get(&key) == Some(&key)));
        for key in 10..100_000 {
            assert!(map.remove(&key));
        }
        assert_eq!((map.iter().len(), map.shards.len()), (10, 1));
        assert!(map.shards.iter().all(|shard| shard.capacity() < 64));
        *map.or_default(&7) += 1;
        assert_eq!(map.get(&7), Some(&8));
        assert_eq!(*map.or_default(&70), 0);
        assert!(!map.remove(&71));
    }

    #[test]
    fn a_change_copies_one_shard() {
        let mut map = SharedMap::default();
        for key in 0..10_000_u32 {
            map.insert(key, key);
        }
        let before = map.clone();
        map.insert(17, 0);
        let pairs = before.shards.iter().zip(map.shards.iter());
        let copied = pairs.filter(|(one, other)| !Arc::ptr_eq(one, other));
        assert_eq!(copied.count(), 1);
    }
}
