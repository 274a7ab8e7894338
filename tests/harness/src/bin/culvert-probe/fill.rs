//! Connections whose writers write until nothing more is taken from them, while nobody reads; then all is read, and every byte
//! compared; and once more, if that is asked for. One program has both ends, one of them in the namespace it runs in and one in another's.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::{many, pattern::Pattern, report, sequences::wait, serve};

/// When nothing was taken for so long, on any connection, nothing will be.
const FULL: Duration = Duration::from_secs(1);
/// Until what was sent must have arrived: TCP may wait for two minutes before it sends again what found no memory.
const ARRIVAL: Duration = Duration::from_secs(150);
/// What is written on one connection at most, so that a kernel that bounds nothing keeps some of its memory.
const MOST: u64 = 64 << 20;
const LOOK: Duration = Duration::from_millis(10);
const PIECE: usize = 64 << 10;

#[derive(clap::Args)]
pub struct Fill {
    /// The other end's address and port
    #[arg(long)]
    to: SocketAddr,
    /// The other end's network namespace
    #[arg(long)]
    netns: PathBuf,
    /// Connections
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4000))]
    count: u16,
    /// Bytes there and back on each, before a line on standard input says that it is to be filled
    #[arg(long, default_value_t = 40)]
    rounds: u32,
    /// How often they are filled and read
    #[arg(long, default_value_t = 1)]
    times: u32,
    /// How long nobody reads once they are full
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
}

pub fn fill(arguments: &Fill) -> anyhow::Result<()> {
    many::room_for_a_crowd();
    let listener = serve::listen_in(&arguments.netns, arguments.to)?;
    let seeds = 0..u64::from(arguments.count);
    let flows = seeds.map(|seed| Flow::open(arguments.to, &listener, seed));
    let mut flows = flows.collect::<io::Result<Vec<_>>>()?;
    for _ in 0..arguments.rounds {
        flows.iter_mut().try_for_each(Flow::exchange)?;
    }
    report::line(&json!({"event": "used"}));
    io::stdin().read_line(&mut String::new())?;
    for _ in 0..arguments.times {
        fill_all(&mut flows)?;
        let each = || flows.iter().map(|flow| flow.written.bytes);
        let (sum, most) = (each().sum::<u64>(), each().max());
        report::line(&json!({"event": "full", "bytes": sum, "most": most}));
        std::thread::sleep(Duration::from_millis(arguments.pause_ms));
        let took = read_all(&mut flows).context("reading")?;
        report::line(&json!({"event": "read", "ms": took.as_millis()}));
    }
    for flow in flows {
        flow.end().context("ending")?;
    }
    report::line(&json!({"event": "done"}));
    Ok(())
}

/// Writes on all flows until nothing more is taken from any.
fn fill_all(flows: &mut [Flow]) -> anyhow::Result<()> {
    let mut taken = Instant::now();
    while taken.elapsed() < FULL {
        for flow in &mut *flows {
            if flow.write_what_is_taken().context("writing")? {
                taken = Instant::now();
            }
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Reads all that was written, in turns, and compares it; how long that took.
fn read_all(flows: &mut [Flow]) -> anyhow::Result<Duration> {
    let (began, mut buffer) = (Instant::now(), vec![0; PIECE]);
    let mut came = began;
    loop {
        let mut left = 0;
        for flow in &mut *flows {
            if flow.has_unread() && flow.read_some(&mut buffer)? {
                came = Instant::now();
            }
            left += usize::from(flow.has_unread());
        }
        if left == 0 {
            return Ok(began.elapsed());
        }
        ensure!(
            came.elapsed() < ARRIVAL,
            "nothing came on {left} connections"
        );
        if came.elapsed() > LOOK {
            std::thread::sleep(LOOK);
        }
    }
}

struct Flow {
    writer: TcpStream,
    reader: TcpStream,
    written: Content,
    read: Content,
}

impl Flow {
    fn open(to: SocketAddr, listener: &TcpListener, seed: u64) -> io::Result<Self> {
        let writer = TcpStream::connect(to)?;
        let (reader, _) = listener.accept()?;
        for stream in [&writer, &reader] {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
        }
        Ok(Self {
            writer,
            reader,
            written: Content::new(seed),
            read: Content::new(seed),
        })
    }

    /// A byte there and back.
    fn exchange(&mut self) -> io::Result<()> {
        self.writer.write_all(b"x")?;
        receive(&mut self.reader)?;
        self.reader.write_all(b"x")?;
        receive(&mut self.writer)
    }

    /// Writes until nothing is taken; whether something was.
    fn write_what_is_taken(&mut self) -> io::Result<bool> {
        let before = self.written.bytes;
        while self.written.bytes < MOST {
            match self.writer.write(self.written.piece()) {
                Ok(length) => self.written.pass(length),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(self.written.bytes > before)
    }

    fn has_unread(&self) -> bool {
        self.read.bytes < self.written.bytes
    }

    /// Reads once; whether something came. An error if that is not what was written.
    fn read_some(&mut self, buffer: &mut [u8]) -> anyhow::Result<bool> {
        let length = match self.reader.read(buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            outcome => outcome?,
        };
        let (written, read) = (self.written.bytes, self.read.bytes);
        ensure!(length > 0, "an end after {read} of {written} bytes");
        let mut rest = buffer.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            let piece = self.read.piece();
            let common = piece.len().min(rest.len());
            ensure!(
                piece.get(..common) == rest.get(..common),
                "other bytes than were written, after byte {}",
                self.read.bytes
            );
            rest = rest.get(common..).unwrap_or_default();
            self.read.pass(common);
        }
        Ok(true)
    }

    /// Nothing more comes once everything was read.
    fn end(mut self) -> anyhow::Result<()> {
        self.writer.shutdown(Shutdown::Write)?;
        match receive(&mut self.reader) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(()),
            outcome => anyhow::bail!("{} in place of an end", report::outcome(&outcome)),
        }
    }
}

/// Waits for a byte, on a socket that does not block.
fn receive(stream: &mut TcpStream) -> io::Result<()> {
    let began = Instant::now();
    loop {
        match stream.read_exact(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && began.elapsed() < ARRIVAL => {
                wait(stream, LOOK)?;
            }
            outcome => return outcome,
        }
    }
}

/// What one writer sends: each of its bytes tells its place.
struct Content {
    pattern: Pattern,
    buffer: Vec<u8>,
    /// How much of the buffer has passed.
    at: usize,
    /// How much has passed in all.
    bytes: u64,
}

impl Content {
    fn new(seed: u64) -> Self {
        Self {
            pattern: Pattern::new(seed),
            buffer: Vec::new(),
            at: 0,
            bytes: 0,
        }
    }

    /// What comes next, at least a byte.
    fn piece(&mut self) -> &[u8] {
        if self.at == self.buffer.len() {
            self.buffer.resize(PIECE, 0);
            self.pattern.fill(&mut self.buffer);
            self.at = 0;
        }
        self.buffer.get(self.at..).unwrap_or_default()
    }

    fn pass(&mut self, length: usize) {
        self.at += length;
        self.bytes += length as u64;
    }
}
