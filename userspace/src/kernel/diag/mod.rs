//! The kernel's sock_diag in one namespace: looks at TCP sockets and destroys them, many with one system call.
//!
//! Invariant: a socket is named by its cookie, never by its addresses alone. Without a cookie the kernel would take the
//! listener that a SYN of these addresses would find, which in a pod is the agent's own.
//!
//! The kernel works through a batch while it is being sent. Only what failed is answered, and the last request, which
//! asks for it: so the answers have an end. Called by the enforcer (`destroy`) and by telemetry (`measure`).

mod message;

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{KernelError, Netns};
pub use message::SocketMeasures;
use message::{Answer, Ask};

const NETLINK_SOCK_DIAG: i32 = 4;
/// Sockets of one system call. All answers must fit into the receive buffer, at some 1.3 KiB of the kernel's memory each.
const BATCH: usize = 256;
const RECEIVE_BUFFER: usize = 1 << 20;
/// sock_diag answers at once; this only bounds what a broken kernel could do to us.
const ANSWER_DEADLINE: Duration = Duration::from_millis(500);
/// Answers to requests that were given up, read before the ones that are waited for.
const MOST_LATE_ANSWERS: usize = 2 * BATCH;
/// Larger than any answer: an error with its request, or the measures of a socket.
const ANSWER_ROOM: usize = 4096;

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketName {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub cookie: u64,
}

/// What became of a socket that was to be destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Destroyed,
    /// It was gone already, or its addresses belong to another socket by now.
    Gone,
    /// It lives: the error's number.
    Failed(i32),
}

/// A socket of one namespace to ask.
#[derive(Debug)]
pub struct SocketDiag {
    /// With the sequence number of the last request.
    netlink: Mutex<(Socket, u32)>,
}

impl SocketDiag {
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
                // The system's limit applies where this may not be exceeded; then batches may have to be repeated.
                let _ = nix::sys::socket::setsockopt(
                    &netlink,
                    nix::sys::socket::sockopt::RcvBufForce,
                    &RECEIVE_BUFFER,
                );
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
        let nobody = SocketName {
            local: nobody,
            remote: nobody,
            cookie: u64::MAX - 1,
        };
        let host = Self::new(&Netns::open(Path::new("/proc/self/ns/net"))?)?;
        match host.destroy(&[nobody]).first() {
            Some(Fate::Failed(errno)) => Err(KernelError::NoSocketDestroy(
                io::Error::from_raw_os_error(*errno),
            )),
            _ => Ok(()),
        }
    }

    /// Destroys sockets, each of which tells its peer with a reset; what became of them, in their order.
    pub fn destroy(&self, sockets: &[SocketName]) -> Vec<Fate> {
        let mut fates = Vec::with_capacity(sockets.len());
        for batch in sockets.chunks(BATCH) {
            // What nobody complains about has worked.
            let mut of_batch = vec![Fate::Destroyed; batch.len()];
            let outcome = self.ask(Ask::Destroy, batch, |index, answer| {
                if let (Answer::Status(code), Some(fate)) = (answer, of_batch.get_mut(index)) {
                    *fate = match code {
                        0 => Fate::Destroyed,
                        libc::ENOENT | libc::ESTALE => Fate::Gone,
                        errno => Fate::Failed(errno),
                    };
                }
            });
            if let Err(error) = outcome {
                // Some may be gone; asking again does no harm.
                of_batch.fill(Fate::Failed(error.raw_os_error().unwrap_or(libc::EIO)));
            }
            fates.append(&mut of_batch);
        }
        fates
    }

    /// Looks at sockets: `each` gets the index and the measures of those that are there.
    pub fn measure(
        &self,
        sockets: &[SocketName],
        mut each: impl FnMut(usize, SocketMeasures),
    ) -> io::Result<()> {
        for (number, batch) in sockets.chunks(BATCH).enumerate() {
            self.ask(Ask::Measure, batch, |index, answer| {
                if let Answer::Measures(measures) = answer
                    && index < batch.len()
                {
                    each(number * BATCH + index, measures);
                }
            })?;
        }
        Ok(())
    }

    /// Sends one batch and reads its answers to the last.
    fn ask(
        &self,
        ask: Ask,
        batch: &[SocketName],
        mut each: impl FnMut(usize, Answer),
    ) -> io::Result<()> {
        let Some(last) = batch.len().checked_sub(1) else {
            return Ok(());
        };
        let mut netlink = self.netlink();
        let (socket, sequence) = &mut *netlink;
        let first = sequence.wrapping_add(1);
        *sequence = sequence.wrapping_add(batch.len() as u32);
        socket.send(&message::requests(ask, batch, first))?;
        let mut answer = [0u8; ANSWER_ROOM];
        // Each socket answers at most twice: what was asked for, and that it was done.
        for _ in 0..2 * batch.len() + MOST_LATE_ANSWERS {
            // A netlink socket reads one message at a time.
            let length = (&*socket).read(&mut answer)?;
            let (number, answer) = message::parse(answer.get(..length).unwrap_or_default())
                .ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::InvalidData,
                        "sock_diag sent an unexpected answer",
                    )
                })?;
            let index = number.wrapping_sub(first) as usize;
            if index > last {
                continue;
            }
            each(index, answer);
            if index == last && matches!(answer, Answer::Status(_)) {
                return Ok(());
            }
        }
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "sock_diag did not come to an end",
        ))
    }

    fn netlink(&self) -> MutexGuard<'_, (Socket, u32)> {
        self.netlink.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
