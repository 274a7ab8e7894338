//! What a program prints, line by line, readable while it runs. Filled by `process`, one thread per stream; waiting is
//! on a condition variable. Memory is bounded: the oldest lines go first, and positions stay valid.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::patience::stretch;

const MOST_BYTES: usize = 64 << 20;
/// A longer line is cut into several.
const LONGEST_LINE: u64 = 1 << 20;
/// How much of a log an error shows.
const TAIL: usize = 30;

/// Which of the two streams a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// One line, without its end.
#[derive(Clone, Debug)]
pub struct Line {
    /// Where it was printed.
    pub stream: Stream,
    /// What was printed; bytes that are not UTF-8 are replaced.
    pub text: String,
}

/// A position in a log, to wait for what comes after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

/// The log of one program.
#[derive(Clone, Debug, Default)]
pub struct Log {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Line>,
    bytes: usize,
    /// Lines that had to go, which came before those in `lines`.
    dropped: u64,
    open: usize,
}

impl Log {
    /// Reads `source` to its end on a thread of its own.
    pub(crate) fn follow(&self, stream: Stream, source: impl Read + Send + 'static) {
        self.state().open += 1;
        let log = self.clone();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(source);
            let mut buffer = Vec::new();
            while matches!(
                reader
                    .by_ref()
                    .take(LONGEST_LINE)
                    .read_until(b'\n', &mut buffer),
                Ok(1..)
            ) {
                let text = String::from_utf8_lossy(&buffer)
                    .trim_end_matches(['\n', '\r'])
                    .to_owned();
                log.push(Line { stream, text });
                buffer.clear();
            }
            log.state().open -= 1;
            log.shared.changed.notify_all();
        });
    }

    fn push(&self, line: Line) {
        let mut state = self.state();
        state.bytes += line.text.len();
        state.lines.push_back(line);
        while state.bytes > MOST_BYTES {
            let Some(oldest) = state.lines.pop_front() else {
                break;
            };
            state.bytes -= oldest.text.len();
            state.dropped += 1;
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// All lines so far.
    pub fn lines(&self) -> Vec<Line> {
        self.state().lines.iter().cloned().collect()
    }

    /// All of one stream so far, as text.
    pub fn text(&self, stream: Stream) -> String {
        let state = self.state();
        state
            .lines
            .iter()
            .filter(|line| line.stream == stream)
            .flat_map(|line| [line.text.as_str(), "\n"])
            .collect()
    }

    /// Whether a line so far contains `needle`.
    pub fn contains(&self, needle: &str) -> bool {
        self.state()
            .lines
            .iter()
            .any(|line| line.text.contains(needle))
    }

    /// The end of the log as it is now.
    pub fn mark(&self) -> Mark {
        let state = self.state();
        Mark(state.dropped + state.lines.len() as u64)
    }

    /// The last lines, for error messages.
    pub fn tail(&self) -> String {
        let state = self.state();
        let skipped = state.lines.len().saturating_sub(TAIL);
        state
            .lines
            .iter()
            .skip(skipped)
            .flat_map(|line| ["    ", line.text.as_str(), "\n"])
            .collect()
    }

    /// Waits for the first line after `from` that `pick` accepts. Fails at the timeout, and at once when both streams have
    /// ended without it. `what` names the line in the error.
    pub fn wait_for<T>(
        &self,
        from: Mark,
        timeout: Duration,
        what: &str,
        mut pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T> {
        let timeout = stretch(timeout);
        let deadline = Instant::now() + timeout;
        let mut next = from.0;
        let mut state = self.state();
        loop {
            let seen = usize::try_from(next.saturating_sub(state.dropped)).unwrap_or(usize::MAX);
            if let Some(found) = state.lines.iter().skip(seen).find_map(&mut pick) {
                return Ok(found);
            }
            next = next.max(state.dropped + state.lines.len() as u64);
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = state.open == 0;
            if ended || left.is_zero() {
                drop(state);
                let why = if ended {
                    "the program's output ended"
                } else {
                    "the time ran out"
                };
                bail!(
                    "{why} before {what} was printed ({timeout:?} given); the log's end:\n{}",
                    self.tail()
                );
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until both streams have ended. False if a grandchild still holds one at the timeout.
    pub(crate) fn wait_end(&self, timeout: Duration) -> bool {
        let waiting = |state: &mut State| state.open > 0;
        let outcome = self
            .shared
            .changed
            .wait_timeout_while(self.state(), timeout, waiting);
        outcome.unwrap_or_else(PoisonError::into_inner).0.open == 0
    }
}
