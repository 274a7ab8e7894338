//! Waiting for what nobody announces. Everything else in the harness waits on an event; this polls.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::patience::stretch;

const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

thread_local! {
    static IN_VAIN: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread has waited for something that did not come: then its test most likely fails, and logs are wanted.
pub(crate) fn was_in_vain() -> bool {
    IN_VAIN.get()
}

/// Calls `probe` until it returns `Some`, with pauses that grow from 1 ms to 50 ms. An error ends the wait at once;
/// `what` names the awaited thing in the error that the timeout gives.
pub fn wait_until<T>(
    timeout: Duration,
    what: &str,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let timeout = stretch(timeout);
    let deadline = Instant::now() + timeout;
    let mut pause = FIRST_PAUSE;
    loop {
        if let Some(found) = probe()? {
            return Ok(found);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            IN_VAIN.set(true);
            bail!("waited {timeout:?} in vain for {what}");
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_in_vain_is_remembered_by_its_thread_alone() {
        let waited = std::thread::spawn(|| {
            let found = wait_until(Duration::ZERO, "nothing", || Ok(None::<()>));
            (found.is_err(), was_in_vain())
        });
        assert_eq!(waited.join().unwrap(), (true, true));
        assert!(!was_in_vain());
    }
}
