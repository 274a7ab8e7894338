//! The exchange with the kernel's sock_diag in one namespace: many sockets with one system call.
//!
//! The kernel works through a batch while it is being sent, and waits for each socket that a process is busy with: this may
//! block for as long as that process likes. Only what failed is answered, and the last request, which asks for it: so the answers
//! have an end. Called by a thread of `lane`.

use std::{
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Fate, SocketMeasures, SocketName,
    lane::{BATCH, Exchange},
    message::{self, Answer, Ask},
};
use crate::kernel::{KernelError, Netns};

const NETLINK_SOCK_DIAG: i32 = 4;
const RECEIVE_BUFFER: usize = 1 << 20;
/// sock_diag answers before a batch is sent to its end; this only bounds what a broken kernel could do to us.
const ANSWER_DEADLINE: Duration = Duration::from_millis(500);
/// Answers to requests that were given up, read before the ones that are waited for.
const MOST_LATE_ANSWERS: usize = 2 * BATCH;
/// Larger than any answer: an error with its request, or the measures of a socket.
const ANSWER_ROOM: usize = 4096;

/// A netlink socket of one namespace.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    /// Of the last request.
    sequence: u32,
}

impl Netlink {
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
            .map(|socket| Self {
                socket,
                sequence: 0,
            })
            .map_err(|source| KernelError::Netns {
                doing: "open sock_diag",
                source,
            })
    }

    /// Whether this kernel can destroy sockets at all.
    pub fn probe() -> Result<(), KernelError> {
        let nobody = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);
        let nobody = SocketName {
            local: nobody,
            remote: nobody,
            cookie: u64::MAX - 1,
        };
        let mut host = Self::new(&Netns::open(Path::new("/proc/self/ns/net"))?)?;
        match host.destroy(&[nobody]).first() {
            Some(Fate::Failed(errno)) => Err(KernelError::NoSocketDestroy(
                io::Error::from_raw_os_error(*errno),
            )),
            _ => Ok(()),
        }
    }

    /// Sends one batch and reads its answers to the last.
    fn ask(
        &mut self,
        ask: Ask,
        batch: &[SocketName],
        mut each: impl FnMut(usize, Answer),
    ) -> io::Result<()> {
        let Some(last) = batch.len().checked_sub(1) else {
            return Ok(());
        };
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(batch.len() as u32);
        self.socket.send(&message::requests(ask, batch, first))?;
        let mut answer = [0u8; ANSWER_ROOM];
        // Each socket answers at most twice: what was asked for, and that it was done.
        for _ in 0..2 * batch.len() + MOST_LATE_ANSWERS {
            // A netlink socket reads one message at a time.
            let length = (&self.socket).read(&mut answer)?;
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
}

impl Exchange for Netlink {
    fn destroy(&mut self, sockets: &[SocketName]) -> Vec<Fate> {
        // What nobody complains about has worked.
        let mut fates = vec![Fate::Destroyed; sockets.len()];
        let outcome = self.ask(Ask::Destroy, sockets, |index, answer| {
            if let (Answer::Status(code), Some(fate)) = (answer, fates.get_mut(index)) {
                *fate = match code {
                    0 => Fate::Destroyed,
                    libc::ENOENT | libc::ESTALE => Fate::Gone,
                    errno => Fate::Failed(errno),
                };
            }
        });
        if let Err(error) = outcome {
            // Some may be gone; asking again does no harm.
            fates.fill(Fate::Failed(error.raw_os_error().unwrap_or(libc::EIO)));
        }
        fates
    }

    fn measure(&mut self, sockets: &[SocketName]) -> io::Result<Vec<(usize, SocketMeasures)>> {
        let mut found = Vec::with_capacity(sockets.len());
        self.ask(Ask::Measure, sockets, |index, answer| {
            if let Answer::Measures(measures) = answer {
                found.push((index, measures));
            }
        })?;
        Ok(found)
    }
}
