//! A connection that has been used for a while, and then a reader that does something else than recv(2) on a socket which does not
//! block. One program has both ends, one of them in the namespace it runs in and one in another's.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use culvert_harness::receiving;
use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt::TcpUlp};
use serde_json::json;
use socket2::SockRef;

use crate::{report, sequences::wait, serve};

/// Until something must have come of it.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long nothing may come of it.
const NOTHING: Duration = Duration::from_millis(500);
const AGAIN: Duration = Duration::from_millis(5);
/// A small receive buffer.
const SMALL: usize = 64 << 10;
/// What is written at most to one who does not read.
const MOST: usize = 16 << 20;

#[derive(clap::Args)]
pub struct Late {
    /// The other end's address and port
    #[arg(long)]
    to: SocketAddr,
    /// The other end's network namespace
    #[arg(long)]
    netns: PathBuf,
    /// What the reader does. A line on standard input has a byte sent to it, another has it do that
    #[arg(long)]
    act: Act,
    /// Size of the reader's receive buffer that is asked for
    #[arg(long)]
    receive_buffer: Option<usize>,
    /// The reader's socket has TLS from the beginning
    #[arg(long)]
    tls: bool,
    /// Bytes there and back before
    #[arg(long, default_value_t = 40)]
    rounds: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Act {
    /// recv(2) after all
    Receive,
    /// splice(2) into a pipe
    Splice,
    /// Wait for two bytes in one call, with MSG_WAITALL on a socket that blocks since before the first was sent
    WaitAll,
    /// The same, and the socket does not block any more when the second is sent
    WaitAllMeanwhile,
    /// Wait until there are two bytes, with an SO_RCVLOWAT that is set since before the first was sent
    LowWater,
    /// Read late, with an SO_RCVBUF that is set since before the first was sent
    SmallBuffer,
    /// recv(2) after all, but the kernel's TLS was put on top of TCP before anything was sent
    Tls,
}

pub fn late(arguments: &Late) -> anyhow::Result<()> {
    let listener = serve::listen_in(&arguments.netns, arguments.to)?;
    let mut writer = TcpStream::connect(arguments.to)?;
    let (mut reader, _) = listener.accept()?;
    for stream in [&writer, &reader] {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
    }
    if let Some(size) = arguments.receive_buffer {
        SockRef::from(&reader).set_recv_buffer_size(size)?;
    }
    if arguments.tls {
        put_tls_on(&reader)?;
    }
    for _ in 0..arguments.rounds {
        writer.write_all(b"x")?;
        receive(&mut reader).context("the first end")?;
        reader.write_all(b"x")?;
        receive(&mut writer).context("the other end")?;
    }
    report::line(&json!({"event": "used"}));
    io::stdin().read_line(&mut String::new())?;
    prepare(arguments.act, &reader)?;
    writer.write_all(b"y")?;
    report::line(&json!({"event": "sent"}));
    io::stdin().read_line(&mut String::new())?;
    let outcome = match arguments.act {
        Act::Receive | Act::Tls => receive(&mut reader).map(usize::from),
        Act::Splice => splice_some(&reader),
        Act::WaitAll => wait_for_both(&reader, &mut writer, false),
        Act::WaitAllMeanwhile => wait_for_both(&reader, &mut writer, true),
        Act::LowWater => poll_for_both(&mut reader, &mut writer),
        Act::SmallBuffer => fill(&reader, &mut writer),
    };
    let outcome = match outcome {
        Ok(count) => format!("{count} bytes"),
        Err(error) => report::name(&error),
    };
    report::line(&json!({"event": "done", "outcome": outcome}));
    Ok(())
}

/// What the reader does to its socket before a byte is sent to it.
fn prepare(act: Act, reader: &TcpStream) -> io::Result<()> {
    match act {
        Act::Receive | Act::Splice => Ok(()),
        Act::WaitAll | Act::WaitAllMeanwhile => {
            reader.set_read_timeout(Some(PATIENCE))?;
            reader.set_nonblocking(false)
        }
        Act::LowWater => receiving::set_low_water(reader, 2),
        Act::SmallBuffer => SockRef::from(reader).set_recv_buffer_size(SMALL),
        Act::Tls => put_tls_on(reader),
    }
}

/// Whatever a kernel without it says is the outcome of all.
fn put_tls_on(stream: &TcpStream) -> io::Result<()> {
    let outcome = setsockopt(stream, TcpUlp::default(), b"tls");
    if let Err(errno) = outcome {
        report::line(&json!({"event": "no tls", "errno": format!("{errno:?}")}));
    }
    Ok(outcome?)
}

/// A byte, once it is there.
fn receive(stream: &mut TcpStream) -> io::Result<bool> {
    let began = Instant::now();
    let mut byte = [0];
    loop {
        match stream.read(&mut byte) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && began.elapsed() < PATIENCE => {
                wait(stream, AGAIN)?;
            }
            outcome => return outcome.map(|count| count > 0),
        }
    }
}

/// How many bytes it moves, once it moves any.
fn splice_some(stream: &TcpStream) -> io::Result<usize> {
    let (_keep, pipe) = nix::unistd::pipe()?;
    let began = Instant::now();
    loop {
        match splice(
            stream,
            None,
            &pipe,
            None,
            1,
            SpliceFFlags::SPLICE_F_NONBLOCK,
        ) {
            Err(Errno::EAGAIN) if began.elapsed() < PATIENCE => std::thread::sleep(AGAIN),
            outcome => return Ok(outcome?),
        }
    }
}

/// How many bytes one call returns that waits for two, of which the second is sent when it does not return with the first alone. The
/// socket may be set not to block in between.
fn wait_for_both(
    reader: &TcpStream,
    writer: &mut TcpStream,
    non_blocking: bool,
) -> io::Result<usize> {
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let read = recv(reader.as_raw_fd(), &mut [0; 2], MsgFlags::MSG_WAITALL);
            // Nobody else listens, and not for ever.
            let _ = tell.send(read);
        });
        if let Ok(early) = told.recv_timeout(NOTHING) {
            return Ok(early?);
        }
        reader.set_nonblocking(non_blocking)?;
        writer.write_all(b"z")?;
        let late = told.recv().map_err(io::Error::other)?;
        Ok(late?)
    })
}

/// How many bytes are there when the socket is readable; the second is sent when it is not with the first alone.
fn poll_for_both(reader: &mut TcpStream, writer: &mut TcpStream) -> io::Result<usize> {
    if !is_readable_within(reader, NOTHING)? {
        writer.write_all(b"z")?;
        if !is_readable_within(reader, PATIENCE)? {
            return Err(ErrorKind::TimedOut.into());
        }
    }
    reader.read(&mut [0; 2])
}

fn is_readable_within(stream: &TcpStream, time: Duration) -> io::Result<bool> {
    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut polled, time)? > 0)
}

/// By how many bytes what is unread exceeds twice the memory that its reader allows, when nothing more is taken.
fn fill(reader: &TcpStream, writer: &mut TcpStream) -> io::Result<usize> {
    let (chunk, mut written, mut taken) = (vec![0; SMALL], 0, Instant::now());
    while taken.elapsed() < NOTHING && written < MOST {
        match writer.write(&chunk) {
            Ok(count) => {
                written += count;
                taken = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(AGAIN),
            Err(error) => return Err(error),
        }
    }
    let (used, most) = receiving::memory(reader)?;
    Ok(used.saturating_sub(2 * most) as usize)
}
