//! Random sequences of socket calls at both ends of one connection, a call at a time, and what came of each. One program has both
//! sockets, one in the namespace it runs in and one in another's, so that nothing is left to chance: with the same seed two runs say
//! the same, whatever carries the bytes.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use socket2::SockRef;

use crate::pattern::Pattern;
use crate::report;

/// What was sent and not read yet, at most: always less than any buffer takes.
const MOST_UNREAD: usize = 48 << 10;
/// Until what was sent must have arrived. It is there at once, but for a busy machine.
const ARRIVAL: Duration = Duration::from_secs(5);

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
    /// Calls in each
    #[arg(long, default_value_t = 40)]
    calls: u32,
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
}

/// One of the two ends.
struct End {
    name: &'static str,
    stream: Option<TcpStream>,
    /// Bytes that this end has sent, and read.
    sent: usize,
    read: usize,
    /// It has shut its direction down, or closed.
    is_done: bool,
    /// It has been told of the end, or of an error.
    is_told: bool,
}

impl End {
    fn new(name: &'static str, stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            name,
            stream: Some(stream),
            sent: 0,
            read: 0,
            is_done: false,
            is_told: false,
        })
    }
}

/// Byte number `at` of what an end sends.
fn byte(end: &'static str, at: usize) -> u8 {
    let word = (at as u64 ^ (end.len() as u64) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word.to_be_bytes()[0]
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
    let mut ends = [End::new("client", client)?, End::new("server", server)?];
    let mut said = Vec::new();
    // Time for whatever happens beside.
    let pause = dice.below(arguments.calls as usize);
    for turn in 0..arguments.calls as usize {
        if turn == pause {
            std::thread::sleep(Duration::from_micros(dice.below(3_000) as u64));
        }
        let side = dice.below(2);
        let what = call(&mut ends, side, &mut dice)?;
        said.push(what);
        if ends.iter().all(|end| end.stream.is_none()) {
            break;
        }
    }
    for side in [0, 1] {
        let (own, peer) = sides(&mut ends, side);
        said.push(receive(own, peer, usize::MAX)?);
    }
    for side in [0, 1] {
        said.push(finish(&mut ends, side)?);
    }
    Ok(said)
}

/// The end `side` and the other one.
fn sides(ends: &mut [End; 2], side: usize) -> (&mut End, &mut End) {
    let [client, server] = ends;
    if side == 0 {
        (client, server)
    } else {
        (server, client)
    }
}

/// Makes one call at the end `side`, and says what came of it.
fn call(ends: &mut [End; 2], side: usize, dice: &mut Dice) -> anyhow::Result<String> {
    let (own, peer) = sides(ends, side);
    let kind = dice.below(100);
    let size = match dice.below(4) {
        0 => 1,
        1 => 1 + dice.below(100),
        2 => 1 + dice.below(5_000),
        _ => 1 + dice.below(40_000),
    };
    if own.stream.is_none() {
        return Ok(String::new());
    }
    Ok(match kind {
        0..42 => send(own, peer, size)?,
        42..94 => receive(own, peer, size)?,
        94..97 if !own.is_done => {
            own.is_done = true;
            let done = own
                .stream
                .as_ref()
                .map(|stream| stream.shutdown(Shutdown::Write));
            format!(
                "{} shuts down: {}",
                own.name,
                report::outcome(&done.transpose())
            )
        }
        97..100 => close(own, peer, dice.below(4) == 0)?,
        _ => String::new(),
    })
}

fn send(own: &mut End, peer: &End, size: usize) -> anyhow::Result<String> {
    // What comes of it when the other end has gone depends on when that is noticed.
    if own.is_done || own.is_told || peer.stream.is_none() {
        return Ok(String::new());
    }
    let room = MOST_UNREAD.saturating_sub(own.sent - peer.read);
    let bytes: Vec<u8> = (own.sent..own.sent + size.min(room))
        .map(|at| byte(own.name, at))
        .collect();
    let Some(stream) = &mut own.stream else {
        return Ok(String::new());
    };
    let outcome = stream.write_all(&bytes);
    if outcome.is_ok() {
        own.sent += bytes.len();
    }
    Ok(format!(
        "{} sends {}: {}",
        own.name,
        bytes.len(),
        report::outcome(&outcome)
    ))
}

/// Reads what there must be, up to `size` bytes, and compares it; then, where nothing is left, what the next read says.
fn receive(own: &mut End, peer: &End, size: usize) -> anyhow::Result<String> {
    let there = peer.sent - own.read;
    let wanted = size.min(there);
    let mut buffer = vec![0; wanted.max(1)];
    let mut got = 0;
    let began = Instant::now();
    let Some(stream) = &mut own.stream else {
        return Ok(String::new());
    };
    if own.is_told {
        return Ok(String::new());
    }
    let mut how = "ok".to_owned();
    while got < wanted {
        match stream.read(buffer.get_mut(got..wanted).unwrap_or_default()) {
            Ok(0) => {
                how = "EOF".to_owned();
                break;
            }
            Ok(length) => got += length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if began.elapsed() > ARRIVAL {
                    how = "nothing came".to_owned();
                    break;
                }
                wait(stream, Duration::from_millis(20))?;
            }
            Err(error) => {
                how = report::name(&error);
                break;
            }
        }
    }
    for (offset, found) in buffer.iter().take(got).enumerate() {
        let at = own.read + offset;
        if *found != byte(peer.name, at) {
            anyhow::bail!("{}: byte {at} is not what {} sent", own.name, peer.name);
        }
    }
    own.read += got;
    own.is_told = how != "ok";
    Ok(format!("{} reads {got} of {wanted}: {how}", own.name))
}

fn close(own: &mut End, peer: &End, abort: bool) -> anyhow::Result<String> {
    let Some(stream) = own.stream.take() else {
        return Ok(String::new());
    };
    let unread = peer.sent - own.read;
    if abort {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    own.is_done = true;
    drop(stream);
    let how = if abort { "aborts" } else { "closes" };
    Ok(format!("{} {how} with {unread} unread", own.name))
}

/// Waits for the end, and says what that is.
fn finish(ends: &mut [End; 2], side: usize) -> anyhow::Result<String> {
    let (own, peer) = sides(ends, side);
    if own.stream.is_none() {
        return Ok(String::new());
    }
    // The peer says that it is done, if it has not.
    if let Some(stream) = &peer.stream
        && !peer.is_done
    {
        peer.is_done = true;
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut said = format!("{} waits for the end", own.name);
    let began = Instant::now();
    while let Some(stream) = &mut own.stream
        && !own.is_told
    {
        let how = match stream.read(&mut [0; 16]) {
            Ok(0) => "EOF".to_owned(),
            Ok(length) => format!("{length} bytes too many"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if began.elapsed() < ARRIVAL {
                    wait(stream, Duration::from_millis(20))?;
                    continue;
                }
                "no end".to_owned()
            }
            Err(error) => report::name(&error),
        };
        own.is_told = true;
        said = format!("{said}: {how}");
    }
    Ok(said)
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
