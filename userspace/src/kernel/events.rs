//! The ring buffer as a stream of flow events.

use std::{io, net::SocketAddr, time::Duration};

use aya::maps::{Map, MapData, RingBuf};
use culvert_abi::{Event, FlowKey, Reason, event_kind};
use tokio::io::unix::AsyncFd;

use super::{KernelError, NetnsCookie, socket_address, sys};

/// Ordinary events wake nobody (see `ebpf-programs/src/events.rs`): they are read this often.
const READ_INTERVAL: Duration = Duration::from_millis(20);

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowEventKind {
    Opened,
    Closed,
    /// `connect` refused it.
    Refused,
    /// It was established without a valid claim and cut off from its application.
    Isolated,
}

/// An event, parsed.
#[derive(Clone, Copy, Debug)]
pub struct FlowEvent {
    pub kind: FlowEventKind,
    pub key: FlowKey,
    pub client: SocketAddr,
    pub server: SocketAddr,
    pub client_netns: NetnsCookie,
    pub sequence: u32,
    pub reason: Option<Reason>,
    pub policy: u32,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub duration: Duration,
    pub rtt: Duration,
    pub retransmits: u32,
    pub connect_latency: Duration,
}

impl FlowEvent {
    /// `None` for an event of a kind this version does not know.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let event = sys::read_plain::<Event>(bytes)?;
        let kind = match event.kind {
            event_kind::OPENED => FlowEventKind::Opened,
            event_kind::CLOSED => FlowEventKind::Closed,
            event_kind::REFUSED => FlowEventKind::Refused,
            event_kind::ISOLATED => FlowEventKind::Isolated,
            _ => return None,
        };
        Some(Self {
            kind,
            key: event.key,
            client: socket_address(event.key.client, event.key.client_port),
            server: socket_address(event.key.server, event.key.server_port),
            client_netns: NetnsCookie(event.client_netns),
            sequence: event.sequence,
            reason: match kind {
                FlowEventKind::Refused | FlowEventKind::Isolated => Reason::from_index(event.reason),
                FlowEventKind::Opened | FlowEventKind::Closed => None,
            },
            policy: event.policy,
            bytes_sent: event.bytes_sent,
            bytes_received: event.bytes_received,
            duration: match event.opened_ns {
                0 => Duration::ZERO,
                opened => Duration::from_nanos(event.at_ns.saturating_sub(opened)),
            },
            rtt: Duration::from_micros(event.srtt_us.into()),
            retransmits: event.retransmits,
            connect_latency: Duration::from_micros(event.connect_latency_us.into()),
        })
    }
}

/// Reads the ring buffer; one reader per agent.
pub struct EventStream {
    ring: AsyncFd<RingBuf<MapData>>,
    interval: tokio::time::Interval,
}

impl EventStream {
    /// Must be called inside a runtime.
    pub(super) fn open(map: Map) -> Result<Self, KernelError> {
        let ring = RingBuf::try_from(map).map_err(|error| KernelError::map("EVENTS", error))?;
        let ring = sys::watch_ring(ring).map_err(|error| KernelError::map("EVENTS", error))?;
        Ok(Self { ring, interval: tokio::time::interval(READ_INTERVAL) })
    }

    /// Waits until there is something to read or the interval is over, then hands every event to `each`.
    pub async fn read(&mut self, mut each: impl FnMut(FlowEvent)) -> io::Result<()> {
        tokio::select! {
            ready = self.ring.readable() => ready?.clear_ready(),
            _ = self.interval.tick() => {}
        }
        while let Some(item) = self.ring.get_mut().next() {
            if let Some(event) = FlowEvent::parse(&item) {
                each(event);
            }
        }
        Ok(())
    }
}

