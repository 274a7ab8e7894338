//! Ending other people's connections: `SOCK_DESTROY` of the kernel's sock_diag, which resets both ends.
//!
//! Invariant: a socket is named by its cookie, never by its addresses alone. Without a cookie the kernel would take the
//! listener that a SYN of these addresses would find, which in a pod is the agent's own.
//!
//! Layout of the request: `struct inet_diag_req_v2` of the kernel's linux/inet_diag.h.

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{KernelError, Netns};

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLMSG_ERROR: u16 = 2;
const REQUEST_LENGTH: usize = 16 + 56;
/// sock_diag answers at once; this only bounds what a broken kernel could do to us.
const ANSWER_DEADLINE: Duration = Duration::from_millis(500);
/// Answers to requests that were given up, read before the one that is waited for.
const MOST_LATE_ANSWERS: usize = 16;

/// Destroys TCP sockets of one namespace.
#[derive(Debug)]
pub struct SocketDestroyer {
    /// With the sequence number of the last request.
    netlink: Mutex<(Socket, u32)>,
}

impl SocketDestroyer {
    pub fn new(netns: &Netns) -> Result<Self, KernelError> {
        netns
            .run(|| -> io::Result<Socket> {
                let kind = Type::from(libc::SOCK_RAW).cloexec();
                let netlink = Socket::new(
                    Domain::from(libc::AF_NETLINK),
                    kind,
                    Some(Protocol::from(NETLINK_SOCK_DIAG)),
                )?;
                netlink.set_read_timeout(Some(ANSWER_DEADLINE))?;
                Ok(netlink)
            })
            .and_then(|netlink| netlink)
            .map(|netlink| Self {
                netlink: Mutex::new((netlink, 0)),
            })
            .map_err(|source| KernelError::Netns {
                doing: "open sock_diag",
                source,
            })
    }

    /// Whether this kernel can destroy sockets at all.
    pub(super) fn probe() -> Result<(), KernelError> {
        let nobody = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);
        Self::new(&Netns::open(Path::new("/proc/self/ns/net"))?)?
            .destroy(nobody, nobody, u64::MAX - 1)
            .map(drop)
            .map_err(KernelError::NoSocketDestroy)
    }

    /// Destroys the connection `local` -> `remote` whose socket has this cookie; `false` when there is none (any more).
    pub fn destroy(&self, local: SocketAddr, remote: SocketAddr, cookie: u64) -> io::Result<bool> {
        let mut netlink = self.netlink.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, sequence) = &mut *netlink;
        *sequence = sequence.wrapping_add(1);
        socket.send(&request(local, remote, cookie, *sequence))?;
        for _ in 0..MOST_LATE_ANSWERS {
            let mut answer = [0u8; 256];
            // A netlink socket reads one message at a time.
            let length = (&*socket).read(&mut answer)?;
            let (found, code) = answer.get(..length).and_then(status).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    "sock_diag sent an unexpected answer",
                )
            })?;
            if found != *sequence {
                continue;
            }
            return match -code {
                0 => Ok(true),
                // Gone, or the addresses belong to another socket by now.
                libc::ENOENT | libc::ESTALE => Ok(false),
                errno => Err(io::Error::from_raw_os_error(errno)),
            };
        }
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "sock_diag did not answer",
        ))
    }
}

fn request(local: SocketAddr, remote: SocketAddr, cookie: u64, sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REQUEST_LENGTH);
    // A dual-stack socket holds an IPv4 connection as IPv6; the kernel finds either by the IPv4 addresses.
    let family = if local.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    } as u8;
    bytes.extend((REQUEST_LENGTH as u32).to_ne_bytes());
    bytes.extend(SOCK_DESTROY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
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
    bytes.extend([0; 4]);
    bytes.extend((cookie as u32).to_ne_bytes());
    bytes.extend(((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

/// Sequence number and error code of an acknowledgement.
fn status(bytes: &[u8]) -> Option<(u32, i32)> {
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let sequence = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let code = i32::from_ne_bytes(bytes.get(16..20)?.try_into().ok()?);
    (kind == NLMSG_ERROR).then_some((sequence, code))
}
