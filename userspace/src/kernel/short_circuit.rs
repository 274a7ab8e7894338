//! Takes the sockets of direct flows into the short-circuit: see `ebpf-programs/src/short_circuit.rs`.
//!
//! Invariant: a flow is entered in three steps at both ends, and redirects nothing before the last: nobody may be in the middle of a
//! read that began before the reader's socket was entered.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData, RingBuf};
use culvert_abi::{Candidate, FlowKey, ShortEnd, ShortFlow, ShortRequest, fit, step};
use tokio::io::unix::AsyncFd;

use super::{KernelError, Netns, OpenFlow, sys};

/// What reads are given to come to their end, once the sockets are entered.
const SETTLE: Duration = Duration::from_millis(10);
/// Times that a socket in use is asked about again, and how long to wait before.
const ATTEMPTS: u32 = 20;
const AGAIN: Duration = Duration::from_millis(1);

/// Why a flow is not short-circuited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unfit {
    /// It has ended, or is about to.
    Gone,
    /// One of its sockets is used with TLS in the kernel or the like.
    UpperLayer,
    Multipath,
    /// One of its sockets is not O_NONBLOCK.
    Blocking,
    /// One of its sockets waits for more than a byte.
    LowWater,
    /// The kernel did not take it.
    Refused,
    /// One of its sockets was never at rest.
    Busy,
}

impl Unfit {
    /// Label value in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::UpperLayer => "upper_layer",
            Self::Multipath => "multipath",
            Self::Blocking => "blocking",
            Self::LowWater => "low_water",
            Self::Refused => "refused",
            Self::Busy => "busy",
        }
    }

    fn of(answer: u32) -> Result<(), Self> {
        match answer {
            fit::YES => Ok(()),
            fit::GONE | fit::NOT_ESTABLISHED => Err(Self::Gone),
            fit::UPPER_LAYER => Err(Self::UpperLayer),
            fit::MULTIPATH => Err(Self::Multipath),
            fit::BLOCKING => Err(Self::Blocking),
            fit::LOW_WATER => Err(Self::LowWater),
            fit::BUSY => Err(Self::Busy),
            _ => Err(Self::Refused),
        }
    }
}

/// A flow to be entered, with the namespaces of its two ends.
pub struct Entrant {
    pub flow: OpenFlow,
    pub client: Arc<Netns>,
    pub server: Arc<Netns>,
}

/// The part of the kernel part that short-circuits.
pub struct ShortCircuit {
    request: aya::programs::ProgramFd,
    settle: Duration,
    flows: Mutex<HashMap<MapData, FlowKey, ShortFlow>>,
}

impl ShortCircuit {
    pub(super) fn open(
        request: aya::programs::ProgramFd,
        flows: Map,
        eager: bool,
    ) -> Result<Self, KernelError> {
        let flows =
            HashMap::try_from(flows).map_err(|error| KernelError::map("SHORT_FLOWS", error))?;
        Ok(Self {
            request,
            settle: if eager { Duration::ZERO } else { SETTLE },
            flows: Mutex::new(flows),
        })
    }

    /// Enters flows; what became of each, in their order. Blocks for some milliseconds.
    pub fn enter(&self, entrants: &[Entrant]) -> Vec<Result<(), Unfit>> {
        let entered: Vec<_> = entrants.iter().map(|entrant| self.place(entrant)).collect();
        if entered.iter().any(Result::is_ok) {
            thread::sleep(self.settle);
        }
        let started = entrants.iter().zip(entered);
        started
            .map(|(entrant, ends)| {
                let ends = ends?;
                for (netns, mut request) in [&entrant.client, &entrant.server].into_iter().zip(ends)
                {
                    request.step = step::START;
                    self.start(netns, request)?;
                }
                Ok(())
            })
            .collect()
    }

    /// Puts both sockets into the map.
    fn place(&self, entrant: &Entrant) -> Result<[ShortRequest; 2], Unfit> {
        let flow = &entrant.flow;
        let request = |side, cookie, peer_cookie| ShortRequest {
            end: ShortEnd {
                flow: flow.key,
                peer: 0,
                peer_cookie,
                side,
                live: 0,
                settled: 0,
                pressure: 0,
            },
            cookie,
            step: step::EXAMINE,
            padding: 0,
            socket: 0,
        };
        let (client, server) = (flow.flow.client_socket, flow.flow.server_socket);
        let (mut client, mut server) = (request(0, client, server), request(1, server, client));
        self.ask(&entrant.client, &mut client)?;
        self.ask(&entrant.server, &mut server)?;
        (client.end.peer, server.end.peer) = (server.socket, client.socket);
        (client.step, server.step) = (step::ENTER, step::ENTER);
        let empty = ShortFlow::default();
        if self.flows().insert(flow.key, empty, 0).is_err() {
            return Err(Unfit::Refused);
        }
        let entered = self
            .ask(&entrant.client, &mut client)
            .and_then(|()| self.ask(&entrant.server, &mut server));
        if let Err(unfit) = entered {
            // Its end may have been before it was counted.
            let _ = self.flows().remove(&flow.key);
            return Err(unfit);
        }
        Ok([client, server])
    }

    fn start(&self, netns: &Netns, mut request: ShortRequest) -> Result<(), Unfit> {
        for _ in 0..ATTEMPTS {
            match self.ask(netns, &mut request) {
                Err(Unfit::Busy) => thread::sleep(AGAIN),
                outcome => return outcome,
            }
        }
        Err(Unfit::Busy)
    }

    fn ask(&self, netns: &Netns, request: &mut ShortRequest) -> Result<(), Unfit> {
        let answer = netns
            .run(|| sys::program_run(&self.request, request))
            .and_then(|answer| answer);
        match answer {
            Ok(answer) => Unfit::of(answer),
            Err(error) => {
                tracing::debug!(%error, "a socket could not be examined for the short-circuit");
                Err(Unfit::Refused)
            }
        }
    }

    /// What has been counted of a flow that is, or was until now, short-circuited.
    pub fn counted(&self, flow: &FlowKey) -> Option<ShortFlow> {
        self.flows().get(flow, 0).ok()
    }

    fn flows(&self) -> MutexGuard<'_, HashMap<MapData, FlowKey, ShortFlow>> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The flows that are worth it, as the kernel part finds them.
pub struct Candidates {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl Candidates {
    /// Must be called inside a runtime.
    pub(super) fn open(ring: Map) -> Result<Self, KernelError> {
        let failed = |error: &dyn std::fmt::Display| KernelError::map("CANDIDATES", error);
        let ring = RingBuf::try_from(ring).map_err(|error| failed(&error))?;
        let ring = sys::watch_ring(ring).map_err(|error| failed(&error))?;
        Ok(Self { ring })
    }

    /// Waits for some, at most so many.
    pub async fn some(&mut self, most: usize) -> io::Result<Vec<Candidate>> {
        loop {
            let mut found = Vec::new();
            while found.len() < most
                && let Some(item) = self.ring.get_mut().next()
            {
                found.extend(sys::read_plain::<Candidate>(&item));
            }
            if !found.is_empty() {
                return Ok(found);
            }
            self.ring.readable().await?.clear_ready();
        }
    }
}
