//! How long `client` waits before it connects again, as other clients of this control plane do. Pure: it is told how long connections lasted.

use std::time::Duration;

const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// A connection that lasted so long was a good one: the next attempt is the first again.
const GOOD: Duration = Duration::from_secs(30);

/// The waits between connections: each twice as long as the one before, up to the longest.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    /// Before the first connection.
    pub fn new() -> Self {
        Self { next: FIRST_WAIT }
    }

    /// The wait after a connection, or an attempt to make one, that lasted so long.
    pub fn after(&mut self, lasted: Duration) -> Duration {
        if lasted >= GOOD {
            self.next = FIRST_WAIT;
        }
        let wait = self.next;
        self.next = wait.saturating_mul(2).min(LONGEST_WAIT);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIEF: Duration = Duration::from_millis(29_999);

    fn waits(backoff: &mut Backoff, count: usize) -> Vec<u128> {
        let waits = (0..count).map(|_| backoff.after(BRIEF).as_millis());
        waits.collect()
    }

    #[test]
    fn each_wait_is_twice_the_one_before_up_to_the_longest() {
        let waits = waits(&mut Backoff::new(), 14);
        let doubled = [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240];
        assert_eq!(waits[..11], doubled);
        assert_eq!(waits[11..], [15_000; 3]);
    }

    #[test]
    fn after_a_good_connection_the_waits_begin_anew() {
        let mut backoff = Backoff::new();
        waits(&mut backoff, 14);
        assert_eq!(backoff.after(GOOD), FIRST_WAIT);
        assert_eq!(waits(&mut backoff, 3), [20, 40, 80]);
        assert_eq!(backoff.after(GOOD * 2), FIRST_WAIT);
        assert_eq!(backoff.after(GOOD), FIRST_WAIT);
    }
}
