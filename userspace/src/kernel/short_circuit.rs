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

use aya::{
    maps::{HashMap, Map, MapData, MapError, RingBuf},
    programs::ProgramFd,
};
use culvert_abi::{Candidate, FlowKey, ShortEnd, ShortFlow, ShortName, ShortRequest, fit, step};
use tokio::io::unix::AsyncFd;

use super::{KernelError, Netns, NetnsCookie, OpenFlow, pins::Pins, sys};

mod self_test;
mod watch;

pub(super) use self_test::try_out;
pub use self_test::{Row, Verdict, Verdicts};
use watch::Watch;

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
    /// One of its sockets is not O_NONBLOCK, or a thread waits for it.
    Blocking,
    /// One of its sockets waits for more than a byte.
    LowWater,
    /// The kernel did not take it.
    Refused,
    /// One of its sockets was never at rest.
    Busy,
    /// One of its sockets has a receive buffer of a chosen size.
    ReceiveBuffer,
    /// One of its sockets sends without a copy.
    ZeroCopy,
    /// One of its pods was seen reading in a way that does not see redirected bytes.
    Reader,
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
            Self::Reader => "reader",
            Self::ReceiveBuffer => "receive_buffer",
            Self::ZeroCopy => "zero_copy",
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
            fit::RECEIVE_BUFFER => Err(Self::ReceiveBuffer),
            fit::ZERO_COPY => Err(Self::ZeroCopy),
            _ => Err(Self::Refused),
        }
    }
}

/// A flow that is, or is to be, short-circuited, with the namespaces of its two ends.
#[derive(Clone)]
pub struct Entrant {
    pub flow: OpenFlow,
    pub client: Arc<Netns>,
    pub server: Arc<Netns>,
}

impl Entrant {
    fn ends(&self) -> [(&Netns, ShortRequest); 2] {
        let [client, server] = requests(&self.flow);
        [(&self.client, client), (&self.server, server)]
    }
}

/// What is asked about the client's end, and about the server's.
fn requests(flow: &OpenFlow) -> [ShortRequest; 2] {
    let request = |side, cookie, peer_cookie| ShortRequest {
        end: ShortEnd {
            flow: flow.key,
            peer: 0,
            peer_cookie,
            side,
            live: 0,
            settled: 0,
            memory: 0,
            memory_most: 0,
        },
        cookie,
        step: step::EXAMINE,
        padding: 0,
        socket: 0,
    };
    let (client, server) = (flow.flow.client_socket, flow.flow.server_socket);
    [request(0, client, server), request(1, server, client)]
}

/// The programs of a short-circuit that are not attached to its map.
pub(super) struct Programs {
    pub request: ProgramFd,
    pub readers: [ProgramFd; 3],
}

/// The part of the kernel part that short-circuits.
pub struct ShortCircuit {
    request: ProgramFd,
    watch: Watch,
    settle: Duration,
    /// As in [`ShortEnd`].
    memory_most: u64,
    flows: Mutex<HashMap<MapData, FlowKey, ShortFlow>>,
    names: Mutex<HashMap<MapData, u64, ShortName>>,
    unfit: Mutex<HashMap<MapData, u64, u32>>,
}

impl ShortCircuit {
    /// The maps are SHORT_FLOWS, SHORT_NAMES and UNFIT; `verdicts` are what is known of this kernel. Who is `eager` redirects from the
    /// first moment on, and however much memory the node uses.
    pub(super) fn open(
        programs: Programs,
        [flows, names, unfit]: [Map; 3],
        pins: &Pins,
        verdicts: Verdicts,
        eager: bool,
    ) -> Result<Self, KernelError> {
        let failed = |name| move |error: MapError| KernelError::map(name, error);
        Ok(Self {
            request: programs.request,
            watch: Watch::new(pins.clone(), programs.readers, verdicts),
            settle: if eager { Duration::ZERO } else { SETTLE },
            memory_most: if eager { i64::MAX as u64 } else { 0 },
            flows: Mutex::new(HashMap::try_from(flows).map_err(failed("SHORT_FLOWS"))?),
            names: Mutex::new(HashMap::try_from(names).map_err(failed("SHORT_NAMES"))?),
            unfit: Mutex::new(HashMap::try_from(unfit).map_err(failed("UNFIT"))?),
        })
    }

    /// Enters flows of pods; what became of each, in their order. Blocks for some milliseconds.
    pub fn enter(&self, entrants: &[Entrant]) -> Vec<Result<(), Unfit>> {
        self.enter_if(entrants, |entrant| {
            for netns in [&entrant.client, &entrant.server] {
                self.watch.pod(netns).map_err(|error| {
                    tracing::warn!(%error, "the sockets of a pod cannot be watched: its flows are not short-circuited");
                    Unfit::Refused
                })?;
                if self.is_unfit(netns.cookie()) {
                    return Err(Unfit::Reader);
                }
            }
            Ok(())
        })
    }

    /// `fit` is asked before anything is done, and again before anything is redirected.
    fn enter_if(
        &self,
        entrants: &[Entrant],
        fit: impl Fn(&Entrant) -> Result<(), Unfit>,
    ) -> Vec<Result<(), Unfit>> {
        let placed: Vec<_> = entrants
            .iter()
            .map(|entrant| fit(entrant).and_then(|()| self.place(entrant)))
            .collect();
        if placed.iter().any(Result::is_ok) {
            thread::sleep(self.settle);
        }
        let placed = entrants.iter().zip(placed);
        placed
            .map(|(entrant, requests)| {
                let requests = requests?;
                fit(entrant)?;
                let started = entrant
                    .ends()
                    .into_iter()
                    .zip(requests)
                    .try_for_each(|((netns, _), request)| self.start(netns, request));
                if started.is_err() {
                    self.take_back(entrant);
                }
                started
            })
            .collect()
    }

    /// Puts both sockets into the map.
    fn place(&self, entrant: &Entrant) -> Result<[ShortRequest; 2], Unfit> {
        let [(client_netns, mut client), (server_netns, mut server)] = entrant.ends();
        self.ask(client_netns, &mut client)?;
        self.ask(server_netns, &mut server)?;
        (client.end.peer, server.end.peer) = (server.socket, client.socket);
        (client.step, server.step) = (step::ENTER, step::ENTER);
        client.end.memory_most = self.memory_most;
        server.end.memory_most = self.memory_most;
        let entered = self
            .name(&entrant.flow)
            .and_then(|()| self.ask(client_netns, &mut client))
            .and_then(|()| self.ask(server_netns, &mut server));
        if let Err(unfit) = entered {
            // Its end may have been before it was named.
            let flow = entrant.flow.flow;
            self.forget(&entrant.flow.key, [flow.client_socket, flow.server_socket]);
            return Err(unfit);
        }
        Ok([client, server])
    }

    fn start(&self, netns: &Netns, mut request: ShortRequest) -> Result<(), Unfit> {
        request.step = step::START;
        for _ in 0..ATTEMPTS {
            match self.ask(netns, &mut request) {
                Err(Unfit::Busy) => thread::sleep(AGAIN),
                outcome => return outcome,
            }
        }
        Err(Unfit::Busy)
    }

    /// Nothing of a flow is redirected any more. Its sockets stay in the map for as long as they live. `known` finds the namespaces of
    /// pods whose flows an earlier agent has entered; `false` if one is not known (yet).
    pub fn stop(&self, flow: &OpenFlow, known: impl Fn(NetnsCookie) -> Option<Arc<Netns>>) -> bool {
        let mut all = true;
        let sides = [flow.flow.client_netns, flow.flow.server_netns].map(NetnsCookie);
        for (side, cookie) in sides.into_iter().enumerate() {
            let Some(netns) = self.watch.netns(cookie).or_else(|| known(cookie)) else {
                all = false;
                continue;
            };
            let [client, server] = requests(flow);
            let mut request = if side == 0 { client } else { server };
            request.step = step::STOP;
            // One that has gone redirects nothing.
            let _ = self.ask(&netns, &mut request);
        }
        all
    }

    /// Whether an end of a flow has redirected bytes that its application has not read.
    pub fn has_unread(&self, entrant: &Entrant) -> bool {
        entrant.ends().into_iter().any(|(netns, mut request)| {
            request.step = step::LOOK;
            self.ask(netns, &mut request) == Err(Unfit::Busy)
        })
    }

    /// Not one way alone.
    fn take_back(&self, entrant: &Entrant) {
        for (netns, mut request) in entrant.ends() {
            request.step = step::STOP;
            let _ = self.ask(netns, &mut request);
        }
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

    /// Makes the entries in which a flow is counted and its sockets are known.
    fn name(&self, flow: &OpenFlow) -> Result<(), Unfit> {
        let sockets = [flow.flow.client_socket, flow.flow.server_socket];
        let counters = ShortFlow {
            sockets,
            ..ShortFlow::default()
        };
        let full = |_| Unfit::Refused;
        lock(&self.flows)
            .insert(flow.key, counters, 0)
            .map_err(full)?;
        let mut names = lock(&self.names);
        for (side, socket) in (0..).zip(sockets) {
            let name = ShortName {
                flow: flow.key,
                sequence: flow.flow.sequence,
                side,
            };
            names.insert(socket, name, 0).map_err(full)?;
        }
        Ok(())
    }

    /// A flow has ended, and nobody has said so.
    pub fn forget(&self, flow: &FlowKey, sockets: [u64; 2]) {
        let _ = lock(&self.flows).remove(flow);
        let mut names = lock(&self.names);
        for socket in sockets {
            let _ = names.remove(&socket);
        }
    }

    /// Whether a pod was seen reading in a way that does not see redirected bytes.
    pub fn is_unfit(&self, pod: NetnsCookie) -> bool {
        lock(&self.unfit).get(&pod.0, 0).is_ok()
    }

    /// Forgets the pods that are no more.
    pub fn keep_pods(&self, is_pod: impl Fn(NetnsCookie) -> bool) {
        self.watch.keep(&is_pod);
        let mut unfit = lock(&self.unfit);
        let gone: Vec<u64> = unfit
            .keys()
            .flatten()
            .filter(|cookie| !is_pod(NetnsCookie(*cookie)))
            .collect();
        for cookie in gone {
            let _ = unfit.remove(&cookie);
        }
    }

    /// The flows that have been entered and not ended.
    pub fn entered(&self) -> Vec<(FlowKey, ShortFlow)> {
        lock(&self.flows).iter().flatten().collect()
    }

    /// What has been counted of a flow that is, or was until now, short-circuited.
    pub fn counted(&self, flow: &FlowKey) -> Option<ShortFlow> {
        lock(&self.flows).get(flow, 0).ok()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
