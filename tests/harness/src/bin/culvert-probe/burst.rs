//! Connections without patience: as many connects as there are sockets, none of them waited for until all have begun. What came
//! of them is counted, and they stay until standard input ends.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::report;

#[derive(clap::Args)]
pub struct Burst {
    /// Server address
    #[arg(long)]
    to: SocketAddr,
    /// Connections
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=18_000))]
    count: u16,
    /// Take turns with so many ports, from that of the address on
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    ports: u16,
    /// How long to wait for all to be decided
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=600_000))]
    wait_ms: u64,
    /// Text to send on each that is established
    #[arg(long, default_value = "")]
    send: String,
}

pub fn burst(arguments: &Burst) -> anyhow::Result<()> {
    let mut outcomes = BTreeMap::<String, u64>::new();
    let mut count = |outcome: String| *outcomes.entry(outcome).or_default() += 1;
    let mut pending = Vec::new();
    for number in 0..arguments.count {
        match begin(arguments, number) {
            Ok(socket) => pending.push(socket),
            Err(error) => count(report::name(&error)),
        }
    }
    report::line(&json!({"event": "begun", "pending": pending.len()}));
    let deadline = Instant::now() + Duration::from_millis(arguments.wait_ms);
    let mut kept = Vec::new();
    for socket in pending {
        let outcome = settle(&socket, deadline);
        if outcome == "ok" && !arguments.send.is_empty() {
            let mut stream = TcpStream::from(socket);
            let sent = stream.write_all(arguments.send.as_bytes());
            count(format!("sent: {}", report::outcome(&sent)));
            kept.push(Socket::from(stream));
        } else {
            kept.push(socket);
        }
        count(outcome);
    }
    report::line(&json!({"event": "open", "outcomes": outcomes}));
    io::copy(&mut io::stdin(), &mut io::sink())?;
    drop(kept);
    Ok(())
}

fn begin(arguments: &Burst, number: u16) -> io::Result<Socket> {
    let mut to = arguments.to;
    to.set_port(
        to.port()
            .wrapping_add(number.checked_rem(arguments.ports).unwrap_or(0)),
    );
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => Err(error),
        _ => Ok(socket),
    }
}

/// What a connect came to by the deadline.
fn settle(socket: &Socket, deadline: Instant) -> String {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let mut watched = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut watched, timeout) {
        Ok(0) => "pending".to_owned(),
        Ok(_) => match socket.take_error() {
            Ok(None) => "ok".to_owned(),
            Ok(Some(error)) | Err(error) => report::name(&error),
        },
        Err(error) => format!("{error:?}"),
    }
}
