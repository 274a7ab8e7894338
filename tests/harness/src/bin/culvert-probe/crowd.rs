//! Many connections at once, and connections one after the other, both until standard input ends: for what happens to an
//! agent meanwhile. Every byte is compared.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;

use crate::pattern::Pattern;
use crate::report;

/// No step waits longer than this.
const STEP: Duration = Duration::from_secs(30);
/// Failures that are named one by one.
const MOST_NAMED: usize = 16;

#[derive(clap::Args)]
pub struct Crowd {
    /// Server address (server: echo)
    #[arg(long)]
    to: SocketAddr,
    /// Connections at once
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..=4000))]
    connections: u16,
    /// Threads that share them
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// Bytes of one exchange
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(8..=65536))]
    size: u32,
    /// Milliseconds that each thread waits after a turn of its connections
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=10_000))]
    pause_ms: u64,
}

#[derive(clap::Args)]
pub struct Churn {
    /// Server address (server: echo)
    #[arg(long)]
    to: SocketAddr,
    /// Threads that connect
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
}

/// What all threads count.
#[derive(Default)]
struct Tally {
    done: AtomicU64,
    bytes: AtomicU64,
    lost: AtomicU64,
    failures: AtomicU64,
    named: Mutex<Vec<String>>,
}

impl Tally {
    fn fail(&self, step: &str, error: &io::Error) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if named.len() < MOST_NAMED {
            named.push(format!("{step}: {}", report::name(error)));
        }
    }

    fn report(&self, event: &str) {
        let named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        report::line(&json!({
            "event": event,
            "count": self.done.load(Ordering::Relaxed),
            "bytes": self.bytes.load(Ordering::Relaxed),
            "lost": self.lost.load(Ordering::Relaxed),
            "failures": self.failures.load(Ordering::Relaxed),
            "named": *named,
        }));
    }
}

/// One connection of a crowd.
struct Member {
    stream: TcpStream,
    pattern: Pattern,
}

impl Member {
    fn open(to: SocketAddr, seed: u64) -> io::Result<Self> {
        Ok(Self {
            stream: open(to)?,
            pattern: Pattern::new(seed),
        })
    }

    /// Sends the next bytes of the pattern and compares what comes back.
    fn exchange(&mut self, sent: &mut [u8], got: &mut [u8], tally: &Tally) -> io::Result<()> {
        self.pattern.fill(sent);
        self.stream.write_all(sent)?;
        self.stream.read_exact(got)?;
        tally.done.fetch_add(1, Ordering::Relaxed);
        tally.bytes.fetch_add(sent.len() as u64, Ordering::Relaxed);
        let lost = sent.iter().zip(got.iter()).filter(|(a, b)| a != b).count();
        tally.lost.fetch_add(lost as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Ends in order: nothing more may come.
    fn end(mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)?;
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest)? {
            0 => Ok(()),
            more => Err(io::Error::other(format!("{more} bytes too many"))),
        }
    }
}

pub fn crowd(arguments: &Crowd) -> anyhow::Result<()> {
    let tally = Tally::default();
    let stop = AtomicBool::new(false);
    let open = Barrier::new(usize::from(arguments.threads) + 1);
    std::thread::scope(|scope| {
        for thread in 0..arguments.threads {
            let (tally, stop, open) = (&tally, &stop, &open);
            scope.spawn(move || share(arguments, thread, tally, stop, open));
        }
        open.wait();
        tally.report("open");
        wait_for_end();
        stop.store(true, Ordering::Relaxed);
    });
    tally.report("done");
    Ok(())
}

/// One thread's connections, in turn.
fn share(arguments: &Crowd, thread: u16, tally: &Tally, stop: &AtomicBool, open: &Barrier) {
    let size = usize::try_from(arguments.size).unwrap_or(512);
    let (mut sent, mut got) = (vec![0; size], vec![0; size]);
    let mut members = Vec::new();
    for number in (thread..arguments.connections).step_by(usize::from(arguments.threads)) {
        let begun = Member::open(arguments.to, u64::from(number) + 1).and_then(|mut member| {
            member.exchange(&mut sent, &mut got, tally)?;
            Ok(member)
        });
        match begun {
            Ok(member) => members.push(member),
            Err(error) => tally.fail("open", &error),
        }
    }
    open.wait();
    while !stop.load(Ordering::Relaxed) && !members.is_empty() {
        members.retain_mut(|member| {
            let outcome = member.exchange(&mut sent, &mut got, tally);
            outcome
                .map_err(|error| tally.fail("exchange", &error))
                .is_ok()
        });
        std::thread::sleep(Duration::from_millis(arguments.pause_ms));
    }
    for member in members {
        if let Err(error) = member.end() {
            tally.fail("end", &error);
        }
    }
}

pub fn churn(arguments: &Churn) -> anyhow::Result<()> {
    let tally = Tally::default();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    match once(arguments.to) {
                        Ok(()) => {
                            tally.done.fetch_add(1, Ordering::Relaxed);
                        }
                        Err((step, error)) => tally.fail(step, &error),
                    }
                }
            });
        }
        tally.report("open");
        wait_for_end();
        stop.store(true, Ordering::Relaxed);
    });
    tally.report("done");
    Ok(())
}

/// Connects, exchanges a byte, and ends without keeping the port.
fn once(to: SocketAddr) -> Result<(), (&'static str, io::Error)> {
    let mut stream = open(to).map_err(|error| ("connect", error))?;
    let mut byte = [b'c'];
    stream.write_all(&byte).map_err(|error| ("send", error))?;
    stream
        .read_exact(&mut byte)
        .map_err(|error| ("read", error))?;
    // A reset at the end, so that the port is free again at once.
    socket2::SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .map_err(|error| ("close", error))
}

fn open(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, STEP)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    Ok(stream)
}

fn wait_for_end() {
    let mut rest = [0; 64];
    while io::stdin().read(&mut rest).is_ok_and(|length| length > 0) {}
}
