//! The server: one thread per connection, an event when a connection comes and one when it ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::ValueEnum;
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use socket2::{Domain, Protocol, Socket, Type};

use crate::report;
use crate::waiting::Waiting;

const BUFFER: usize = 256 << 10;
const MOST_CONNECTIONS: usize = 4096;
const BACKLOG: i32 = 4096;
/// For the modes that are served on the accepting thread: nobody may hold it up.
const ONCE_TIMEOUT: Duration = Duration::from_secs(5);
const BANNER: &[u8] = b"culvert-probe ready\n";

#[derive(clap::Args)]
pub struct Arguments {
    /// Port to listen on
    #[arg(long)]
    port: u16,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    bind: IpAddr,
    /// Multipath TCP
    #[arg(long)]
    mptcp: bool,
    /// What to do with a connection
    #[arg(long, value_enum, default_value_t = Mode::Echo)]
    mode: Mode,
    /// Source mode: bytes to send, 0 for as many as the client takes
    #[arg(long, default_value_t = 0)]
    bytes: u64,
    /// No event per connection
    #[arg(long)]
    quiet: bool,
    /// Threads that accept; what waits for its thread waits in the backlog
    #[arg(long, default_value_t = 2)]
    acceptors: u8,
    /// Sockets that do not block
    #[arg(long)]
    non_blocking: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    /// Send back what comes
    Echo,
    /// Read to the end, then answer with the number of bytes
    Sink,
    /// Like sink, and the answer has the SHA-256 too
    Collect,
    /// Send without reading
    Source,
    /// Speak first, then echo
    Banner,
    /// Speak first and send FIN, then read to the end
    Farewell,
    /// Read to the end, then speak and never send FIN
    Stay,
    /// Echo one byte and close first, on the accepting thread
    Once,
}

/// What a connection came to.
#[derive(Default)]
struct Tally {
    read: u64,
    written: u64,
    hash: Option<Sha256>,
}

pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let protocol = arguments.mptcp.then_some(Protocol::MPTCP);
    let listener = listen(SocketAddr::new(arguments.bind, arguments.port), protocol)
        .with_context(|| format!("listening on {}:{}", arguments.bind, arguments.port))?;
    report::line(&json!({"event": "listening", "local": listener.local_addr()?.to_string()}));
    let (listener, arguments) = (Arc::new(listener), Arc::new(arguments));
    let acceptors: Vec<_> = (0..arguments.acceptors.max(1))
        .map(|_| {
            let (listener, arguments) = (listener.clone(), arguments.clone());
            std::thread::spawn(move || accept(&listener, &arguments))
        })
        .collect();
    for acceptor in acceptors {
        let _ = acceptor.join();
    }
    anyhow::bail!("accepting connections failed")
}

pub fn listen(address: SocketAddr, protocol: Option<Protocol>) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, protocol)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The same in another network namespace.
pub fn listen_in(netns: &Path, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let netns = File::open(netns)?;
    let made = std::thread::spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        listen(address, None)
    });
    let made = made.join().map_err(|_| io::Error::other("no listener"))?;
    Ok(made?)
}

fn accept(listener: &TcpListener, arguments: &Arc<Arguments>) {
    static OPEN: AtomicUsize = AtomicUsize::new(0);
    static NUMBER: AtomicU64 = AtomicU64::new(1);
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            // The connection ended before it was taken, or descriptors ran out: neither ends the server.
            Err(error) => {
                eprintln!("accept: {error}");
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        let id = NUMBER.fetch_add(1, Ordering::Relaxed);
        if matches!(arguments.mode, Mode::Once) {
            connection(id, stream, peer, arguments);
            continue;
        }
        if OPEN.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
            OPEN.fetch_sub(1, Ordering::Relaxed);
            eprintln!("connection {id} from {peer} closed: {MOST_CONNECTIONS} are open");
            continue;
        }
        let arguments = arguments.clone();
        std::thread::spawn(move || {
            connection(id, stream, peer, &arguments);
            OPEN.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn connection(id: u64, stream: TcpStream, peer: SocketAddr, arguments: &Arguments) {
    // Not even put together where nobody wants it: it costs as much as a short connection.
    let event = |value: &dyn Fn() -> Value| {
        if !arguments.quiet {
            report::line(&value());
        }
    };
    let local = || {
        let local = stream.local_addr();
        local.map_or_else(|error| report::name(&error), |local| local.to_string())
    };
    event(&|| json!({"event": "accepted", "id": id, "peer": peer.to_string(), "local": local()}));
    let mut tally = Tally::default();
    let result = stream
        .set_nodelay(true)
        .and_then(|()| Waiting::new(stream, arguments.non_blocking))
        .and_then(|mut stream| converse(&mut stream, arguments, &mut tally));
    event(&|| {
        let end = result
            .as_ref()
            .map_or_else(report::name, |()| "EOF".to_owned());
        let hash = tally.hash.clone().map(|hash| report::hex(&hash.finalize()));
        json!({
            "event": "closed", "id": id, "peer": peer.to_string(), "end": end,
            "bytes_read": tally.read, "bytes_written": tally.written, "sha256": hash,
        })
    });
}

fn converse(stream: &mut Waiting, arguments: &Arguments, tally: &mut Tally) -> io::Result<()> {
    // Hashing costs more than moving the bytes: not where speed is measured.
    let measured =
        arguments.quiet || matches!(arguments.mode, Mode::Sink | Mode::Source | Mode::Once);
    if !measured || matches!(arguments.mode, Mode::Collect) {
        tally.hash = Some(Sha256::new());
    }
    match arguments.mode {
        Mode::Echo => echo(stream, tally),
        Mode::Banner => {
            write(stream, BANNER, tally)?;
            echo(stream, tally)
        }
        Mode::Farewell => {
            write(stream, BANNER, tally)?;
            stream.shutdown(Shutdown::Write)?;
            drain(stream, tally)
        }
        Mode::Stay => {
            drain(stream, tally)?;
            write(stream, BANNER, tally)?;
            loop {
                std::thread::park();
            }
        }
        Mode::Sink | Mode::Collect => {
            drain(stream, tally)?;
            answer(stream, tally)
        }
        Mode::Source => source(stream, arguments.bytes, tally),
        Mode::Once => {
            stream.set_read_timeout(Some(ONCE_TIMEOUT))?;
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            tally.read += 1;
            write(stream, &byte, tally)
        }
    }
}

fn write(stream: &mut Waiting, bytes: &[u8], tally: &mut Tally) -> io::Result<()> {
    stream.write_all(bytes)?;
    tally.written += bytes.len() as u64;
    Ok(())
}

fn echo(stream: &mut Waiting, tally: &mut Tally) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    while let Some(bytes) = read(stream, &mut buffer, tally)? {
        write(stream, bytes, tally)?;
    }
    Ok(())
}

fn drain(stream: &mut Waiting, tally: &mut Tally) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    while read(stream, &mut buffer, tally)?.is_some() {}
    Ok(())
}

fn read<'a>(
    stream: &mut Waiting,
    buffer: &'a mut [u8],
    tally: &mut Tally,
) -> io::Result<Option<&'a [u8]>> {
    let length = stream.read(buffer)?;
    tally.read += length as u64;
    let bytes = buffer.get(..length).filter(|bytes| !bytes.is_empty());
    if let (Some(hash), Some(bytes)) = (&mut tally.hash, bytes) {
        hash.update(bytes);
    }
    Ok(bytes)
}

fn answer(stream: &mut Waiting, tally: &mut Tally) -> io::Result<()> {
    let hash = tally.hash.clone().map(|hash| report::hex(&hash.finalize()));
    let text = format!("{}\n", json!({"bytes": tally.read, "sha256": hash}));
    write(stream, text.as_bytes(), tally)
}

fn source(stream: &mut Waiting, bytes: u64, tally: &mut Tally) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    crate::pattern::Pattern::new(0).fill(&mut buffer);
    while bytes == 0 || tally.written < bytes {
        let left = if bytes == 0 {
            u64::MAX
        } else {
            bytes - tally.written
        };
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(BUFFER);
        write(stream, buffer.get(..length).unwrap_or_default(), tally)?;
    }
    Ok(())
}
