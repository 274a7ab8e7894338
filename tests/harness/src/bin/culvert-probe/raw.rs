//! Crafted TCP: what somebody with CAP_NET_RAW in a pod can send.
//!
//! The handshake goes through a packet socket, beside the kernel's TCP. That would reset the connection when the answer
//! comes, if it has the source address: a routing rule for just these two addresses and ports forbids it to send. If it
//! does not have the address, it stays silent, and this program answers who asks for it on the link.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use culvert_harness::neighbour::{Neighbour, answer, neighbour, question};
use culvert_harness::packet::{
    BROADCAST, LARGEST_FRAME, Mac, PacketSocket, TcpFields, flag, ip_frame, segment, tcp_packet,
};
use nix::ifaddrs::getifaddrs;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::report;

const NEIGHBOUR_TIMEOUT: Duration = Duration::from_secs(1);
/// Before the rules of the agent and of the main table, after the local table.
const RULE_PRIORITY: &str = "1";

#[derive(clap::Args)]
pub struct Syn {
    /// Source address and port, any; IPv4
    #[arg(long)]
    src: SocketAddrV4,
    /// Destination address and port
    #[arg(long)]
    dst: SocketAddrV4,
    /// Sequence number
    #[arg(long)]
    seq: u32,
    /// Packet mark
    #[arg(long)]
    mark: Option<u32>,
    /// How many times
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
}

pub fn syn(arguments: &Syn) -> anyhow::Result<()> {
    let sent = send_syns(arguments);
    report::line(&json!({"sent": sent.as_ref().ok(), "outcome": report::outcome(&sent)}));
    Ok(())
}

fn send_syns(arguments: &Syn) -> io::Result<u32> {
    let socket = Socket::new(
        Domain::IPV4,
        Type::RAW,
        Some(Protocol::from(nix::libc::IPPROTO_RAW)),
    )?;
    socket.set_header_included_v4(true)?;
    if let Some(mark) = arguments.mark {
        socket.set_mark(mark)?;
    }
    let fields = TcpFields {
        sequence: arguments.seq,
        acknowledgment: 0,
        flags: flag::SYN,
    };
    let packet = tcp_packet(arguments.src.into(), arguments.dst.into(), fields, &[]);
    for _ in 0..arguments.count {
        socket.send_to(&packet, &arguments.dst.into())?;
    }
    Ok(arguments.count)
}

#[derive(clap::Args)]
pub struct Handshake {
    /// Source address and port; the address need not be this pod's
    #[arg(long)]
    src: SocketAddr,
    /// Destination address and port, on the same link
    #[arg(long)]
    dst: SocketAddr,
    /// Initial sequence number
    #[arg(long)]
    seq: u32,
    /// Text to send once connected
    #[arg(long, default_value = "raw handshake\n")]
    data: String,
    /// Send the text with the SYN too
    #[arg(long)]
    syn_data: bool,
    /// Interface to send from
    #[arg(long, default_value = "eth0")]
    interface: String,
    /// How long to wait for the SYN's answer, and for what follows
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    wait_ms: u64,
    /// Leave the connection open at the end instead of resetting it
    #[arg(long)]
    leave: bool,
}

/// What came back.
#[derive(Default, serde::Serialize)]
struct Seen {
    syn_ack: bool,
    /// The text that went with the SYN was taken.
    early: bool,
    rst: bool,
    fin: bool,
    acked: bool,
    received_bytes: usize,
    received: String,
    #[serde(skip)]
    bytes: Vec<u8>,
}

pub fn handshake(arguments: &Handshake) -> anyhow::Result<()> {
    let own = interface(&arguments.interface)?;
    let silence = Silence::begin(arguments.src, arguments.dst)?;
    let socket = PacketSocket::open(&arguments.interface).with_context(|| {
        format!(
            "opening a packet socket on {}: are you root?",
            arguments.interface
        )
    })?;
    let mut wire = Wire {
        socket,
        buffer: vec![0; LARGEST_FRAME],
        own: own.mac,
        peer: BROADCAST,
        src: arguments.src,
        dst: arguments.dst,
        answers: !own.addresses.contains(&arguments.src.ip()),
    };
    let mut seen = Seen::default();
    let error = converse(&mut wire, arguments, &mut seen)
        .err()
        .map(|error| format!("{error:#}"));
    drop(silence);
    seen.received = String::from_utf8_lossy(&seen.bytes).into_owned();
    seen.received_bytes = seen.bytes.len();
    let mut value = serde_json::to_value(&seen)?;
    if let (Some(object), Some(error)) = (value.as_object_mut(), error) {
        object.insert("error".into(), error.into());
    }
    report::line(&value);
    Ok(())
}

fn converse(wire: &mut Wire, arguments: &Handshake, seen: &mut Seen) -> anyhow::Result<()> {
    let wait = Duration::from_millis(arguments.wait_ms);
    wire.find_peer()?;
    let early = if arguments.syn_data {
        arguments.data.as_bytes()
    } else {
        &[]
    };
    wire.send(arguments.seq, 0, flag::SYN, early)?;
    let mut next = arguments.seq.wrapping_add(1);
    let (mut expected, mut early_taken) = (None, false);
    let with_early = next.wrapping_add(u32::try_from(early.len())?);
    wire.each(Instant::now() + wait, |fields, _| {
        // An answer to another SYN with these addresses is not ours.
        if fields.has(flag::SYN | flag::ACK) && [next, with_early].contains(&fields.acknowledgment)
        {
            expected = Some(fields.sequence.wrapping_add(1));
            early_taken = fields.acknowledgment != next;
            next = fields.acknowledgment;
        }
        seen.rst |= fields.has(flag::RST);
        expected.is_some() || fields.has(flag::RST)
    })?;
    let Some(mut expected) = expected else {
        return Ok(());
    };
    seen.syn_ack = true;
    seen.early = early_taken;
    if seen.rst {
        return Ok(());
    }
    wire.send(next, expected, flag::ACK, &[])?;
    wire.send(
        next,
        expected,
        flag::ACK | flag::PSH,
        arguments.data.as_bytes(),
    )?;
    next = next.wrapping_add(u32::try_from(arguments.data.len())?);

    let deadline = Instant::now() + wait;
    while !seen.rst && !seen.fin {
        let mut news = false;
        let more = wire.each(deadline, |fields, payload| {
            seen.rst |= fields.has(flag::RST);
            seen.acked |= fields.has(flag::ACK) && fields.acknowledgment == next;
            // In order only: what comes early is sent again.
            if fields.sequence == expected && !seen.rst {
                seen.bytes.extend_from_slice(payload);
                let fin = fields.has(flag::FIN);
                seen.fin |= fin;
                expected = expected
                    .wrapping_add(payload.len() as u32)
                    .wrapping_add(u32::from(fin));
                news |= fin || !payload.is_empty();
            }
            news || seen.rst
        })?;
        if news && !seen.rst {
            wire.send(next, expected, flag::ACK, &[])?;
        }
        if !more {
            break;
        }
    }
    if !arguments.leave && !seen.rst {
        wire.send(next, expected, flag::RST | flag::ACK, &[])?;
    }
    Ok(())
}

/// The link, and both ends of the connection.
struct Wire {
    socket: PacketSocket,
    buffer: Vec<u8>,
    own: Mac,
    peer: Mac,
    src: SocketAddr,
    dst: SocketAddr,
    answers: bool,
}

impl Wire {
    /// Asks for the destination's hardware address, in the name of the source: the answer comes here, and so does what
    /// the destination sends to the source from now on.
    fn find_peer(&mut self) -> anyhow::Result<()> {
        let ask = question((self.own, self.src.ip()), self.dst.ip());
        self.socket.send(&ask).context("asking on the link")?;
        let deadline = Instant::now() + NEIGHBOUR_TIMEOUT;
        while self.socket.wait(deadline)? {
            while let Some(frame) = self.socket.receive(&mut self.buffer)? {
                if let Some(Neighbour::Has(mac, ip)) = neighbour(frame)
                    && ip == self.dst.ip()
                {
                    self.peer = mac;
                    return Ok(());
                }
            }
            // A busy link has frames for ever.
            if Instant::now() >= deadline {
                break;
            }
        }
        bail!("nobody on the link answers for {}", self.dst.ip())
    }

    fn send(
        &self,
        sequence: u32,
        acknowledgment: u32,
        flags: u8,
        payload: &[u8],
    ) -> anyhow::Result<()> {
        let packet = tcp_packet(
            self.src,
            self.dst,
            TcpFields {
                sequence,
                acknowledgment,
                flags,
            },
            payload,
        );
        self.socket
            .send(&ip_frame(self.own, self.peer, &packet))
            .context("sending a frame")
    }

    /// Shows `look` each segment of this connection from the far end, until it returns true (then so does this) or the
    /// deadline. Answers who asks for the source meanwhile.
    fn each(
        &mut self,
        deadline: Instant,
        mut look: impl FnMut(TcpFields, &[u8]) -> bool,
    ) -> anyhow::Result<bool> {
        while self.socket.wait(deadline)? {
            while let Some(frame) = self.socket.receive(&mut self.buffer)? {
                if let Some(Neighbour::Asks { asker, wanted }) = neighbour(frame)
                    && wanted == self.src.ip()
                {
                    if self.answers {
                        let answer = answer((self.own, wanted), asker);
                        self.socket.send(&answer).context("answering on the link")?;
                    }
                    continue;
                }
                let Some(segment) = segment(frame) else {
                    continue;
                };
                let ends = (segment.source, segment.destination);
                let ours = ends
                    == (
                        (self.dst.ip(), self.dst.port()),
                        (self.src.ip(), self.src.port()),
                    );
                if let (true, Some(fields)) = (ours, segment.tcp)
                    && look(fields, segment.payload)
                {
                    return Ok(true);
                }
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Ok(false)
    }
}

/// What an interface is and has.
struct Interface {
    mac: Mac,
    addresses: Vec<IpAddr>,
}

fn interface(name: &str) -> anyhow::Result<Interface> {
    let mut mac = None;
    let mut addresses = Vec::new();
    for entry in getifaddrs()
        .context("listing interfaces")?
        .filter(|entry| entry.interface_name == name)
    {
        let Some(address) = entry.address else {
            continue;
        };
        mac = mac.or_else(|| address.as_link_addr().and_then(|link| link.addr()));
        let v4 = address.as_sockaddr_in().map(|address| address.ip());
        let v6 = address.as_sockaddr_in6().map(|address| address.ip());
        addresses.extend(v4.map(IpAddr::from).or(v6.map(IpAddr::from)));
    }
    Ok(Interface {
        mac: mac.with_context(|| format!("no interface {name} with a hardware address"))?,
        addresses,
    })
}

/// While it lives, the kernel sends nothing of its own for this connection.
struct Silence {
    family: &'static str,
    rule: Vec<String>,
}

impl Silence {
    fn begin(src: SocketAddr, dst: SocketAddr) -> anyhow::Result<Self> {
        let text = format!(
            "priority {RULE_PRIORITY} from {} to {} ipproto tcp sport {} dport {} prohibit",
            src.ip(),
            dst.ip(),
            src.port(),
            dst.port()
        );
        let silence = Self {
            family: if src.is_ipv4() { "-4" } else { "-6" },
            rule: text.split(' ').map(str::to_owned).collect(),
        };
        ensure!(silence.change("add")?, "`ip rule add {text}` failed");
        Ok(silence)
    }

    fn change(&self, action: &str) -> io::Result<bool> {
        let output = Command::new("ip")
            .args([self.family, "rule", action])
            .args(&self.rule)
            .stdin(Stdio::null())
            .output()?;
        io::stderr().write_all(&output.stderr)?;
        Ok(output.status.success())
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        if !matches!(self.change("del"), Ok(true)) {
            eprintln!(
                "a routing rule was left behind: ip {} rule del {}",
                self.family,
                self.rule.join(" ")
            );
        }
    }
}
