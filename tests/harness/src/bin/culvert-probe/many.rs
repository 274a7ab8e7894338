//! Many connections on one thread, each with a byte there and back now and then, until they end: how many, how and when.
//! A thread for each would measure how long it takes to wake them.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use crate::report;

/// Both programs look at standard input this often.
const LOOK: Duration = Duration::from_millis(20);
const STEP: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub struct Client {
    /// Server address
    #[arg(long)]
    to: SocketAddr,
    /// Connections
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16_000))]
    count: u16,
    /// Milliseconds between two bytes on one connection
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    every_ms: u64,
}

#[derive(clap::Args)]
pub struct Server {
    /// Port to listen on
    #[arg(long)]
    port: u16,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    bind: IpAddr,
}

/// What has become of all connections.
#[derive(Default)]
struct Tally {
    opened: usize,
    ends: BTreeMap<String, usize>,
    /// Microseconds since 1970.
    first_end: Option<u128>,
    last_end: Option<u128>,
    bytes: u64,
}

impl Tally {
    fn end(&mut self, how: String) {
        *self.ends.entry(how).or_default() += 1;
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now = since.as_micros();
        self.first_end.get_or_insert(now);
        self.last_end = Some(now);
    }

    fn report(&self, event: &str, open: usize) {
        report::line(&json!({
            "event": event, "open": open, "opened": self.opened, "ends": self.ends, "bytes": self.bytes,
            "first_end_us": self.first_end, "last_end_us": self.last_end,
        }));
    }
}

/// Asks for a tally with each line; ends the program with its end.
fn listen_to_stdin(asked: &AtomicBool) {
    for _ in io::stdin().lines() {
        asked.store(true, Ordering::Relaxed);
    }
    std::process::exit(0);
}

pub fn client(arguments: &Client) -> anyhow::Result<()> {
    static ASKED: AtomicBool = AtomicBool::new(false);
    let mut streams = Vec::new();
    for _ in 0..arguments.count {
        let stream = TcpStream::connect_timeout(&arguments.to, STEP)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        streams.push(stream);
    }
    let mut tally = Tally {
        opened: streams.len(),
        ..Tally::default()
    };
    tally.report("open", streams.len());
    std::thread::spawn(|| listen_to_stdin(&ASKED));
    let every = Duration::from_millis(arguments.every_ms);
    let mut next = Instant::now();
    while !streams.is_empty() {
        if Instant::now() >= next {
            next += every;
            streams.retain_mut(|stream| keeps(stream.write(b"x").map(|_| 1), &mut tally));
        }
        let wait = next.saturating_duration_since(Instant::now()).min(LOOK);
        serve(
            &mut streams,
            None,
            wait,
            |stream, buffer| stream.read(buffer),
            &mut tally,
        )?;
        if ASKED.swap(false, Ordering::Relaxed) {
            tally.report("tally", streams.len());
        }
    }
    tally.report("all_ended", 0);
    // Until the tallies have been read.
    std::thread::park();
    Ok(())
}

pub fn server(arguments: &Server) -> anyhow::Result<()> {
    static ASKED: AtomicBool = AtomicBool::new(false);
    let listener = TcpListener::bind((arguments.bind, arguments.port))?;
    // The standard library's backlog is too short for a crowd.
    socket2::SockRef::from(&listener).listen(4096)?;
    listener.set_nonblocking(true)?;
    report::line(&json!({"event": "listening", "local": listener.local_addr()?.to_string()}));
    std::thread::spawn(|| listen_to_stdin(&ASKED));
    let (mut streams, mut tally) = (Vec::new(), Tally::default());
    loop {
        let echo = |stream: &mut TcpStream, buffer: &mut [u8]| {
            let length = stream.read(buffer)?;
            stream.write_all(buffer.get(..length).unwrap_or_default())?;
            Ok(length)
        };
        serve(&mut streams, Some(&listener), LOOK, echo, &mut tally)?;
        if ASKED.swap(false, Ordering::Relaxed) {
            tally.report("tally", streams.len());
        }
    }
}

/// Waits, and does what there is to do on each connection.
fn serve(
    streams: &mut Vec<TcpStream>,
    listener: Option<&TcpListener>,
    wait: Duration,
    exchange: impl Fn(&mut TcpStream, &mut [u8]) -> io::Result<usize>,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let mut watched: Vec<PollFd<'_>> = streams
        .iter()
        .map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN))
        .collect();
    if let Some(listener) = listener {
        watched.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
    }
    match poll(&mut watched, PollTimeout::try_from(wait)?) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready: Vec<bool> = watched
        .iter()
        .map(|fd| fd.any().unwrap_or_default())
        .collect();
    drop(watched);
    let mut buffer = [0; 64];
    let mut ready = ready.into_iter();
    streams.retain_mut(|stream| {
        if !ready.next().unwrap_or_default() {
            return true;
        }
        keeps(exchange(stream, &mut buffer), tally)
    });
    while let Some(listener) = listener {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                streams.push(stream);
                tally.opened += 1;
            }
            Err(_) => break,
        }
    }
    Ok(())
}

/// Whether a connection goes on after this.
fn keeps(outcome: io::Result<usize>, tally: &mut Tally) -> bool {
    match outcome {
        Ok(0) => tally.end("EOF".to_owned()),
        Ok(length) => {
            tally.bytes += length as u64;
            return true;
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
        Err(error) => tally.end(report::name(&error)),
    }
    false
}
