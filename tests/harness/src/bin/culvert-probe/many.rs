//! Many connections on one thread, each with a byte there and back now and then, until they end: how many, how and when.
//! A thread for each would measure how long it takes to wake them.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mio::{Events, Interest, Poll, Token, unix::SourceFd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
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
    /// Milliseconds between two bytes on one connection; those of all are spread over this time
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

/// As many descriptors as the kernel lets this process have, and enough for the largest crowd where it may say so itself.
pub fn room_for_a_crowd() {
    const CROWD: u64 = 20_000;
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let most = hard.max(CROWD);
        let raised = setrlimit(Resource::RLIMIT_NOFILE, most, most);
        // Without the privilege, what there is: the first connection too many is an error that says so.
        let _ = raised.or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    }
}

pub fn client(arguments: &Client) -> anyhow::Result<()> {
    static ASKED: AtomicBool = AtomicBool::new(false);
    room_for_a_crowd();
    let mut crowd = Crowd::new()?;
    for _ in 0..arguments.count {
        crowd.add(TcpStream::connect_timeout(&arguments.to, STEP)?)?;
    }
    let mut tally = Tally {
        opened: crowd.open,
        ..Tally::default()
    };
    tally.report("open", crowd.open);
    std::thread::spawn(|| listen_to_stdin(&ASKED));
    let rounds = (u128::from(arguments.every_ms) / LOOK.as_millis()).max(1) as usize;
    let mut turns = (0..rounds).cycle();
    let mut next = Instant::now();
    while crowd.open > 0 {
        if Instant::now() >= next {
            next += LOOK;
            let turn = turns.next().unwrap_or_default();
            let write = |stream: &mut TcpStream| stream.write(b"x").map(|_| 1);
            crowd.each((turn, rounds), &mut tally, write);
        }
        let wait = next.saturating_duration_since(Instant::now()).min(LOOK);
        crowd.serve(None, wait, |stream, buffer| stream.read(buffer), &mut tally)?;
        if ASKED.swap(false, Ordering::Relaxed) {
            tally.report("tally", crowd.open);
        }
    }
    tally.report("all_ended", 0);
    // Until the tallies have been read.
    std::thread::park();
    Ok(())
}

pub fn server(arguments: &Server) -> anyhow::Result<()> {
    static ASKED: AtomicBool = AtomicBool::new(false);
    room_for_a_crowd();
    let listener = TcpListener::bind((arguments.bind, arguments.port))?;
    // The standard library's backlog is too short for a crowd.
    socket2::SockRef::from(&listener).listen(4096)?;
    listener.set_nonblocking(true)?;
    report::line(&json!({"event": "listening", "local": listener.local_addr()?.to_string()}));
    std::thread::spawn(|| listen_to_stdin(&ASKED));
    let (mut crowd, mut tally) = (Crowd::new()?, Tally::default());
    crowd.watch(&listener, LISTENER)?;
    loop {
        let echo = |stream: &mut TcpStream, buffer: &mut [u8]| {
            let length = stream.read(buffer)?;
            stream.write_all(buffer.get(..length).unwrap_or_default())?;
            Ok(length)
        };
        crowd.serve(Some(&listener), LOOK, echo, &mut tally)?;
        if ASKED.swap(false, Ordering::Relaxed) {
            tally.report("tally", crowd.open);
        }
    }
}

/// The connections, and what tells which of them have something to read: asking all of them each time would take longer than
/// what is measured.
struct Crowd {
    poll: Poll,
    events: Events,
    streams: Vec<Option<TcpStream>>,
    open: usize,
}

/// Not the place of a stream.
const LISTENER: Token = Token(usize::MAX);

impl Crowd {
    fn new() -> io::Result<Self> {
        Ok(Self {
            poll: Poll::new()?,
            events: Events::with_capacity(256),
            streams: Vec::new(),
            open: 0,
        })
    }

    fn add(&mut self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let place = Token(self.streams.len());
        self.watch(&stream, place)?;
        self.streams.push(Some(stream));
        self.open += 1;
        Ok(())
    }

    fn watch(&self, socket: &impl AsRawFd, place: Token) -> io::Result<()> {
        let registry = self.poll.registry();
        registry.register(
            &mut SourceFd(&socket.as_raw_fd()),
            place,
            Interest::READABLE,
        )
    }

    /// Does something on each connection whose turn it is: in so many turns on every one that is open.
    fn each(
        &mut self,
        (turn, turns): (usize, usize),
        tally: &mut Tally,
        mut exchange: impl FnMut(&mut TcpStream) -> io::Result<usize>,
    ) {
        for place in self.streams.iter_mut().skip(turn).step_by(turns) {
            if let Some(stream) = place
                && !keeps(exchange(stream), tally)
            {
                *place = None;
                self.open -= 1;
            }
        }
    }

    /// Waits, and does what there is to do on each connection.
    fn serve(
        &mut self,
        listener: Option<&TcpListener>,
        wait: Duration,
        exchange: impl Fn(&mut TcpStream, &mut [u8]) -> io::Result<usize>,
        tally: &mut Tally,
    ) -> io::Result<()> {
        match self.poll.poll(&mut self.events, Some(wait)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        let mut buffer = [0; 64];
        let mut called = false;
        for event in &self.events {
            called |= event.token() == LISTENER;
            let Some(place) = self.streams.get_mut(event.token().0) else {
                continue;
            };
            // Told once for all that is there: to be read to its end.
            while let Some(stream) = place {
                let outcome = exchange(stream, &mut buffer);
                let empty = matches!(&outcome, Err(error) if error.kind() == ErrorKind::WouldBlock);
                if !keeps(outcome, tally) {
                    *place = None;
                    self.open -= 1;
                } else if empty {
                    break;
                }
            }
        }
        while called && let Some(listener) = listener {
            match listener.accept() {
                Ok((stream, _)) => {
                    self.add(stream)?;
                    tally.opened += 1;
                }
                Err(_) => break,
            }
        }
        Ok(())
    }
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
