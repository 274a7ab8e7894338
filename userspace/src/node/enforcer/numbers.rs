//! Numbers for names, as the kernel part knows them.

use std::{collections::HashMap, hash::Hash};

/// A number is never used for another name, and 0 names nothing.
pub struct Numbers<T> {
    numbers: HashMap<T, u32>,
    names: HashMap<u32, T>,
    next: u32,
}

impl<T: Hash + Eq + Clone> Numbers<T> {
    /// `first` is above every number that an earlier agent may have left in the tables.
    pub fn starting_at(first: u32) -> Self {
        Self {
            numbers: HashMap::new(),
            names: HashMap::new(),
            next: first.max(1),
        }
    }

    /// Goes on calling a name by the number that an earlier agent gave it, if both are free.
    pub fn inherit(&mut self, name: &T, number: u32) {
        let free = number != 0 && number < self.next && !self.names.contains_key(&number);
        if free && !self.numbers.contains_key(name) {
            self.numbers.insert(name.clone(), number);
            self.names.insert(number, name.clone());
        }
    }

    pub fn of(&mut self, name: &T) -> u32 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = self.next;
        self.next = self.next.saturating_add(1);
        self.numbers.insert(name.clone(), number);
        self.names.insert(number, name.clone());
        number
    }

    pub fn name(&self, number: u32) -> Option<&T> {
        self.names.get(&number)
    }

    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.numbers.retain(|name, _| keep(name));
        self.names.retain(|_, name| keep(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_never_used_for_another_name() {
        let mut numbers = Numbers::starting_at(0);
        let first = numbers.of(&"a");
        assert_ne!(first, 0);
        assert_eq!(numbers.of(&"a"), first);
        numbers.retain(|_| false);
        assert_eq!(numbers.name(first), None);
        assert_ne!(numbers.of(&"b"), first);
        assert_ne!(numbers.of(&"a"), first);
    }

    #[test]
    fn an_inherited_number_is_kept_but_never_shared() {
        let mut numbers = Numbers::starting_at(10);
        numbers.inherit(&"a", 3);
        numbers.inherit(&"b", 3);
        numbers.inherit(&"c", 0);
        numbers.inherit(&"d", 99);
        assert_eq!(numbers.of(&"a"), 3);
        for name in ["b", "c", "d"] {
            assert!(numbers.of(&name) >= 10);
        }
    }
}
