//! Connections one after the other at a steady pace until standard input ends, judged by what the test expects at that time: for
//! tests that change a mesh under load. Every byte is compared.
//!
//! Invariant: a connection is judged only if the same was expected from its beginning to its end; all others are counted apart.

use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use serde_json::json;

use crate::pattern::Pattern;
use crate::report;

/// No step waits longer than this.
const STEP: Duration = Duration::from_secs(10);
/// What goes wrong is told one by one so many times.
const MOST_TOLD: u64 = 32;

#[derive(clap::Args)]
pub struct Paced {
    /// Server address (server: echo)
    #[arg(long)]
    to: SocketAddr,
    /// Milliseconds from the beginning of one connection to that of the next, at least
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    every_ms: u64,
    /// Bytes there and back on each
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(8..=65536))]
    size: u32,
    /// What is expected until a line on standard input says another
    #[arg(long, value_enum)]
    expect: Expected,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Expected {
    /// Every connection succeeds
    Allow,
    /// None does
    Deny,
    /// Either may be
    Unsure,
}

impl Expected {
    fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Unsure => "unsure",
        }
    }
}

/// What is expected since when, and what has come of all connections.
struct State {
    expected: Expected,
    /// Counts the changes of that.
    since: u64,
    allowed: u64,
    denied: u64,
    unjudged: u64,
    failures: u64,
    admitted: u64,
}

/// Where a connection failed, and whether the server's word came back before.
struct Failure {
    step: &'static str,
    error: io::Error,
    answered: bool,
}

struct Shared(Mutex<State>);

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, event: &str) {
        let state = self.state();
        report::line(&json!({
            "event": event,
            "expected": state.expected.name(),
            "allowed": state.allowed,
            "denied": state.denied,
            "unjudged": state.unjudged,
            "failures": state.failures,
            "admitted": state.admitted,
        }));
    }

    /// Judges a connection that began when `since` was the count.
    fn judge(&self, since: u64, outcome: Result<(), Failure>) {
        let mut state = self.state();
        if state.since != since {
            state.unjudged += 1;
            return;
        }
        let word = match (state.expected, &outcome) {
            (Expected::Unsure, _) => {
                state.unjudged += 1;
                return;
            }
            (Expected::Allow, Ok(())) => {
                state.allowed += 1;
                return;
            }
            (Expected::Allow, Err(_)) => {
                state.failures += 1;
                "failed"
            }
            // Data that came back passed the server, also if the rest was cut.
            (Expected::Deny, Err(failure)) if !failure.answered => {
                state.denied += 1;
                return;
            }
            (Expected::Deny, _) => {
                state.admitted += 1;
                "admitted"
            }
        };
        let told = state.failures + state.admitted <= MOST_TOLD;
        drop(state);
        if told {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let failure = outcome.err();
            report::line(&json!({
                "event": word,
                "at_ms": now.unwrap_or_default().as_millis(),
                "step": failure.as_ref().map(|failure| failure.step),
                "error": failure.as_ref().map(|failure| report::name(&failure.error)),
            }));
        }
    }
}

pub fn paced(arguments: &Paced) -> anyhow::Result<()> {
    let shared = Shared(Mutex::new(State {
        expected: arguments.expect,
        since: 0,
        allowed: 0,
        denied: 0,
        unjudged: 0,
        failures: 0,
        admitted: 0,
    }));
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let judged = &shared;
        scope.spawn(move || connect(arguments, judged, &stopped));
        shared.report("open");
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            match Expected::from_str(line.trim(), false) {
                Ok(expected) => {
                    let mut state = shared.state();
                    state.expected = expected;
                    state.since += 1;
                    drop(state);
                    shared.report("expects");
                }
                Err(error) => eprintln!("`{line}`: {error}"),
            }
        }
        drop(stop);
    });
    shared.report("done");
    Ok(())
}

/// Until the other end of `stopped` is gone.
fn connect(arguments: &Paced, shared: &Shared, stopped: &std::sync::mpsc::Receiver<()>) {
    let size = usize::try_from(arguments.size).unwrap_or(2048);
    let (mut sent, mut got) = (vec![0; size], Vec::with_capacity(size));
    let mut pattern = Pattern::new(u64::from(std::process::id()));
    let pace = Duration::from_millis(arguments.every_ms);
    loop {
        let began = Instant::now();
        let since = shared.state().since;
        pattern.fill(&mut sent);
        shared.judge(since, once(arguments.to, &sent, &mut got));
        let left = pace.saturating_sub(began.elapsed());
        if stopped.recv_timeout(left) != Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            return;
        }
    }
}

/// Sends everything, says that this was all, and reads to the end.
fn once(to: SocketAddr, sent: &[u8], got: &mut Vec<u8>) -> Result<(), Failure> {
    got.clear();
    let failed = |step| {
        move |error| Failure {
            step,
            error,
            answered: false,
        }
    };
    let mut stream = TcpStream::connect_timeout(&to, STEP).map_err(failed("connect"))?;
    let set = stream
        .set_nodelay(true)
        .and_then(|()| stream.set_read_timeout(Some(STEP)))
        .and_then(|()| stream.set_write_timeout(Some(STEP)));
    set.map_err(failed("set"))?;
    stream.write_all(sent).map_err(failed("send"))?;
    stream
        .shutdown(Shutdown::Write)
        .map_err(failed("half-close"))?;
    let read = stream.read_to_end(got);
    let answered = !got.is_empty();
    read.map_err(|error| Failure {
        step: "read",
        error,
        answered,
    })?;
    if got == sent {
        return Ok(());
    }
    let error = match got.len() < sent.len() {
        true => io::ErrorKind::UnexpectedEof,
        false => io::ErrorKind::InvalidData,
    };
    Err(Failure {
        step: "compare",
        error: error.into(),
        answered,
    })
}
