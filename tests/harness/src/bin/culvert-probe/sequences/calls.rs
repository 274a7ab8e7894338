//! A call at a time, at one end or the other, and what came of each. Called by `sequences`.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::{Dice, byte, compare, wait};
use crate::report;

/// What was sent and not read yet, at most: always less than any buffer takes.
const MOST_UNREAD: usize = 48 << 10;
/// Until what was sent must have arrived. It is there at once, but for a busy machine.
const ARRIVAL: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(20);

/// One of the two ends.
struct End {
    name: &'static str,
    stream: Option<TcpStream>,
    /// Without O_NONBLOCK.
    blocks: bool,
    /// Bytes that this end has sent, and read.
    sent: usize,
    read: usize,
    /// It has shut its direction down, or closed.
    is_done: bool,
    /// It has been told of the end, or of an error.
    is_told: bool,
}

impl End {
    fn new(name: &'static str, stream: TcpStream, blocks: bool) -> io::Result<Self> {
        stream.set_nonblocking(!blocks)?;
        stream.set_read_timeout(Some(ARRIVAL))?;
        Ok(Self {
            name,
            stream: Some(stream),
            blocks,
            sent: 0,
            read: 0,
            is_done: false,
            is_told: false,
        })
    }
}

/// What each of at most so many calls said, and then the ends of both.
pub fn run(
    [client, server]: [TcpStream; 2],
    calls: usize,
    dice: &mut Dice,
) -> anyhow::Result<Vec<String>> {
    let mut blocks = || dice.below(8) == 0;
    let mut ends = [
        End::new("client", client, blocks())?,
        End::new("server", server, blocks())?,
    ];
    let mut said = Vec::new();
    let pause = dice.below(calls);
    for turn in 0..calls {
        if turn == pause {
            std::thread::sleep(dice.pause());
        }
        let side = dice.below(2);
        let what = call(&mut ends, side, dice)?;
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
    let size = dice.size();
    if own.stream.is_none() {
        return Ok(String::new());
    }
    Ok(match kind {
        0..42 => send(own, peer, size)?,
        42..92 => receive(own, peer, size)?,
        92..94 => change(own)?,
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

/// Sets or clears O_NONBLOCK.
fn change(own: &mut End) -> anyhow::Result<String> {
    if let Some(stream) = &own.stream {
        stream.set_nonblocking(own.blocks)?;
        own.blocks = !own.blocks;
    }
    let how = if own.blocks {
        "blocks"
    } else {
        "does not block"
    };
    Ok(format!("{} {how} from now on", own.name))
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
            Err(error) if error.kind() == ErrorKind::WouldBlock && !own.blocks => {
                if began.elapsed() > ARRIVAL {
                    how = "nothing came".to_owned();
                    break;
                }
                wait(stream, AGAIN)?;
            }
            Err(error) => {
                how = report::name(&error);
                break;
            }
        }
    }
    let bytes = buffer.get(..got).unwrap_or_default();
    compare(own.name, peer.name, own.read, bytes)?;
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
            Err(error) if error.kind() == ErrorKind::WouldBlock && !own.blocks => {
                if began.elapsed() < ARRIVAL {
                    wait(stream, AGAIN)?;
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
