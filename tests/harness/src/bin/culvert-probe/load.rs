//! Load with a result: latency, throughput, connections per second. Blocking sockets, one thread per connection,
//! bounded in count and time.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use clap::ArgGroup;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use socket2::{Domain, Socket, Type};

use crate::pattern::Pattern;
use crate::report;
use crate::waiting::Waiting;

/// No step of a probe waits longer than this.
const STEP: Duration = Duration::from_secs(30);
/// Samples kept per connection: 200 MB at the very most.
const MOST_SAMPLES: u64 = 50_000_000;
const MOST_SIZE: u64 = 1 << 20;
/// No load goes on for longer than ten minutes.
const MOST_MILLIS: u64 = 600_000;
/// A stream that ends by the clock looks at it after so many bytes: a look costs as much as a small write's tenth.
const BETWEEN_LOOKS: u64 = 64 << 10;

#[derive(clap::Args)]
#[command(group = ArgGroup::new("length").required(true))]
pub struct RequestResponse {
    /// Server address
    #[arg(long)]
    to: SocketAddr,
    /// Bytes of a request and of its answer
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=MOST_SIZE))]
    size: u64,
    /// How long to go on
    #[arg(long, group = "length", value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: Option<u64>,
    /// How long to go on, in milliseconds
    #[arg(long, group = "length", value_parser = clap::value_parser!(u64).range(1..=MOST_MILLIS))]
    millis: Option<u64>,
    /// How many requests each connection makes
    #[arg(long, group = "length", value_parser = clap::value_parser!(u64).range(1..=MOST_SAMPLES))]
    count: Option<u64>,
    /// Connections at once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
    /// Requests before the measured ones, on each connection
    #[arg(long, default_value_t = 0)]
    warmup: u64,
    /// Sockets that do not block
    #[arg(long)]
    non_blocking: bool,
}

/// What one thread measured.
#[derive(Default)]
struct Samples {
    nanos: Vec<u32>,
    errors: u64,
    first_error: Option<String>,
}

impl Samples {
    fn take(&mut self, since: Instant) {
        self.nanos
            .push(u32::try_from(since.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }

    fn fail(&mut self, error: &io::Error) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| report::name(error));
    }
}

pub fn request_response(arguments: &RequestResponse) -> anyhow::Result<()> {
    let last = arguments.count.unwrap_or(MOST_SAMPLES);
    let seconds = arguments.seconds.map(Duration::from_secs);
    let lasts = seconds.unwrap_or_else(|| lasts(arguments.millis));
    let size = usize::try_from(arguments.size)?;
    in_parallel(arguments.connections, |samples, start| {
        // Every thread meets the others, also one without a connection.
        let connected = open(arguments.to, arguments.non_blocking).and_then(|mut stream| {
            let mut buffer = vec![b'r'; size];
            for _ in 0..arguments.warmup {
                exchange(&mut stream, &mut buffer)?;
            }
            Ok((stream, buffer))
        });
        start.wait();
        let (mut stream, mut buffer) = connected?;
        let deadline = Instant::now() + lasts;
        for _ in 0..last {
            let began = Instant::now();
            if began >= deadline {
                break;
            }
            exchange(&mut stream, &mut buffer)?;
            samples.take(began);
        }
        Ok(())
    })
}

/// Without a limit of time, another one applies.
fn lasts(millis: Option<u64>) -> Duration {
    Duration::from_millis(millis.unwrap_or(MOST_MILLIS))
}

fn exchange(stream: &mut (impl Read + Write), buffer: &mut [u8]) -> io::Result<()> {
    stream.write_all(buffer)?;
    stream.read_exact(buffer)
}

#[derive(clap::Args)]
#[command(group = ArgGroup::new("limit").required(true))]
pub struct Connections {
    /// Server address
    #[arg(long)]
    to: SocketAddr,
    /// Connections in all
    #[arg(long, group = "limit", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    count: Option<u64>,
    /// How long to go on, in milliseconds
    #[arg(long, group = "limit", value_parser = clap::value_parser!(u64).range(1..=MOST_MILLIS))]
    millis: Option<u64>,
    /// Threads that connect
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// Close first: for an echo server, and for no more connections than there are local ports
    #[arg(long)]
    client_closes: bool,
}

pub fn connections(arguments: &Connections) -> anyhow::Result<()> {
    let all = arguments.count.unwrap_or(MOST_SAMPLES);
    let each = all.div_ceil(u64::from(arguments.threads));
    let lasts = lasts(arguments.millis);
    in_parallel(arguments.threads, |samples, start| {
        start.wait();
        let deadline = Instant::now() + lasts;
        for _ in 0..each {
            let began = Instant::now();
            if began >= deadline {
                break;
            }
            match one_connection(arguments) {
                Ok(()) => samples.take(began),
                Err(error) => samples.fail(&error),
            }
        }
        Ok(())
    })
}

fn one_connection(arguments: &Connections) -> io::Result<()> {
    let mut stream = open_plainly(arguments.to)?;
    let mut byte = [b'c'];
    exchange(&mut stream, &mut byte)?;
    // Whoever closes first keeps the port for a minute: the server, with one port for all, rather than us.
    if !arguments.client_closes && stream.read(&mut byte)? != 0 {
        return Err(io::Error::other("the server sent more than its echo"));
    }
    Ok(())
}

/// Runs `work` on so many threads, merges what they measured and prints it. Threads begin together at the barrier.
fn in_parallel(
    threads: u16,
    work: impl Fn(&mut Samples, &Barrier) -> io::Result<()> + Sync,
) -> anyhow::Result<()> {
    let barrier = Barrier::new(usize::from(threads) + 1);
    let (mut all, elapsed) = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut samples = Samples::default();
                    if let Err(error) = work(&mut samples, &barrier) {
                        samples.fail(&error);
                    }
                    samples
                })
            })
            .collect();
        barrier.wait();
        let began = Instant::now();
        let all: Vec<Samples> = workers
            .into_iter()
            .filter_map(|worker| worker.join().ok())
            .collect();
        (all, began.elapsed())
    });
    let errors: u64 = all.iter().map(|samples| samples.errors).sum();
    let first_error = all
        .iter_mut()
        .find_map(|samples| samples.first_error.take());
    let mut nanos: Vec<u32> = all.into_iter().flat_map(|samples| samples.nanos).collect();
    nanos.sort_unstable();
    report::line(&json!({
        "count": nanos.len(),
        "p50_us": percentile(&nanos, 50),
        "p99_us": percentile(&nanos, 99),
        "rps": nanos.len() as f64 / elapsed.as_secs_f64(),
        "seconds": elapsed.as_secs_f64(),
        "errors": errors,
        "first_error": first_error,
    }));
    Ok(())
}

/// In microseconds, `null` without samples.
fn percentile(sorted: &[u32], percent: usize) -> Option<f64> {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map(|nanos| f64::from(*nanos) / 1000.0)
}

fn open(to: SocketAddr, non_blocking: bool) -> io::Result<Waiting> {
    let stream = TcpStream::connect_timeout(&to, STEP)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    Waiting::new(stream, non_blocking)
}

/// With as few system calls as possible: where connections are what is measured. The timeouts bound connect as well.
fn open_plainly(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_write_timeout(Some(STEP))?;
    socket.set_read_timeout(Some(STEP))?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

#[derive(clap::Args)]
#[command(group = ArgGroup::new("amount").required(true))]
pub struct Stream {
    /// Server address
    #[arg(long)]
    to: SocketAddr,
    /// Bytes of one write
    #[arg(long, default_value_t = 128 << 10, value_parser = clap::value_parser!(u64).range(1..=MOST_SIZE))]
    size: u64,
    /// Bytes in all
    #[arg(long, group = "amount")]
    bytes: Option<u64>,
    /// How long to go on, in milliseconds
    #[arg(long, group = "amount", value_parser = clap::value_parser!(u64).range(1..=MOST_MILLIS))]
    millis: Option<u64>,
    /// Compare checksums (server: collect); slower, as both ends compute them
    #[arg(long)]
    verify: bool,
    /// Another seed, another pattern
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Sockets that do not block
    #[arg(long)]
    non_blocking: bool,
}

pub fn stream(arguments: &Stream) -> anyhow::Result<()> {
    let mut sent = 0;
    let mut hash = arguments.verify.then(Sha256::new);
    let began = Instant::now();
    let pushed = push(arguments, &mut sent, &mut hash);
    let seconds = began.elapsed().as_secs_f64();
    let local = hash.map(|hash| report::hex(&hash.finalize()));
    let reply = pushed.as_ref().ok().cloned().unwrap_or_default();
    let remote = reply
        .get("sha256")
        .and_then(Value::as_str)
        .map(str::to_owned);
    let arrived = reply.get("bytes").and_then(Value::as_u64);
    let ok = pushed.is_ok()
        && arrived == Some(sent)
        && arguments.bytes.is_none_or(|bytes| sent == bytes)
        && (!arguments.verify || local == remote);
    report::line(&json!({
        "bytes": sent,
        "bytes_remote": arrived,
        "seconds": seconds,
        "gbit_s": sent as f64 * 8.0 / 1e9 / seconds,
        "sha256_local": local,
        "sha256_remote": remote,
        "ok": ok,
        "error": pushed.err().map(|error| report::name(&error)),
    }));
    Ok(())
}

/// Sends everything, half-closes, and returns what the server says of it.
fn push(arguments: &Stream, sent: &mut u64, hash: &mut Option<Sha256>) -> io::Result<Value> {
    let mut stream = open(arguments.to, arguments.non_blocking)?;
    let size = usize::try_from(arguments.size).unwrap_or(usize::MAX);
    let mut buffer = vec![0; size];
    let mut pattern = Pattern::new(arguments.seed);
    pattern.fill(&mut buffer);
    let bytes = arguments.bytes.unwrap_or(u64::MAX);
    let deadline = Instant::now() + lasts(arguments.millis);
    let mut look = 0;
    while *sent < bytes {
        if arguments.millis.is_some() && *sent >= look {
            if Instant::now() >= deadline {
                break;
            }
            look = *sent + BETWEEN_LOOKS;
        }
        let left = usize::try_from(bytes - *sent).unwrap_or(usize::MAX);
        let chunk = buffer.get_mut(..size.min(left)).unwrap_or_default();
        if let Some(hash) = hash {
            pattern.fill(chunk);
            hash.update(&*chunk);
        }
        stream.write_all(chunk)?;
        *sent += chunk.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut reply = String::new();
    stream.take(4096).read_to_string(&mut reply)?;
    serde_json::from_str(&reply).map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))
}
