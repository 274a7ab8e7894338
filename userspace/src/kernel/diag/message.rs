//! The messages of sock_diag as bytes. Pure: what comes is parsed defensively, although it is the kernel that wrote it.
//!
//! Layouts: `struct inet_diag_req_v2` and `struct inet_diag_msg` of the kernel's linux/inet_diag.h, `struct tcp_info` of
//! linux/tcp.h, each behind a `struct nlmsghdr`.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::SocketName;

const NLMSG_ERROR: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const INET_DIAG_INFO: u16 = 2;
const HEADER_LENGTH: usize = 16;
const REQUEST_LENGTH: usize = HEADER_LENGTH + 56;
/// `struct inet_diag_msg`, after which attributes follow.
const SOCKET_LENGTH: usize = 72;

/// What is asked of sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Destroy,
    Measure,
}

/// An answer to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// An error's number, 0 for none.
    Status(i32),
    Measures(SocketMeasures),
}

/// What a socket has seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketMeasures {
    /// Neither end has begun to close: [`Self::bytes_acked`] counts the SYN, but no FIN.
    pub established: bool,
    pub bytes_acked: u64,
    pub bytes_received: u64,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Segments sent again.
    pub retransmits: u32,
}

/// A batch of requests, numbered from `first`; the last asks for an acknowledgement.
pub(super) fn requests(ask: Ask, sockets: &[SocketName], first: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REQUEST_LENGTH * sockets.len());
    let (kind, extensions) = match ask {
        Ask::Destroy => (SOCK_DESTROY, 0),
        Ask::Measure => (SOCK_DIAG_BY_FAMILY, 1 << (INET_DIAG_INFO - 1)),
    };
    let mut number = first;
    for (at, socket) in sockets.iter().enumerate() {
        let last = at + 1 == sockets.len();
        let flags = NLM_F_REQUEST | if last { NLM_F_ACK } else { 0 };
        bytes.extend((REQUEST_LENGTH as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(number.to_ne_bytes());
        bytes.extend([0; 4]);
        put_socket(&mut bytes, extensions, socket);
        number = number.wrapping_add(1);
    }
    bytes
}

fn put_socket(bytes: &mut Vec<u8>, extensions: u8, socket: &SocketName) {
    let SocketName {
        local,
        remote,
        cookie,
    } = *socket;
    // A dual-stack socket holds an IPv4 connection as IPv6; the kernel finds either by the IPv4 addresses.
    let family = if local.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    } as u8;
    bytes.extend([family, libc::IPPROTO_TCP as u8, extensions, 0]);
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(remote.port().to_be_bytes());
    for address in [local, remote] {
        match address.ip() {
            IpAddr::V4(ip) => {
                bytes.extend(ip.octets());
                bytes.extend([0; 12]);
            }
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    // An address of a link means something on its device only.
    let device = match local {
        SocketAddr::V6(local) => local.scope_id(),
        SocketAddr::V4(_) => 0,
    };
    bytes.extend(device.to_ne_bytes());
    bytes.extend((cookie as u32).to_ne_bytes());
    bytes.extend(((cookie >> 32) as u32).to_ne_bytes());
}

/// An answer with the number of its request; `None` for what is not one.
pub(super) fn parse(bytes: &[u8]) -> Option<(u32, Answer)> {
    let kind = u16_at(bytes, 4)?;
    let number = u32_at(bytes, 8)?;
    let answer = match kind {
        NLMSG_ERROR => {
            let code = i32::from_ne_bytes(array_at(bytes, HEADER_LENGTH)?);
            Answer::Status(code.checked_neg()?)
        }
        SOCK_DIAG_BY_FAMILY => Answer::Measures(measures(bytes.get(HEADER_LENGTH..)?)?),
        _ => return None,
    };
    Some((number, answer))
}

fn measures(message: &[u8]) -> Option<SocketMeasures> {
    const TCP_ESTABLISHED: u8 = 1;
    let established = *message.get(1)? == TCP_ESTABLISHED;
    let mut rest = message.get(SOCKET_LENGTH..)?;
    // Each attribute is longer than nothing, so this ends.
    while !rest.is_empty() {
        let (length, kind) = (usize::from(u16_at(rest, 0)?), u16_at(rest, 2)?);
        let value = rest.get(4..length)?;
        if kind == INET_DIAG_INFO {
            return Some(SocketMeasures {
                established,
                rtt: Duration::from_micros(u32_at(value, 68)?.into()),
                retransmits: u32_at(value, 100)?,
                bytes_acked: u64_at(value, 120)?,
                bytes_received: u64_at(value, 128)?,
            });
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(kind: u16, number: u32) -> Vec<u8> {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(number.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn socket(attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = header(SOCK_DIAG_BY_FAMILY, 9);
        let mut message = vec![0; SOCKET_LENGTH];
        message[1] = 1;
        bytes.extend(message);
        bytes.extend(attributes.concat());
        bytes
    }

    fn info() -> Vec<u8> {
        let mut info = vec![0; 240];
        info[68..72].copy_from_slice(&55u32.to_ne_bytes());
        info[100..104].copy_from_slice(&3u32.to_ne_bytes());
        info[120..128].copy_from_slice(&(5u64 << 32).to_ne_bytes());
        info[128..136].copy_from_slice(&7u64.to_ne_bytes());
        info
    }

    #[test]
    fn measures_are_found_behind_other_attributes() {
        let bytes = socket(&[
            attribute(8, &[0]),
            attribute(4, b"cubic\0"),
            attribute(INET_DIAG_INFO, &info()),
        ]);
        let expected = SocketMeasures {
            established: true,
            bytes_acked: 5 << 32,
            bytes_received: 7,
            rtt: Duration::from_micros(55),
            retransmits: 3,
        };
        assert_eq!(parse(&bytes), Some((9, Answer::Measures(expected))));
    }

    #[test]
    fn attributes_that_lie_about_their_length_are_not_followed() {
        for length in [0u16, 1, 3, 200, u16::MAX] {
            let mut bytes = socket(&[attribute(8, &[0; 8]), attribute(INET_DIAG_INFO, &info())]);
            let at = HEADER_LENGTH + SOCKET_LENGTH;
            bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
            let _ = parse(&bytes);
        }
        let short = socket(&[attribute(INET_DIAG_INFO, &info()[..100])]);
        assert_eq!(parse(&short), None);
    }

    #[test]
    fn a_refusal_has_its_number() {
        let mut bytes = header(NLMSG_ERROR, 4);
        bytes.extend((-libc::ENOENT).to_ne_bytes());
        assert_eq!(parse(&bytes), Some((4, Answer::Status(libc::ENOENT))));
    }

    #[test]
    fn only_the_last_request_of_a_batch_asks_to_be_acknowledged() {
        let name = SocketName {
            local: "10.0.0.1:5".parse().unwrap(),
            remote: "10.0.0.2:6".parse().unwrap(),
            cookie: 0x0102_0304_0506_0708,
        };
        let bytes = requests(Ask::Destroy, &[name; 3], u32::MAX);
        let (messages, rest) = bytes.as_chunks::<REQUEST_LENGTH>();
        assert!(rest.is_empty());
        let of = |message: &[u8]| (u16_at(message, 6).unwrap(), u32_at(message, 8).unwrap());
        let found: Vec<_> = messages.iter().map(|message| of(message)).collect();
        assert_eq!(found, [(1, u32::MAX), (1, 0), (5, 1)]);
        assert_eq!(u32_at(&messages[0], 64), Some(0x0506_0708));
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_parser_fall_over(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes);
            let mut message = header(SOCK_DIAG_BY_FAMILY, 1);
            message.extend(&bytes);
            let _ = parse(&message);
        }
    }
}
