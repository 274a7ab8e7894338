//! Frames: a packet socket on one interface, reading of Ethernet, ARP, IP, TCP and UDP, and writing of what the raw probes
//! send. Whatever is short, odd or unknown is `None`, never an error. Called by `capture` and `culvert-probe`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};

use crate::sys;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERNET_HEADER: usize = 14;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

/// A hardware address.
pub type Mac = [u8; 6];
/// The hardware address of all.
pub const BROADCAST: Mac = [0xff; 6];
/// Room for the largest frame segmentation offload makes, and its header.
pub const LARGEST_FRAME: usize = 65536 + 256;

/// TCP flags.
pub mod flag {
    pub const FIN: u8 = 0x01;
    pub const SYN: u8 = 0x02;
    pub const RST: u8 = 0x04;
    pub const PSH: u8 = 0x08;
    pub const ACK: u8 = 0x10;
}

/// Sees every frame of one interface, and sends any.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
    ifindex: i32,
}

impl PacketSocket {
    /// Opens it in the calling thread's namespace.
    pub fn open(interface: &str) -> io::Result<Self> {
        let ifindex = if_nametoindex(interface)?.cast_signed();
        Ok(Self {
            fd: sys::packet_socket(ifindex)?,
            ifindex,
        })
    }

    /// Also sees frames between others.
    pub fn promiscuous(&self) -> io::Result<()> {
        sys::promiscuous(self.fd.as_fd(), self.ifindex)
    }

    /// How much the kernel may queue between two reads, in bytes.
    pub fn queue(&self, bytes: usize) -> io::Result<()> {
        Ok(setsockopt(&self.fd, sockopt::RcvBufForce, &bytes)?)
    }

    /// Frames that were lost for want of room since the last call.
    pub fn drops(&self) -> io::Result<u32> {
        sys::packet_drops(self.fd.as_fd())
    }

    /// The next queued frame, `None` if there is none now.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        match recv(self.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(buffer.get(..length)),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until a frame is there; false at the deadline.
    pub fn wait(&self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, or the last millisecond would be spent spinning.
        let millis = left.as_millis().saturating_add(u128::from(!left.is_zero()));
        let timeout = PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)],
            timeout,
        ) {
            Ok(ready) => Ok(ready > 0),
            Err(nix::Error::EINTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a whole frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(self.fd.as_raw_fd(), frame, MsgFlags::empty())?;
        Ok(())
    }
}

/// The hardware address of an interface in the calling thread's namespace.
pub fn hardware_address(interface: &str) -> io::Result<Mac> {
    let entries = getifaddrs()?.filter(|entry| entry.interface_name == interface);
    let mut addresses = entries.filter_map(|entry| entry.address?.as_link_addr()?.addr());
    addresses
        .next()
        .ok_or_else(|| io::Error::other(format!("interface {interface} has no hardware address")))
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A TCP or UDP packet, read in place.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    pub source: (IpAddr, u16),
    pub destination: (IpAddr, u16),
    /// `None` for UDP.
    pub tcp: Option<TcpFields>,
    pub payload: &'a [u8],
}

/// What of a TCP header matters here.
#[derive(Clone, Copy, Debug)]
pub struct TcpFields {
    pub sequence: u32,
    pub acknowledgment: u32,
    pub flags: u8,
}

impl TcpFields {
    /// Whether all of `flags` are set.
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
}

/// Reads a frame that carries TCP or UDP over IP. Fragments after the first, and IPv6 extension headers, are not read.
pub fn segment(frame: &[u8]) -> Option<Segment<'_>> {
    let ip = frame.get(ETHERNET_HEADER..)?;
    let (source, destination, protocol, transport) = match ethertype(frame)? {
        ETHERTYPE_IPV4 => {
            let header = usize::from(ip.first()? & 0x0f) * 4;
            let fragment = u16_at(ip, 6)? & 0x1fff;
            if header < 20 || fragment != 0 {
                return None;
            }
            // Frames are padded to 60 bytes: the IP length tells what is data.
            let length = usize::from(u16_at(ip, 2)?);
            let transport = ip.get(header..length)?;
            (
                IpAddr::V4(v4_at(ip, 12)?),
                IpAddr::V4(v4_at(ip, 16)?),
                *ip.get(9)?,
                transport,
            )
        }
        ETHERTYPE_IPV6 => {
            let (protocol, from, to, transport) = ipv6(frame)?;
            (from.into(), to.into(), protocol, transport)
        }
        _ => return None,
    };
    let (tcp, header) = match protocol {
        PROTOCOL_TCP => {
            let header = usize::from(transport.get(12)? >> 4) * 4;
            let fields = TcpFields {
                sequence: u32_at(transport, 4)?,
                acknowledgment: u32_at(transport, 8)?,
                flags: *transport.get(13)?,
            };
            (Some(fields), header)
        }
        PROTOCOL_UDP => (None, 8),
        _ => return None,
    };
    Some(Segment {
        source: (source, u16_at(transport, 0)?),
        destination: (destination, u16_at(transport, 2)?),
        tcp,
        payload: transport.get(header..)?,
    })
}

/// An ARP message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    pub request: bool,
    pub sender: (Mac, Ipv4Addr),
    pub target: (Mac, Ipv4Addr),
}

/// Reads a frame that carries ARP for IPv4.
pub fn arp(frame: &[u8]) -> Option<Arp> {
    let message = frame.get(ETHERNET_HEADER..)?;
    if ethertype(frame)? != ETHERTYPE_ARP || message.get(..6)? != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let request = match u16_at(message, 6)? {
        1 => true,
        2 => false,
        _ => return None,
    };
    Some(Arp {
        request,
        sender: (mac_at(message, 8)?, v4_at(message, 14)?),
        target: (mac_at(message, 18)?, v4_at(message, 24)?),
    })
}

/// A frame with an ARP message.
pub fn arp_frame(to: Mac, arp: Arp) -> Vec<u8> {
    let mut frame = ethernet(arp.sender.0, to, ETHERTYPE_ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, if arp.request { 1 } else { 2 }]);
    for (mac, address) in [arp.sender, arp.target] {
        frame.extend(mac);
        frame.extend(address.octets());
    }
    frame
}

/// An IP packet with a TCP segment, without link header; checksums are complete. A SYN announces an MSS of 1460. Both ends are
/// of one family; an IPv4 end beside one of IPv6 is written as IPv4-mapped.
pub fn tcp_packet(from: SocketAddr, to: SocketAddr, fields: TcpFields, payload: &[u8]) -> Vec<u8> {
    let options: &[u8] = if fields.has(flag::SYN) {
        &[2, 4, 0x05, 0xb4]
    } else {
        &[]
    };
    let words = 5 + options.len() / 4;
    let mut tcp = Vec::with_capacity(words * 4 + payload.len());
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(fields.sequence.to_be_bytes());
    tcp.extend(fields.acknowledgment.to_be_bytes());
    tcp.extend([(words as u8) << 4, fields.flags, 0xfa, 0xf0]);
    tcp.extend([0, 0, 0, 0]);
    tcp.extend(options);
    tcp.extend(payload);
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ipv4_packet(from, to, tcp),
        (from, to) => {
            let six = |ip| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            ipv6_packet((six(from), six(to)), PROTOCOL_TCP, (tcp, 16))
        }
    }
}

fn ipv4_packet(from: Ipv4Addr, to: Ipv4Addr, mut tcp: Vec<u8>) -> Vec<u8> {
    let mut pseudo = Vec::with_capacity(12 + tcp.len());
    pseudo.extend(from.octets());
    pseudo.extend(to.octets());
    pseudo.extend([0, PROTOCOL_TCP]);
    pseudo.extend(length16(tcp.len()));
    pseudo.extend(&tcp);
    let sum = checksum(&pseudo).to_be_bytes();
    tcp.splice(16..18, sum);

    let mut ip = vec![0x45, 0];
    ip.extend(length16(20 + tcp.len()));
    // No identification, may not be fragmented, 64 hops.
    ip.extend([0, 0, 0x40, 0, 64, PROTOCOL_TCP, 0, 0]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    let sum = checksum(&ip).to_be_bytes();
    ip.splice(10..12, sum);
    ip.extend(tcp);
    ip
}

/// An IPv6 packet around a message whose checksum goes where it says. It has the 255 hops that neighbour discovery insists on.
pub(crate) fn ipv6_packet(
    (from, to): (Ipv6Addr, Ipv6Addr),
    protocol: u8,
    (mut message, checksum_at): (Vec<u8>, usize),
) -> Vec<u8> {
    let mut pseudo = Vec::with_capacity(40 + message.len());
    pseudo.extend(from.octets());
    pseudo.extend(to.octets());
    pseudo.extend([0, 0]);
    pseudo.extend(length16(message.len()));
    pseudo.extend([0, 0, 0, protocol]);
    pseudo.extend(&message);
    let sum = checksum(&pseudo).to_be_bytes();
    message.splice(checksum_at..checksum_at + 2, sum);

    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend(length16(message.len()));
    ip.extend([protocol, 255]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    ip.extend(message);
    ip
}

/// A frame with an IP packet of either family.
pub fn ip_frame(from: Mac, to: Mac, packet: &[u8]) -> Vec<u8> {
    let ethertype = match packet.first() {
        Some(first) if first >> 4 == 6 => ETHERTYPE_IPV6,
        _ => ETHERTYPE_IPV4,
    };
    let mut frame = ethernet(from, to, ethertype);
    frame.extend(packet);
    frame
}

/// The protocol of an IPv6 packet in a frame, its ends, and what it carries.
pub(crate) fn ipv6(frame: &[u8]) -> Option<(u8, Ipv6Addr, Ipv6Addr, &[u8])> {
    if ethertype(frame)? != ETHERTYPE_IPV6 {
        return None;
    }
    let ip = frame.get(ETHERNET_HEADER..)?;
    let carried = ip.get(40..40 + usize::from(u16_at(ip, 4)?))?;
    Some((*ip.get(6)?, v6_at(ip, 8)?, v6_at(ip, 24)?, carried))
}

fn ethernet(from: Mac, to: Mac, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET_HEADER + 64);
    frame.extend(to);
    frame.extend(from);
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// Callers send a few hundred bytes; what does not fit is cut to a length the far end refuses.
fn length16(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(0).to_be_bytes()
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u64::from(u16::from_be_bytes([*high, *low])),
        [high] => u64::from(*high) << 8,
        _ => 0,
    });
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn ethertype(frame: &[u8]) -> Option<u16> {
    u16_at(frame, 12)
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_be_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_be_bytes)
}

fn v4_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    array_at::<4>(bytes, at).map(Ipv4Addr::from)
}

pub(crate) fn v6_at(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    array_at::<16>(bytes, at).map(Ipv6Addr::from)
}

pub(crate) fn mac_at(bytes: &[u8], at: usize) -> Option<Mac> {
    array_at(bytes, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 77, 1, 10);
    const B: Ipv4Addr = Ipv4Addr::new(10, 77, 2, 10);

    fn ends() -> [(SocketAddr, SocketAddr); 2] {
        let six = |ip: Ipv4Addr| {
            Ipv6Addr::from_octets([&[0xfd; 12][..], &ip.octets()].concat().try_into().unwrap())
        };
        [
            ((A, 4000).into(), (B, 80).into()),
            ((six(A), 4000).into(), (six(B), 80).into()),
        ]
    }

    #[test]
    fn what_is_written_is_read_again() {
        let fields = TcpFields {
            sequence: 7,
            acknowledgment: 9,
            flags: flag::ACK | flag::PSH,
        };
        for (from, to) in ends() {
            let frame = ip_frame([1; 6], [2; 6], &tcp_packet(from, to, fields, b"hello"));
            let read = segment(&frame).unwrap();
            let pair = |end: SocketAddr| (end.ip(), end.port());
            assert_eq!((read.source, read.destination), (pair(from), pair(to)));
            assert_eq!(read.payload, b"hello");
            assert_eq!(read.tcp.unwrap().sequence, 7);
            if from.is_ipv4() {
                // A checksum over a packet with a right checksum is zero.
                assert_eq!(checksum(&frame[14..34]), 0);
            }
        }
        let message = Arp {
            request: true,
            sender: ([3; 6], A),
            target: ([0; 6], B),
        };
        assert_eq!(arp(&arp_frame(BROADCAST, message)), Some(message));
    }

    #[test]
    fn cut_and_odd_frames_are_not_read() {
        let fields = TcpFields {
            sequence: 7,
            acknowledgment: 9,
            flags: flag::SYN,
        };
        for (from, to) in ends() {
            let frame = ip_frame([1; 6], [2; 6], &tcp_packet(from, to, fields, b"hello"));
            for end in 0..frame.len() {
                assert!(segment(&frame[..end]).is_none(), "{end} bytes");
            }
            for at in 12..frame.len() {
                for value in [0x00, 0x0f, 0xf0, 0xff] {
                    let mut odd = frame.clone();
                    odd[at] = value;
                    let _ = segment(&odd);
                    let _ = arp(&odd);
                }
            }
        }
    }
}
