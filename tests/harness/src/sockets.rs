//! Which TCP sockets a namespace has, and which of them a process holds: to prove who talks to whom.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};

use crate::netns::Netns;

/// The state of a TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    Established,
    SynSent,
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    /// One this list does not know, by the kernel's number.
    Other(u8),
}

impl TcpState {
    fn of(number: u8) -> Self {
        match number {
            1 => Self::Established,
            2 => Self::SynSent,
            // 12: a request without a socket yet.
            3 | 12 => Self::SynReceived,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 => Self::Close,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            other => Self::Other(other),
        }
    }
}

/// One TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketEntry {
    /// Its address; IPv4-mapped ones are shown as IPv4.
    pub local: SocketAddr,
    /// Its peer's address; unspecified for a listener.
    pub peer: SocketAddr,
    pub state: TcpState,
    /// Bytes not yet acknowledged by the peer.
    pub send_queue: u32,
    /// Bytes not yet read, or connections not yet accepted.
    pub receive_queue: u32,
    pub uid: u32,
    /// 0 if no file stands for the socket, as in TIME_WAIT.
    pub inode: u64,
}

/// The TCP sockets of a namespace, IPv4 and IPv6.
pub fn socket_table(netns: &Netns) -> Result<Vec<SocketEntry>> {
    let read = || -> Result<Vec<SocketEntry>> {
        let mut entries = Vec::new();
        for name in ["tcp", "tcp6"] {
            // The thread's own view: /proc/net would be that of the process.
            let path = format!("/proc/thread-self/net/{name}");
            match std::fs::read_to_string(&path) {
                Ok(text) => entries.extend(text.lines().skip(1).filter_map(parse_entry)),
                // A kernel without IPv6.
                Err(error) if name == "tcp6" && error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("reading {path}")),
            }
        }
        Ok(entries)
    };
    netns.enter(read)?
}

/// The inodes of all sockets a process holds, of whatever kind and namespace.
pub fn sockets_of_process(pid: u32) -> Result<BTreeSet<u64>> {
    let path = format!("/proc/{pid}/fd");
    let files = std::fs::read_dir(&path)
        .with_context(|| format!("reading {path}: does the process still run?"))?;
    let inodes = files.filter_map(|file| {
        // A descriptor may be closed between listing and reading.
        let target = std::fs::read_link(file.ok()?.path()).ok()?;
        target
            .to_str()?
            .strip_prefix("socket:[")?
            .strip_suffix(']')?
            .parse()
            .ok()
    });
    Ok(inodes.collect())
}

fn parse_entry(line: &str) -> Option<SocketEntry> {
    let mut fields = line.split_whitespace().skip(1);
    let local = parse_address(fields.next()?)?;
    let peer = parse_address(fields.next()?)?;
    let state = TcpState::of(u8::from_str_radix(fields.next()?, 16).ok()?);
    let (send, receive) = fields.next()?.split_once(':')?;
    let mut rest = fields.skip(2);
    let uid = rest.next()?.parse().ok()?;
    let inode = rest.nth(1)?.parse().ok()?;
    Some(SocketEntry {
        local,
        peer,
        state,
        send_queue: u32::from_str_radix(send, 16).ok()?,
        receive_queue: u32::from_str_radix(receive, 16).ok()?,
        uid,
        inode,
    })
}

/// An address is printed as 32-bit words in the machine's byte order.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let words = address.as_bytes().chunks(8).map(|word| {
        let word = std::str::from_utf8(word).ok()?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    });
    let bytes = words.collect::<Option<Vec<[u8; 4]>>>()?.concat();
    let address = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    };
    Some(SocketAddr::new(
        address.to_canonical(),
        u16::from_str_radix(port, 16).ok()?,
    ))
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_read() {
        let v4 = "   0: 0A014D0A:1F90 0B014D0A:C350 01 00000010:00000002 00:00000000 00000000  1000        0 4242 1 0000000000000000 20 4 30 10 -1";
        let entry = parse_entry(v4).unwrap();
        assert_eq!(entry.local, "10.77.1.10:8080".parse().unwrap());
        assert_eq!(entry.peer, "10.77.1.11:50000".parse().unwrap());
        assert_eq!(
            (entry.state, entry.uid, entry.inode),
            (TcpState::Established, 1000, 4242)
        );
        assert_eq!((entry.send_queue, entry.receive_queue), (16, 2));
        let mapped = "0: 0000000000000000FFFF00000A014D0A:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 7 1";
        assert_eq!(
            parse_entry(mapped).unwrap().local,
            "10.77.1.10:8080".parse().unwrap()
        );
        for broken in [
            "",
            "0: 0A01:1 x",
            "0: 0A014D0A:1F90 0B014D0A:C350 01 0:0 0 0",
            "0: zz:1F90 0B014D0A:C350 01",
        ] {
            assert_eq!(parse_entry(broken), None);
        }
    }
}
