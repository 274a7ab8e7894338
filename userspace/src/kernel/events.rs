//! The ring buffer as a stream of flow events.

use std::{io, net::SocketAddr, time::Duration};

use aya::maps::{Map, MapData, RingBuf};
use culvert_abi::{Event, FlowKey, Reason, end, event_kind, short_state};
use tokio::io::unix::AsyncFd;

use super::{FlowName, KernelError, NetnsCookie, socket_address, sys};

/// Ordinary events wake nobody (see `ebpf-programs/src/events.rs`): they are read this often.
const READ_INTERVAL: Duration = Duration::from_millis(50);
/// Events handled without letting other tasks run.
const BATCH: usize = 1024;
/// Batches after which the ring was emptied even if it was full in the beginning.
const BATCHES_IN_RING: usize = (1 << 21) / size_of::<Event>() / BATCH + 1;

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowEventKind {
    Closed,
    /// A direct connection was never established.
    Failed,
    /// `connect` refused it.
    Refused,
    /// It was established without a valid claim and cut off from its application.
    Isolated,
}

/// How a direct connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowEnd {
    Fin,
    ResetByPeer,
    ResetByClient,
    Timeout,
    /// By the agent, or by an administrator.
    Destroyed,
    ConnectionRefused,
    Unreachable,
    Unknown,
}

impl FlowEnd {
    fn parse(number: u32) -> Self {
        match number {
            end::FIN => Self::Fin,
            end::RESET_BY_PEER => Self::ResetByPeer,
            end::RESET_BY_CLIENT => Self::ResetByClient,
            end::TIMEOUT => Self::Timeout,
            end::DESTROYED => Self::Destroyed,
            end::CONNECTION_REFUSED => Self::ConnectionRefused,
            end::UNREACHABLE => Self::Unreachable,
            _ => Self::Unknown,
        }
    }
}

/// How far a flow came towards being short-circuited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShortState {
    /// When it was opened, its pods did not both have it on at any port.
    Off,
    /// It made fewer round trips than it takes.
    Brief,
    /// The agent was told that it is worth it.
    Proposed,
    /// It was entered, or was just being entered when it ended.
    Entered,
}

impl ShortState {
    fn parse(number: u32) -> Self {
        match number {
            short_state::BRIEF => Self::Brief,
            short_state::PROPOSED => Self::Proposed,
            short_state::ENTERED => Self::Entered,
            _ => Self::Off,
        }
    }
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
    /// Of those bytes, the ones that TCP has not seen.
    pub redirected_sent: u64,
    pub redirected_received: u64,
    pub short_state: ShortState,
    /// When it happened, by the clock of `sys::monotonic_now`.
    pub at: Duration,
    pub duration: Duration,
    pub rtt: Duration,
    pub retransmits: u32,
    pub connect_latency: Duration,
    pub end: FlowEnd,
    /// Number of the service that was connected to, 0 for none.
    pub service: u32,
    /// The client's socket, or the isolated one.
    pub socket: EventSocket,
}

/// The socket that an event is about.
#[derive(Clone, Copy, Debug)]
pub struct EventSocket {
    pub netns: NetnsCookie,
    pub cookie: u64,
    /// It is the client's end.
    pub client_end: bool,
}

impl FlowEvent {
    pub fn name(&self) -> FlowName {
        (self.key, self.sequence)
    }

    /// `None` for an event of a kind this version does not know.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let event = sys::read_plain::<Event>(bytes)?;
        let kind = match event.kind {
            event_kind::CLOSED => FlowEventKind::Closed,
            event_kind::REFUSED => FlowEventKind::Refused,
            event_kind::ISOLATED => FlowEventKind::Isolated,
            event_kind::FAILED => FlowEventKind::Failed,
            _ => return None,
        };
        Some(Self {
            kind,
            key: event.key,
            client: socket_address(event.key.client, event.key.client_port),
            server: socket_address(event.key.server, event.key.server_port),
            client_netns: NetnsCookie(event.netns),
            sequence: event.sequence,
            reason: match kind {
                FlowEventKind::Refused | FlowEventKind::Isolated => {
                    Reason::from_index(event.reason)
                }
                FlowEventKind::Closed | FlowEventKind::Failed => None,
            },
            policy: event.policy,
            bytes_sent: event.bytes_sent,
            bytes_received: event.bytes_received,
            redirected_sent: event.redirected_sent,
            redirected_received: event.redirected_received,
            short_state: ShortState::parse(event.short_state),
            at: Duration::from_nanos(event.at_ns),
            duration: match event.opened_ns {
                0 => Duration::ZERO,
                opened => Duration::from_nanos(event.at_ns.saturating_sub(opened)),
            },
            rtt: Duration::from_micros(event.srtt_us.into()),
            retransmits: event.retransmits,
            connect_latency: Duration::from_micros(event.connect_latency_us.into()),
            end: FlowEnd::parse(event.end),
            service: event.service,
            socket: EventSocket {
                netns: NetnsCookie(event.netns),
                cookie: event.socket_cookie,
                client_end: event.client_end != 0,
            },
        })
    }
}

/// Reads the ring buffers; one reader per agent.
pub struct EventStream {
    events: AsyncFd<RingBuf<MapData>>,
    /// What must be acted on at once; few.
    alarms: AsyncFd<RingBuf<MapData>>,
    interval: tokio::time::Interval,
    /// The last batch did not empty the ring.
    more: bool,
}

impl EventStream {
    /// Must be called inside a runtime.
    pub(super) fn open(events: Map, alarms: Map) -> Result<Self, KernelError> {
        let mut interval = tokio::time::interval(READ_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Ok(Self {
            events: watch("EVENTS", events)?,
            alarms: watch("ALARMS", alarms)?,
            interval,
            more: false,
        })
    }

    /// Waits until there is something to read or the interval is over, then hands a batch to `each`, alarms first. A pod that
    /// makes events faster than they are handled fills its ring, not this thread: there is an await between batches.
    pub async fn read(&mut self, mut each: impl FnMut(FlowEvent)) -> io::Result<()> {
        if self.more {
            tokio::task::yield_now().await;
        } else {
            tokio::select! {
                ready = self.alarms.readable() => ready?.clear_ready(),
                ready = self.events.readable() => ready?.clear_ready(),
                _ = self.interval.tick() => {}
            }
        }
        drain(self.alarms.get_mut(), &mut each);
        self.more = drain(self.events.get_mut(), &mut each);
        Ok(())
    }
}

impl EventStream {
    /// Hands over everything that happened before this call.
    pub async fn empty(&mut self, mut each: impl FnMut(FlowEvent)) {
        for _ in 0..BATCHES_IN_RING {
            self.more = drain(self.events.get_mut(), &mut each);
            if !self.more {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

/// Hands over at most [`BATCH`] events; true if there may be more.
fn drain(ring: &mut RingBuf<MapData>, each: &mut impl FnMut(FlowEvent)) -> bool {
    for _ in 0..BATCH {
        let Some(item) = ring.next() else {
            return false;
        };
        if let Some(event) = FlowEvent::parse(&item) {
            each(event);
        }
    }
    true
}

fn watch(name: &'static str, map: Map) -> Result<AsyncFd<RingBuf<MapData>>, KernelError> {
    let ring = RingBuf::try_from(map).map_err(|error| KernelError::map(name, error))?;
    sys::watch_ring(ring).map_err(|error| KernelError::map(name, error))
}
