//! A connection that has been used for a while, and then a reader that does something else than recv(2). One program has both ends, one
//! of them in the namespace it runs in and one in another's.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use serde_json::json;

use crate::{report, sequences::wait, serve};

/// Until something must have come of it.
const PATIENCE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(5);

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
        socket2::SockRef::from(&reader).set_recv_buffer_size(size)?;
    }
    for _ in 0..arguments.rounds {
        writer.write_all(b"x")?;
        receive(&mut reader).context("the first end")?;
        reader.write_all(b"x")?;
        receive(&mut writer).context("the other end")?;
    }
    report::line(&json!({"event": "used"}));
    io::stdin().read_line(&mut String::new())?;
    writer.write_all(b"y")?;
    report::line(&json!({"event": "sent"}));
    io::stdin().read_line(&mut String::new())?;
    let outcome = match arguments.act {
        Act::Receive => receive(&mut reader).map(usize::from),
        Act::Splice => splice_some(&reader),
    };
    let outcome = match outcome {
        Ok(count) => format!("{count} bytes"),
        Err(error) => report::name(&error),
    };
    report::line(&json!({"event": "done", "outcome": outcome}));
    Ok(())
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
