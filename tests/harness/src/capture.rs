//! What passes an interface: payload by flow, to look for bytes in clear, and packets by port.
//! A thread reads the socket, and so does everyone who asks, so that an answer includes all that had arrived.

use std::collections::HashMap;
use std::io::PipeWriter;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netns::Netns;
use crate::packet::{self, LARGEST_FRAME, PacketSocket};

const QUEUE: usize = 64 << 20;
const MOST_BYTES: usize = 256 << 20;

/// One direction of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Direction {
    pub source: (IpAddr, u16),
    pub destination: (IpAddr, u16),
    pub tcp: bool,
}

/// A running capture; it ends when dropped.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
    /// Its closing tells the thread to end.
    _running: PipeWriter,
}

#[derive(Debug)]
struct Shared {
    socket: PacketSocket,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    buffer: Vec<u8>,
    payload: HashMap<Direction, Vec<u8>>,
    packets: HashMap<u16, u64>,
    bytes: usize,
    lost: u64,
    cut: bool,
}

impl Capture {
    pub(crate) fn start(netns: &Netns, interface: &str) -> Result<Self> {
        let open = || -> std::io::Result<PacketSocket> {
            let socket = PacketSocket::open(interface)?;
            socket.promiscuous()?;
            socket.queue(QUEUE)?;
            Ok(socket)
        };
        let socket = netns
            .enter(open)?
            .with_context(|| format!("capturing on {interface} of {}", netns.name()))?;
        let seen = Seen {
            buffer: vec![0; LARGEST_FRAME],
            payload: HashMap::new(),
            packets: HashMap::new(),
            bytes: 0,
            lost: 0,
            cut: false,
        };
        let shared = Arc::new(Shared {
            socket,
            seen: Mutex::new(seen),
        });
        let (stopped, running) = std::io::pipe().context("making a pipe")?;
        let reader = shared.clone();
        std::thread::spawn(move || {
            loop {
                let mut ready = [
                    PollFd::new(reader.socket.as_fd(), PollFlags::POLLIN),
                    PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                ];
                let outcome = poll(&mut ready, PollTimeout::NONE);
                let stop = ready.last().and_then(PollFd::any).unwrap_or(true);
                if stop
                    || matches!(outcome, Err(error) if error != nix::Error::EINTR)
                    || reader.read().is_err()
                {
                    break;
                }
            }
        });
        Ok(Self {
            shared,
            _running: running,
        })
    }

    /// Whether `marker` passed in clear, in one direction of one connection, in one packet or over several.
    pub fn contains(&self, marker: &[u8]) -> Result<bool> {
        Ok(self.find(marker)?.is_some())
    }

    /// The direction in which `marker` passed in clear. An incomplete capture that does not have it is an error, since it
    /// cannot tell.
    pub fn find(&self, marker: &[u8]) -> Result<Option<Direction>> {
        ensure!(!marker.is_empty(), "an empty marker is everywhere");
        let seen = self.shared.read()?;
        let found = seen
            .payload
            .iter()
            .find(|(_, bytes)| holds(bytes, marker))
            .map(|(direction, _)| *direction);
        ensure!(
            found.is_some() || (seen.lost == 0 && !seen.cut),
            "the capture is incomplete ({} frames lost, full: {}): capture less traffic",
            seen.lost,
            seen.cut
        );
        Ok(found)
    }

    /// Packets from or to a port.
    pub fn packets(&self, port: u16) -> Result<u64> {
        Ok(self.shared.read()?.packets.get(&port).copied().unwrap_or(0))
    }

    /// Payload bytes by direction.
    pub fn directions(&self) -> Result<HashMap<Direction, usize>> {
        let seen = self.shared.read()?;
        Ok(seen
            .payload
            .iter()
            .map(|(direction, bytes)| (*direction, bytes.len()))
            .collect())
    }

    /// Frames the kernel dropped because nobody read in time.
    pub fn lost(&self) -> Result<u64> {
        Ok(self.shared.read()?.lost)
    }
}

impl Shared {
    /// Takes in all that has arrived.
    fn read(&self) -> Result<MutexGuard<'_, Seen>> {
        let mut guard = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = &mut *guard;
        while let Some(frame) = self
            .socket
            .receive(&mut seen.buffer)
            .context("reading a packet socket")?
        {
            let Some(segment) = packet::segment(frame) else {
                continue;
            };
            let direction = Direction {
                source: segment.source,
                destination: segment.destination,
                tcp: segment.tcp.is_some(),
            };
            *seen.packets.entry(segment.source.1).or_default() += 1;
            if segment.source.1 != segment.destination.1 {
                *seen.packets.entry(segment.destination.1).or_default() += 1;
            }
            if segment.payload.len() > MOST_BYTES - seen.bytes {
                seen.cut = true;
            } else if !segment.payload.is_empty() {
                seen.bytes += segment.payload.len();
                seen.payload
                    .entry(direction)
                    .or_default()
                    .extend_from_slice(segment.payload);
            }
        }
        seen.lost += u64::from(
            self.socket
                .drops()
                .context("reading a packet socket's statistics")?,
        );
        Ok(guard)
    }
}

fn holds(bytes: &[u8], marker: &[u8]) -> bool {
    bytes.windows(marker.len()).any(|window| window == marker)
}
