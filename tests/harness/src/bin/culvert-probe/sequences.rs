//! Random sequences of socket calls at both ends of one connection, and what came of them. One program has both sockets, one in the
//! namespace it runs in and one in another's, and whatever may differ from run to run is not said: with the same seed two runs say the
//! same, whatever carries the bytes.

mod calls;
mod threads;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use crate::pattern::Pattern;
use crate::report;

#[derive(clap::Args)]
pub struct Sequences {
    /// The other end's address and port
    #[arg(long)]
    to: SocketAddr,
    /// The other end's network namespace
    #[arg(long)]
    netns: PathBuf,
    /// Which sequences
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The number of the first
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// How many
    #[arg(long)]
    count: u64,
    /// Calls in each that makes one at a time
    #[arg(long, default_value_t = 40)]
    calls: u32,
}

pub fn sequences(arguments: &Sequences) -> anyhow::Result<()> {
    let listener = crate::serve::listen_in(&arguments.netns, arguments.to)?;
    for number in arguments.first..arguments.first.saturating_add(arguments.count) {
        let said = sequence(arguments, &listener, number)
            .with_context(|| format!("sequence {number} of seed {}", arguments.seed))?;
        report::line(&json!({"sequence": number, "said": said}));
    }
    report::line(&json!({"event": "done"}));
    Ok(())
}

fn sequence(
    arguments: &Sequences,
    listener: &TcpListener,
    number: u64,
) -> anyhow::Result<Vec<String>> {
    let mut dice = Dice::new(arguments.seed, number);
    let client = TcpStream::connect(arguments.to)?;
    let (server, _) = listener.accept()?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    if dice.below(4) == 0 {
        threads::run([client, server], &mut dice)
    } else {
        calls::run([client, server], arguments.calls as usize, &mut dice)
    }
}

/// Random numbers of a seed.
struct Dice(Pattern);

impl Dice {
    fn new(seed: u64, number: u64) -> Self {
        let mut first = [0; 8];
        Pattern::new(seed).fill(&mut first);
        Self(Pattern::new(
            u64::from_le_bytes(first) ^ number.rotate_left(32),
        ))
    }

    fn below(&mut self, end: usize) -> usize {
        let mut word = [0; 8];
        self.0.fill(&mut word);
        let word = u64::from_le_bytes(word);
        usize::try_from(word % end.max(1) as u64).unwrap_or_default()
    }

    /// How many bytes are sent or read: as often few as many.
    fn size(&mut self) -> usize {
        match self.below(4) {
            0 => 1,
            1 => 1 + self.below(100),
            2 => 1 + self.below(5_000),
            _ => 1 + self.below(40_000),
        }
    }

    /// Time for whatever happens beside; seldom as much as it takes to be short-circuited.
    fn pause(&mut self) -> Duration {
        let most = if self.below(16) == 0 { 20_000 } else { 3_000 };
        Duration::from_micros(self.below(most) as u64)
    }
}

/// Byte number `at` of what an end sends.
fn byte(end: &'static str, at: usize) -> u8 {
    let first = end.bytes().next().unwrap_or_default();
    let word = (at as u64 ^ u64::from(first) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word.to_be_bytes()[0]
}

/// An error if bytes are not those from number `at` on of what an end sends.
fn compare(reader: &str, end: &'static str, at: usize, bytes: &[u8]) -> anyhow::Result<()> {
    for (at, found) in (at..).zip(bytes) {
        if *found != byte(end, at) {
            anyhow::bail!("{reader}: byte {at} is not what {end} sent");
        }
    }
    Ok(())
}

/// Waits until there is something to read, at most so long.
pub fn wait(stream: &TcpStream, most: Duration) -> io::Result<()> {
    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    poll(
        &mut polled,
        PollTimeout::try_from(most).unwrap_or(PollTimeout::ZERO),
    )?;
    Ok(())
}
