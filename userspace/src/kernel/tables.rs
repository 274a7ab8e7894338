//! The maps that the agent writes and reads, with the types of `culvert_abi`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray, SkStorage, SockHash};
use culvert_abi::{
    Address, Claim, Endpoint, Flow, FlowKey, Isolated, Listener, Lost, LostKey, Pod, Quota, Reason,
    SocketState, Verdict, VerdictKey, claim_kind, config_flag, role,
};

use super::{
    KernelError, KernelSettings, NetnsCookie, SocketName,
    configuration::Configuration,
    owner::{Owner, Pen},
    pins::Pins,
    quotas::Quotas,
    services::ServiceTables,
    short_counts::ShortCounters,
    sys,
};

/// Names a flow: the key alone is used again.
pub type FlowName = (FlowKey, u32);

/// Isolated sockets of either end that are looked at in one go.
const MOST_ISOLATED: usize = 65_536;

/// Entries read with one system call.
const AT_ONCE: u32 = 4096;

/// An established direct flow, as the kernel knows it.
#[derive(Clone, Copy, Debug)]
pub struct OpenFlow {
    pub key: FlowKey,
    pub flow: Flow,
}

impl OpenFlow {
    pub fn client(&self) -> SocketAddr {
        socket_address(self.key.client, self.key.client_port)
    }

    pub fn server(&self) -> SocketAddr {
        socket_address(self.key.server, self.key.server_port)
    }

    pub fn name(&self) -> FlowName {
        (self.key, self.flow.sequence)
    }

    pub fn client_end(&self) -> SocketName {
        SocketName {
            local: self.client(),
            remote: self.server(),
            cookie: self.flow.client_socket,
        }
    }

    pub fn server_end(&self) -> SocketName {
        SocketName {
            local: self.server(),
            remote: self.client(),
            cookie: self.flow.server_socket,
        }
    }
}

/// Why a connection came to the agent, and what was chosen for it before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steered {
    /// The endpoint of the service, if it is one that the kernel part knows.
    pub chosen: Option<SocketAddr>,
    /// Why it is not direct.
    pub reason: Option<Reason>,
}

/// Every table, each behind its own lock: calls are single system calls and never wait for anything else.
pub struct Tables {
    /// This agent answers for what is in the tables.
    vouched: AtomicBool,
    /// When an earlier agent was last alive; 0 for never.
    earlier_ns: AtomicU64,
    config: Mutex<Configuration>,
    pods: Mutex<HashMap<MapData, u64, Pod>>,
    endpoints: Mutex<HashMap<MapData, Address, Endpoint>>,
    verdicts: Mutex<HashMap<MapData, VerdictKey, Verdict>>,
    claims: Mutex<HashMap<MapData, FlowKey, Claim>>,
    quotas: Mutex<Quotas>,
    flows: Mutex<HashMap<MapData, FlowKey, Flow>>,
    lost: Mutex<HashMap<MapData, LostKey, Lost>>,
    listeners: Mutex<SockHash<MapData, Listener>>,
    sockets: Mutex<SkStorage<MapData, SocketState>>,
    services: Arc<ServiceTables>,
    short: ShortCounters,
    losses: Mutex<Losses>,
    lost_alarms: Mutex<Losses>,
    isolated: [Mutex<SockHash<MapData, Isolated>>; 2],
    counters: PerCpuArray<MapData, u64>,
}

impl Tables {
    /// Opens the maps, and makes this process their owner.
    pub(super) fn open(
        pins: &Pins,
        mut take: impl FnMut(&'static str) -> Result<Map, KernelError>,
    ) -> Result<Self, KernelError> {
        macro_rules! table {
            ($name:literal) => {
                take($name)?
                    .try_into()
                    .map_err(|error: MapError| KernelError::map($name, error))?
            };
        }
        let mut config =
            Configuration::open(table!("CONFIG"), Pen::of(pins)?, Owner::this_process()?);
        config.take()?;
        // The programs that make them mute are attached through the object's own.
        let isolated = |name| {
            let map = MapData::from_pin(pins.map(name))
                .and_then(|data| SockHash::try_from(Map::SockHash(data)));
            map.map(Mutex::new)
                .map_err(|error| KernelError::map(name, error))
        };
        // Where flows are short-circuited this is no more the object's.
        let short_flows = MapData::from_pin(pins.map("SHORT_FLOWS"))
            .and_then(|data| HashMap::try_from(Map::HashMap(data)))
            .map_err(|error| KernelError::map("SHORT_FLOWS", error))?;
        let pods: HashMap<MapData, u64, Pod> = table!("PODS");
        let quotas = Quotas::open(table!("QUOTAS"), pods.iter().flatten());
        Ok(Self {
            config: Mutex::new(config),
            vouched: AtomicBool::new(false),
            earlier_ns: AtomicU64::new(0),
            pods: Mutex::new(pods),
            endpoints: Mutex::new(table!("ENDPOINTS")),
            verdicts: Mutex::new(table!("VERDICTS")),
            claims: Mutex::new(table!("CLAIMS")),
            quotas: Mutex::new(quotas),
            flows: Mutex::new(table!("FLOWS")),
            lost: Mutex::new(table!("LOST")),
            listeners: Mutex::new(table!("LISTENERS")),
            sockets: Mutex::new(table!("SOCKETS")),
            services: Arc::new(ServiceTables::open(take("SERVICES")?, take("SLOTS")?)?),
            short: ShortCounters::new(short_flows, table!("SHORT_ENDED")),
            losses: Mutex::default(),
            lost_alarms: Mutex::default(),
            isolated: [isolated("ISOLATED_CLIENTS")?, isolated("ISOLATED_SERVERS")?],
            counters: table!("COUNTERS"),
        })
    }

    pub(super) fn configure(&self, settings: &KernelSettings) -> Result<(), KernelError> {
        lock(&self.config)
            .change(|config| {
                self.earlier_ns
                    .store(config.heartbeat_ns, Ordering::Release);
                // Where an earlier agent decided, it is its heartbeat that counts, until this one has decided itself.
                if config.heartbeat_ns == 0 {
                    config.heartbeat_ns = now();
                }
                config.verdict_max_age_ns = nanoseconds(settings.verdict_max_age);
                config.knobs = settings.knobs;
                config.host_netns = settings.host.map_or(0, |host| host.netns.0);
                config.pods_cgroup = settings.host.map_or(0, |host| host.pods_cgroup);
                // An earlier agent may have been killed in the middle of a change: it is over when this one has decided.
                config.flags &= config_flag::CHANGING;
                if !settings.telemetry {
                    config.flags |= config_flag::NO_TELEMETRY;
                }
                if settings.leave_alone {
                    config.flags |= config_flag::LEAVING;
                }
            })
            .map(drop)
    }

    /// While a change is being written no connection is decided by what is half-written: it goes to the agent.
    pub fn set_changing(&self, changing: bool) -> Result<(), KernelError> {
        lock(&self.config)
            .change(|config| {
                if changing {
                    config.flags |= config_flag::CHANGING;
                } else {
                    config.flags &= !config_flag::CHANGING;
                }
            })
            .map(drop)
    }

    /// Tells the hooks that the agent lives; `false` when another agent has taken the tables over.
    ///
    /// Before [`Self::vouch`] it only looks: the verdicts in the tables may be an earlier agent's.
    pub fn beat(&self) -> Result<bool, KernelError> {
        let vouched = self.vouched.load(Ordering::Acquire);
        lock(&self.config).change(|config| {
            if vouched {
                config.heartbeat_ns = now();
            }
        })
    }

    /// When a later agent will take this one to have been last alive, were it to end now.
    pub fn last_beat(&self) -> Duration {
        Duration::from_nanos(lock(&self.config).heartbeat_ns())
    }

    /// When an earlier agent was last alive, by the clock of [`sys::monotonic_now`]: what happened before was told by that one.
    pub fn earlier_agent(&self) -> Duration {
        Duration::from_nanos(self.earlier_ns.load(Ordering::Acquire))
    }

    /// From now on the tables say what this agent decided.
    pub fn vouch(&self) -> Result<bool, KernelError> {
        self.vouched.store(true, Ordering::Release);
        self.beat()
    }

    /// Whether the tables are this agent's. One that is not their owner any more writes nothing: each method that would write
    /// does nothing.
    pub fn is_owner(&self) -> bool {
        lock(&self.config).is_owner()
    }

    /// Undoes what [`Self::open`] did to the owner.
    pub(super) fn give_back(&self) {
        lock(&self.config).give_back();
    }

    /// Enters or changes a pod; what it uses is counted where these tables say, not where `pod` says.
    pub fn put_pod(&self, cookie: NetnsCookie, pod: Pod) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        let quota = lock(&self.quotas).of(cookie)?;
        lock(&self.pods)
            .insert(cookie.0, Pod { quota, ..pod }, 0)
            .map_err(|error| KernelError::map("PODS", error))
    }

    pub fn pods(&self) -> Result<Vec<(NetnsCookie, Pod)>, KernelError> {
        let found = all("PODS", &lock(&self.pods), sys::BatchReads::Copies)?;
        Ok(found
            .into_iter()
            .map(|(cookie, pod)| (NetnsCookie(cookie), pod))
            .collect())
    }

    pub fn remove_pod(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        absent_is_fine("PODS", lock(&self.pods).remove(&cookie.0))?;
        lock(&self.quotas).forget(cookie);
        Ok(())
    }

    pub fn put_endpoint(&self, ip: IpAddr, endpoint: Endpoint) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        lock(&self.endpoints)
            .insert(address(ip), endpoint, 0)
            .map_err(|error| KernelError::map("ENDPOINTS", error))
    }

    pub fn endpoints(&self) -> Result<Vec<(Address, Endpoint)>, KernelError> {
        all("ENDPOINTS", &lock(&self.endpoints), sys::BatchReads::Copies)
    }

    /// Removes the addresses of a namespace that is gone.
    pub fn remove_endpoints_of(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        let gone = self
            .endpoints()?
            .into_iter()
            .filter(|(_, endpoint)| endpoint.netns_cookie == cookie.0);
        for (address, _) in gone {
            absent_is_fine("ENDPOINTS", lock(&self.endpoints).remove(&address))?;
        }
        Ok(())
    }

    pub fn remove_endpoint(&self, ip: IpAddr) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        absent_is_fine("ENDPOINTS", lock(&self.endpoints).remove(&address(ip)))
    }

    pub fn put_verdict(&self, key: VerdictKey, verdict: Verdict) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        lock(&self.verdicts)
            .insert(key, verdict, 0)
            .map_err(|error| KernelError::map("VERDICTS", error))
    }

    pub fn remove_verdict(&self, key: &VerdictKey) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        absent_is_fine("VERDICTS", lock(&self.verdicts).remove(key))
    }

    /// Deletes the verdicts that `is_void` names.
    pub fn sweep_verdicts(
        &self,
        mut is_void: impl FnMut(&VerdictKey, &Verdict) -> bool,
    ) -> Result<usize, KernelError> {
        if !self.is_owner() {
            return Ok(0);
        }
        let verdicts = all("VERDICTS", &lock(&self.verdicts), sys::BatchReads::Copies)?;
        let void: Vec<_> = verdicts
            .iter()
            .filter(|(key, verdict)| is_void(key, verdict))
            .map(|(key, _)| *key)
            .collect();
        delete("VERDICTS", &self.verdicts, &void)?;
        Ok(void.len())
    }

    pub fn remove_verdicts(&self, keys: &[VerdictKey]) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        delete("VERDICTS", &self.verdicts, keys)
    }

    /// Deletes the claims of a pod that has left. Those towards it belong to their clients, and their key is never used again.
    pub fn remove_claims(&self, client: NetnsCookie) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        let claims = all("CLAIMS", &lock(&self.claims), sys::BatchReads::Copies)?;
        let gone: Vec<_> = claims
            .into_iter()
            .filter(|(_, claim)| claim.client_netns == client.0 && claim.quota != Quota::NODE)
            .map(|(key, _)| key)
            .collect();
        delete("CLAIMS", &self.claims, &gone)
    }

    /// Whether there is a connection from or to a pod of which `connect` has decided and `inbound` has not heard.
    pub fn has_claims_under_way(&self, pod: NetnsCookie) -> Result<bool, KernelError> {
        let claims = all("CLAIMS", &lock(&self.claims), sys::BatchReads::Copies)?;
        let mut claims = claims.into_iter();
        Ok(claims.any(|(_, claim)| {
            let is_the_pod_s = claim.client_netns == pod.0 || claim.server_netns == pod.0;
            let is_marked = matches!(claim.kind, claim_kind::DIRECT | claim_kind::STEERED);
            is_the_pod_s && is_marked && claim.admitted == 0
        }))
    }

    /// The direct flows that are open now: each that is open all the while this takes, once.
    pub fn flows(&self) -> Result<Vec<OpenFlow>, KernelError> {
        // To read a large table takes a while, also an empty one.
        if lock(&self.quotas).has_no_flow() {
            return Ok(Vec::new());
        }
        let found = all("FLOWS", &lock(&self.flows), sys::BatchReads::Copies)?;
        Ok(found
            .into_iter()
            .map(|(key, flow)| OpenFlow { key, flow })
            .collect())
    }

    /// A flow, if it is open.
    pub fn flow(&self, key: &FlowKey, sequence: u32) -> Option<OpenFlow> {
        let flow = lock(&self.flows).get(key, 0).ok()?;
        (flow.sequence == sequence).then_some(OpenFlow { key: *key, flow })
    }

    /// The open flow at a key.
    pub fn flow_at(&self, key: &FlowKey) -> Option<OpenFlow> {
        let flow = lock(&self.flows).get(key, 0).ok()?;
        Some(OpenFlow { key: *key, flow })
    }

    /// What short-circuited flows have carried.
    pub fn short(&self) -> &ShortCounters {
        &self.short
    }

    /// How many direct flows are open.
    pub fn open_flows(&self) -> u64 {
        lock(&self.quotas).flows_of_node()
    }

    /// Takes what lost events would have said.
    pub fn take_lost(&self) -> Result<Vec<(LostKey, Lost)>, KernelError> {
        if !self.is_owner() || !lock(&self.losses).may_be_more(self.counter(Reason::EventLost)) {
            return Ok(Vec::new());
        }
        all("LOST", &lock(&self.lost), sys::BatchReads::Takes)
    }

    /// The isolated sockets, and whether each is the client's end, where the alarm of one may have been lost.
    pub fn isolated(&self) -> Vec<(Isolated, bool)> {
        if !self.is_owner() || !lock(&self.lost_alarms).may_be_more(self.counter(Reason::AlarmLost))
        {
            return Vec::new();
        }
        let ends = self.isolated.iter().zip([true, false]);
        let found: Vec<_> = ends
            .flat_map(|(sockets, client_end)| {
                let keys: Vec<_> = lock(sockets).keys().flatten().take(MOST_ISOLATED).collect();
                keys.into_iter().map(move |key| (key, client_end))
            })
            .collect();
        // Whoever is told to destroy them may have too much to do.
        if !found.is_empty() {
            lock(&self.lost_alarms).again = true;
        }
        found
    }

    /// Makes `socket` the listener that `inbound` gives connections of `kind` to.
    pub(super) fn put_listener(
        &self,
        cookie: NetnsCookie,
        kind: u32,
        socket: impl AsFd,
    ) -> Result<(), KernelError> {
        if !self.is_owner() {
            return Ok(());
        }
        let key = Listener {
            netns_cookie: cookie.0,
            kind,
            padding: 0,
        };
        lock(&self.listeners)
            .insert(key, std::os::fd::AsRawFd::as_raw_fd(&socket.as_fd()), 0)
            .map_err(|error| KernelError::map("LISTENERS", error))
    }

    pub(super) fn remove_listener(&self, cookie: NetnsCookie, kind: u32) {
        // Another agent's listener is not ours to remove.
        if !self.is_owner() {
            return;
        }
        let key = Listener {
            netns_cookie: cookie.0,
            kind,
            padding: 0,
        };
        // Closing the socket removes it as well.
        let _ = lock(&self.listeners).remove(&key);
    }

    /// Marks a socket as the agent's own. Nothing else can make this mark.
    pub(super) fn mark_proxy(&self, socket: impl AsFd) -> Result<(), KernelError> {
        let state = SocketState {
            key: FlowKey {
                netns_cookie: 0,
                client: [0; 16],
                server: [0; 16],
                client_port: 0,
                server_port: 0,
                padding: 0,
            },
            generation: 0,
            opened_ns: 0,
            server_netns: 0,
            acked_at_start: 0,
            service_address: [0; 16],
            chosen: [0; 16],
            service_port: 0,
            chosen_port: 0,
            role: role::PROXY,
            workload: 0,
            sequence: 0,
            mark: 0,
            connect_latency_us: 0,
            service: 0,
            reason: 0,
            established: 0,
            identity: 0,
            pod: 0,
            quota: Quota::NODE,
            exchanges: 0,
            padding: 0,
        };
        lock(&self.sockets)
            .insert(&std::os::fd::AsRawFd::as_raw_fd(&socket.as_fd()), state, 0)
            .map_err(|error| KernelError::map("SOCKETS", error))
    }

    /// The tables of services.
    pub fn services(&self) -> &Arc<ServiceTables> {
        &self.services
    }

    /// What `connect` knew of a connection that it steered, read from the socket that the agent accepted.
    pub fn steered(&self, accepted: impl AsFd) -> Steered {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&accepted.as_fd());
        // Without it the agent chooses, and nobody is told why it had to.
        let Ok(state) = lock(&self.sockets).get(&fd, 0) else {
            return Steered::default();
        };
        Steered {
            chosen: (state.chosen_port != 0)
                .then(|| socket_address(state.chosen, state.chosen_port)),
            reason: Reason::from_index(state.reason).filter(|reason| *reason != Reason::Direct),
        }
    }

    /// How often each reason was counted since the maps were made, over all CPUs.
    pub fn counters(&self) -> Vec<(Reason, u64)> {
        Reason::ALL
            .into_iter()
            .map(|reason| (reason, self.counter(reason)))
            .collect()
    }

    fn counter(&self, reason: Reason) -> u64 {
        self.counters
            .get(&(reason as u32), 0)
            .map_or(0, |values| values.iter().sum())
    }
}

/// Whether there is anything to take: the table of what was lost is large, and nearly always empty.
#[derive(Debug, Default)]
struct Losses {
    /// How many were lost when it was last looked; `None` before.
    seen: Option<u64>,
    /// A loss is counted before it is entered: it may have been missed.
    again: bool,
}

impl Losses {
    fn may_be_more(&mut self, lost: u64) -> bool {
        let more = self.seen != Some(lost);
        self.seen = Some(lost);
        std::mem::replace(&mut self.again, more) || more
    }
}

/// Everything in a table.
pub(super) fn all<K: aya::Pod, V: aya::Pod>(
    name: &'static str,
    table: &HashMap<MapData, K, V>,
    reads: sys::BatchReads,
) -> Result<Vec<(K, V)>, KernelError> {
    let mut found = Vec::new();
    let mut cursor = sys::BatchCursor::Start;
    while cursor != sys::BatchCursor::End {
        sys::map_batch(table, reads, &mut cursor, AT_ONCE, &mut found)
            .map_err(|error| KernelError::map(name, error))?;
    }
    Ok(found)
}

/// Deletes entries of a table, as far as they are there.
fn delete<K: aya::Pod, V: aya::Pod>(
    name: &'static str,
    table: &Mutex<HashMap<MapData, K, V>>,
    keys: &[K],
) -> Result<(), KernelError> {
    keys.chunks(AT_ONCE as usize).try_for_each(|keys| {
        sys::map_delete_batch(&lock(table), keys).map_err(|error| KernelError::map(name, error))
    })
}

/// Empties a table.
pub(super) fn clear<K: aya::Pod, V: aya::Pod>(
    name: &'static str,
    table: &Mutex<HashMap<MapData, K, V>>,
) -> Result<(), KernelError> {
    all(name, &lock(table), sys::BatchReads::Takes).map(drop)
}

/// An address as the eBPF programs hold it.
pub(crate) fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// The inverse of [`address`], with a port.
pub fn socket_address(address: Address, port: u16) -> SocketAddr {
    let ip = Ipv6Addr::from(address);
    let ip = ip
        .to_ipv4_mapped()
        .map_or(IpAddr::V6(ip), |ip: Ipv4Addr| IpAddr::V4(ip));
    SocketAddr::new(ip, port)
}

pub(super) fn absent_is_fine(
    name: &'static str,
    result: Result<(), MapError>,
) -> Result<(), KernelError> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(())
        }
        Err(error) => Err(KernelError::map(name, error)),
    }
}

fn now() -> u64 {
    nanoseconds(sys::monotonic_now())
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A poisoned lock guards a map handle, which a panic cannot leave half-written.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
