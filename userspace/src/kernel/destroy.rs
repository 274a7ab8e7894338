//! Ending other people's connections: `SOCK_DESTROY` of the kernel's sock_diag, which resets both ends.
//!
//! Layout of the request: `struct inet_diag_req_v2` of the kernel's linux/inet_diag.h.

use std::{
    io::{self, Read as _},
    net::SocketAddr,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{KernelError, Netns};

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLMSG_ERROR: u16 = 2;
const REQUEST_LENGTH: usize = 16 + 56;
const ANY_COOKIE: u32 = u32::MAX;
/// sock_diag answers at once; this only bounds what a broken kernel could do to us.
const ANSWER_DEADLINE: Duration = Duration::from_millis(500);

/// Destroys TCP sockets of one namespace.
#[derive(Debug)]
pub struct SocketDestroyer {
    netlink: Socket,
}

impl SocketDestroyer {
    pub fn new(netns: &Netns) -> Result<Self, KernelError> {
        netns
            .run(|| -> io::Result<Socket> {
                let kind = Type::from(libc::SOCK_RAW).cloexec();
                let netlink = Socket::new(Domain::from(libc::AF_NETLINK), kind, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
                netlink.set_read_timeout(Some(ANSWER_DEADLINE))?;
                Ok(netlink)
            })
            .and_then(|netlink| netlink)
            .map(|netlink| Self { netlink })
            .map_err(|source| KernelError::Netns { doing: "open sock_diag", source })
    }

    /// Destroys the connection `local` -> `remote`; `false` when there is none (any more).
    pub fn destroy(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        // A dual-stack socket holds an IPv4 connection as IPv6; the kernel finds either by the IPv4 tuple.
        let request = request(local, remote);
        self.netlink.send(&request)?;
        let mut answer = [0u8; 256];
        // A netlink socket reads one message at a time.
        let length = (&self.netlink).read(&mut answer)?;
        match answer.get(..length).and_then(status) {
            Some(0) => Ok(true),
            Some(code) if code == -libc::ENOENT => Ok(false),
            Some(code) => Err(io::Error::from_raw_os_error(-code)),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, "sock_diag sent an unexpected answer")),
        }
    }
}

fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REQUEST_LENGTH);
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u8;
    bytes.extend((REQUEST_LENGTH as u32).to_ne_bytes());
    bytes.extend(SOCK_DESTROY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(remote.port().to_be_bytes());
    for address in [local, remote] {
        match address.ip() {
            std::net::IpAddr::V4(ip) => {
                bytes.extend(ip.octets());
                bytes.extend([0; 12]);
            }
            std::net::IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend([0; 4]);
    bytes.extend(ANY_COOKIE.to_ne_bytes());
    bytes.extend(ANY_COOKIE.to_ne_bytes());
    bytes
}

/// The error code of an acknowledgement.
fn status(bytes: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let code = i32::from_ne_bytes(bytes.get(16..20)?.try_into().ok()?);
    (kind == NLMSG_ERROR).then_some(code)
}
