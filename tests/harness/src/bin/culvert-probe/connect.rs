//! One connection, step by step: what connect, the addresses, sending and reading came to; or held open and driven by
//! lines on standard input.

use std::io::{self, BufRead, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use culvert_harness::ways;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt::TcpFastOpenConnect};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

use crate::report;

const MOST_READ: u64 = 64 << 20;
/// The report quotes the beginning; the checksum is of everything.
const MOST_SHOWN: usize = 4096;

#[derive(clap::Args)]
pub struct Arguments {
    /// Where to connect
    #[arg(long)]
    to: SocketAddr,
    /// Local address
    #[arg(long)]
    bind_ip: Option<IpAddr>,
    /// Local port
    #[arg(long, default_value_t = 0)]
    bind_port: u16,
    /// Take a local port that an old connection still has
    #[arg(long)]
    reuse: bool,
    /// Packet mark of the socket
    #[arg(long)]
    mark: Option<u32>,
    /// Packet mark of the socket once connected, before anything is sent
    #[arg(long)]
    remark: Option<u32>,
    /// Device to bind to
    #[arg(long)]
    device: Option<String>,
    /// Device to bind to once connected, before anything is sent
    #[arg(long)]
    rebind: Option<String>,
    /// Multipath TCP
    #[arg(long)]
    mptcp: bool,
    /// How to connect
    #[arg(long, value_enum, default_value_t = How::Poll)]
    how: How,
    /// Use the socket that somebody offers at this path
    #[arg(long, conflicts_with_all = ["device", "mptcp", "mark", "reuse"])]
    socket_from: Option<PathBuf>,
    /// Say so once there is a socket, and wait for a line of standard input before it connects
    #[arg(long)]
    pause: bool,
    /// Text to send
    #[arg(long)]
    send: Option<String>,
    /// Bytes to read
    #[arg(long, conflicts_with = "read_all")]
    read: Option<u64>,
    /// Read to the end
    #[arg(long)]
    read_all: bool,
    /// Send FIN before reading
    #[arg(long)]
    half_close: bool,
    /// For each step
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    timeout_ms: u64,
    /// Keep it open: send each line of standard input, its end as FIN, and tell what comes
    #[arg(long, conflicts_with_all = ["send", "read", "read_all", "half_close"])]
    hold: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum How {
    /// Without blocking
    Poll,
    /// Blocking
    Block,
    /// By io_uring
    Uring,
    /// TCP Fast Open: together with what is to be sent
    FastOpen,
    /// TCP Fast Open: with the first write
    FastOpenConnect,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let began = Instant::now();
    let connected = connect(arguments);
    let mut report = Map::new();
    report.insert("connect".into(), report::outcome(&connected).into());
    report.insert(
        "connect_ms".into(),
        (began.elapsed().as_secs_f64() * 1e3).into(),
    );
    if let Ok(stream) = &connected {
        report.insert("local".into(), address(stream.local_addr()));
        report.insert("peer".into(), address(stream.peer_addr()));
        if let Some(mark) = arguments.remark {
            let marked = SockRef::from(stream).set_mark(mark);
            report.insert("remark".into(), report::outcome(&marked).into());
        }
        if let Some(device) = &arguments.rebind {
            let bound = SockRef::from(stream).bind_device(Some(device.as_bytes()));
            report.insert("rebind".into(), report::outcome(&bound).into());
        }
    }
    if arguments.hold {
        let event = if connected.is_ok() {
            "connected"
        } else {
            "failed"
        };
        report.insert("event".into(), event.into());
        report::line(&Value::Object(report));
        return connected.map_or(Ok(()), hold);
    }
    if let Ok(stream) = connected {
        steps(stream, arguments, &mut report);
    }
    report::line(&Value::Object(report));
    Ok(())
}

fn connect(arguments: &Arguments) -> io::Result<TcpStream> {
    let socket = match &arguments.socket_from {
        Some(path) => Socket::from(ways::take_over(path)?),
        None => make(arguments)?,
    };
    if arguments.bind_ip.is_some() || arguments.bind_port != 0 {
        let any = if arguments.to.is_ipv4() {
            IpAddr::from([0; 4])
        } else {
            IpAddr::from([0; 16])
        };
        socket
            .bind(&SocketAddr::new(arguments.bind_ip.unwrap_or(any), arguments.bind_port).into())?;
    }
    if arguments.pause {
        report::line(&json!({"event": "paused"}));
        io::stdin().lock().read_line(&mut String::new())?;
    }
    let timeout = Duration::from_millis(arguments.timeout_ms);
    let to = SockAddr::from(arguments.to);
    match arguments.how {
        How::Poll => socket.connect_timeout(&to, timeout)?,
        How::Block => {
            socket.set_write_timeout(Some(timeout))?;
            socket.connect(&to)?;
        }
        How::Uring => ways::connect_by_ring(&socket, &to)?,
        How::FastOpen => {
            socket.set_write_timeout(Some(timeout))?;
            let text = arguments.send.as_deref().unwrap_or_default();
            socket.send_to_with_flags(text.as_bytes(), &to, nix::libc::MSG_FASTOPEN)?;
        }
        How::FastOpenConnect => {
            setsockopt(&socket, TcpFastOpenConnect, &true)?;
            socket.connect(&to)?;
        }
    }
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    Ok(stream)
}

fn make(arguments: &Arguments) -> io::Result<Socket> {
    let protocol = arguments.mptcp.then_some(Protocol::MPTCP);
    let socket = Socket::new(Domain::for_address(arguments.to), Type::STREAM, protocol)?;
    if let Some(device) = &arguments.device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if arguments.reuse {
        socket.set_reuse_address(true)?;
    }
    if let Some(mark) = arguments.mark {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

#[derive(clap::Args)]
pub struct Offer {
    /// Where others find it in the file system
    #[arg(long)]
    at: PathBuf,
    /// For IPv6
    #[arg(long)]
    ipv6: bool,
}

/// Makes a socket here, for somebody else to connect.
pub fn offer(arguments: &Offer) -> anyhow::Result<()> {
    let domain = if arguments.ipv6 {
        Domain::IPV6
    } else {
        Domain::IPV4
    };
    let socket = Socket::new(domain, Type::STREAM, None)?;
    let listener = UnixListener::bind(&arguments.at)?;
    report::line(&json!({"event": "offered"}));
    ways::hand_over(&listener, &socket)?;
    Ok(())
}

fn address(address: io::Result<SocketAddr>) -> Value {
    address
        .map_or_else(|error| report::name(&error), |address| address.to_string())
        .into()
}

fn steps(mut stream: TcpStream, arguments: &Arguments, report: &mut Map<String, Value>) {
    // Sent already, if it went with the SYN.
    if let Some(text) = arguments
        .send
        .as_ref()
        .filter(|_| arguments.how != How::FastOpen)
    {
        report.insert(
            "send".into(),
            report::outcome(&stream.write_all(text.as_bytes())).into(),
        );
    }
    if arguments.half_close {
        report.insert(
            "half_close".into(),
            report::outcome(&stream.shutdown(Shutdown::Write)).into(),
        );
    }
    let wanted = if arguments.read_all {
        Some(MOST_READ)
    } else {
        arguments.read
    };
    if let Some(wanted) = wanted {
        let mut data = Vec::new();
        let result = (&mut stream)
            .take(wanted.min(MOST_READ))
            .read_to_end(&mut data);
        let ended = result.is_ok() && (data.len() as u64) < wanted;
        // An end is what --read-all asked for, but less than --read wanted.
        report.insert(
            "read".into(),
            if ended {
                "EOF".into()
            } else {
                report::outcome(&result).into()
            },
        );
        report.insert("read_bytes".into(), data.len().into());
        report.insert("sha256".into(), report::hex(&Sha256::digest(&data)).into());
        let shown = data.get(..MOST_SHOWN).unwrap_or(&data);
        report.insert("data".into(), String::from_utf8_lossy(shown).into());
    }
}

/// Two threads: this one sends what standard input says, the other tells what comes. The second ends the program.
fn hold(stream: TcpStream) -> anyhow::Result<()> {
    stream.set_read_timeout(None)?;
    let mut writer = stream;
    let mut lines = io::stdin().lock().lines();
    // A connection that is made by the first write cannot be read from before.
    let connected = writer.peer_addr().is_ok();
    let first = if connected { None } else { lines.next() };
    if let Some(line) = first {
        let sent = writer.write_all(format!("{}\n", line?).as_bytes());
        report::line(&json!({"event": "sent", "outcome": report::outcome(&sent)}));
    }
    let reader = writer.try_clone()?;
    let watcher = std::thread::spawn(move || watch(reader));
    for line in lines {
        let sent = writer.write_all(format!("{}\n", line?).as_bytes());
        report::line(&json!({"event": "sent", "outcome": report::outcome(&sent)}));
    }
    // One that is gone already cannot be half-closed; the watcher tells of that.
    let _ = writer.shutdown(Shutdown::Write);
    let _ = watcher.join();
    Ok(())
}

fn watch(mut stream: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    let how = loop {
        match stream.read(&mut buffer) {
            Ok(0) => {
                report::line(&json!({"event": "eof"}));
                break after_eof(&stream);
            }
            Ok(length) => {
                let data = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
                report::line(&json!({"event": "data", "data": data}));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break report::name(&error),
        }
    };
    report::line(&json!({"event": "end", "how": how}));
    std::process::exit(0);
}

/// After the peer's FIN the connection lives on until ours, or until it is reset.
fn after_eof(stream: &TcpStream) -> String {
    loop {
        let mut watched = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        match poll(&mut watched, PollTimeout::NONE) {
            Ok(_) => break,
            Err(nix::Error::EINTR) => {}
            Err(error) => return format!("{error:?}"),
        }
    }
    match stream.take_error() {
        Ok(Some(error)) | Err(error) => report::name(&error),
        Ok(None) => "EOF".to_owned(),
    }
}
