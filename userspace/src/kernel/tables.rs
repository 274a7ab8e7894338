//! The maps that the agent writes and reads, with the types of `culvert_abi`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, SkStorage, SockHash};
use culvert_abi::{
    Address, Claim, Config, Endpoint, Flow, FlowKey, Listener, Pod, Quota, Reason, SocketState,
    Verdict, VerdictKey, role,
};

use super::{KernelError, NetnsCookie, sys};

/// Flag of `bpf_map_update_elem`: only if the key is new.
const BPF_NOEXIST: u64 = 1;

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
}

/// Every table, each behind its own lock: calls are single system calls and never wait for anything else.
pub struct Tables {
    config: Mutex<(Array<MapData, Config>, Config)>,
    pods: Mutex<HashMap<MapData, u64, Pod>>,
    endpoints: Mutex<HashMap<MapData, Address, Endpoint>>,
    verdicts: Mutex<HashMap<MapData, VerdictKey, Verdict>>,
    claims: Mutex<HashMap<MapData, FlowKey, Claim>>,
    quotas: Mutex<HashMap<MapData, u64, Quota>>,
    flows: Mutex<HashMap<MapData, FlowKey, Flow>>,
    listeners: Mutex<SockHash<MapData, Listener>>,
    sockets: Mutex<SkStorage<MapData, SocketState>>,
    counters: PerCpuArray<MapData, u64>,
}

impl Tables {
    pub(super) fn open(
        mut take: impl FnMut(&'static str) -> Result<Map, KernelError>,
    ) -> Result<Self, KernelError> {
        macro_rules! table {
            ($name:literal) => {
                take($name)?
                    .try_into()
                    .map_err(|error: MapError| KernelError::map($name, error))?
            };
        }
        let nothing = Config {
            heartbeat_ns: 0,
            verdict_max_age_ns: 0,
            knobs: 0,
            padding: 0,
            reserved: [0; 2],
        };
        Ok(Self {
            config: Mutex::new((table!("CONFIG"), nothing)),
            pods: Mutex::new(table!("PODS")),
            endpoints: Mutex::new(table!("ENDPOINTS")),
            verdicts: Mutex::new(table!("VERDICTS")),
            claims: Mutex::new(table!("CLAIMS")),
            quotas: Mutex::new(table!("QUOTAS")),
            flows: Mutex::new(table!("FLOWS")),
            listeners: Mutex::new(table!("LISTENERS")),
            sockets: Mutex::new(table!("SOCKETS")),
            counters: table!("COUNTERS"),
        })
    }

    pub(super) fn configure(
        &self,
        verdict_max_age: Duration,
        knobs: u32,
    ) -> Result<(), KernelError> {
        {
            let mut config = lock(&self.config);
            config.1.verdict_max_age_ns = nanoseconds(verdict_max_age);
            config.1.knobs = knobs;
        }
        self.beat()
    }

    /// Tells the hooks that the agent lives.
    pub fn beat(&self) -> Result<(), KernelError> {
        let mut config = lock(&self.config);
        config.1.heartbeat_ns = nanoseconds(sys::monotonic_now());
        let value = config.1;
        config
            .0
            .set(0, value, 0)
            .map_err(|error| KernelError::map("CONFIG", error))
    }

    /// Enters or changes a pod.
    pub fn put_pod(&self, cookie: NetnsCookie, pod: Pod) -> Result<(), KernelError> {
        // A count that is there is the kernel part's business.
        match lock(&self.quotas).insert(
            cookie.0,
            Quota {
                claims: 0,
                window_ns: 0,
                refusals: 0,
            },
            BPF_NOEXIST,
        ) {
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::EEXIST) => {}
            result => result.map_err(|error| KernelError::map("QUOTAS", error))?,
        }
        lock(&self.pods)
            .insert(cookie.0, pod, 0)
            .map_err(|error| KernelError::map("PODS", error))
    }

    pub fn pods(&self) -> Vec<(NetnsCookie, Pod)> {
        lock(&self.pods)
            .iter()
            .flatten()
            .map(|(cookie, pod)| (NetnsCookie(cookie), pod))
            .collect()
    }

    pub fn remove_pod(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        absent_is_fine("PODS", lock(&self.pods).remove(&cookie.0))?;
        absent_is_fine("QUOTAS", lock(&self.quotas).remove(&cookie.0))
    }

    pub fn put_endpoint(&self, ip: IpAddr, endpoint: Endpoint) -> Result<(), KernelError> {
        lock(&self.endpoints)
            .insert(address(ip), endpoint, 0)
            .map_err(|error| KernelError::map("ENDPOINTS", error))
    }

    pub fn endpoints(&self) -> Vec<(Address, Endpoint)> {
        lock(&self.endpoints).iter().flatten().collect()
    }

    /// Removes the addresses of a namespace that is gone.
    pub fn remove_endpoints_of(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        let gone = self
            .endpoints()
            .into_iter()
            .filter(|(_, endpoint)| endpoint.netns_cookie == cookie.0);
        for (address, _) in gone {
            absent_is_fine("ENDPOINTS", lock(&self.endpoints).remove(&address))?;
        }
        Ok(())
    }

    pub fn remove_endpoint(&self, ip: IpAddr) -> Result<(), KernelError> {
        absent_is_fine("ENDPOINTS", lock(&self.endpoints).remove(&address(ip)))
    }

    pub fn put_verdict(&self, key: VerdictKey, verdict: Verdict) -> Result<(), KernelError> {
        lock(&self.verdicts)
            .insert(key, verdict, 0)
            .map_err(|error| KernelError::map("VERDICTS", error))
    }

    /// Deletes the verdicts that `is_void` names.
    pub fn sweep_verdicts(
        &self,
        mut is_void: impl FnMut(&VerdictKey, &Verdict) -> bool,
    ) -> Result<usize, KernelError> {
        let mut verdicts = lock(&self.verdicts);
        let void: Vec<_> = verdicts
            .iter()
            .flatten()
            .filter(|(key, verdict)| is_void(key, verdict))
            .map(|(key, _)| key)
            .collect();
        for key in &void {
            absent_is_fine("VERDICTS", verdicts.remove(key))?;
        }
        Ok(void.len())
    }

    /// Deletes the claims of a pod that leaves. Those towards it belong to their clients, and their key is never used again.
    pub fn remove_claims(&self, client: NetnsCookie) -> Result<(), KernelError> {
        let mut claims = lock(&self.claims);
        let gone: Vec<_> = claims
            .iter()
            .flatten()
            .filter(|(_, claim)| claim.client_netns == client.0)
            .map(|(key, _)| key)
            .collect();
        for key in &gone {
            absent_is_fine("CLAIMS", claims.remove(key))?;
        }
        Ok(())
    }

    pub fn flows(&self) -> Vec<OpenFlow> {
        lock(&self.flows)
            .iter()
            .flatten()
            .map(|(key, flow)| OpenFlow { key, flow })
            .collect()
    }

    /// Makes `socket` the listener that `inbound` gives connections of `kind` to.
    pub(super) fn put_listener(
        &self,
        cookie: NetnsCookie,
        kind: u32,
        socket: impl AsFd,
    ) -> Result<(), KernelError> {
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
            received_at_fin_wait: 0,
            acked_at_start: 0,
            role: role::PROXY,
            workload: 0,
            sequence: 0,
            mark: 0,
            fin_acked: 0,
            connect_latency_us: 0,
            reserved: 0,
        };
        lock(&self.sockets)
            .insert(&std::os::fd::AsRawFd::as_raw_fd(&socket.as_fd()), state, 0)
            .map_err(|error| KernelError::map("SOCKETS", error))
    }

    /// How often each reason was counted since the maps were made, over all CPUs.
    pub fn counters(&self) -> Vec<(Reason, u64)> {
        Reason::ALL
            .into_iter()
            .map(|reason| {
                let total = self
                    .counters
                    .get(&(reason as u32), 0)
                    .map_or(0, |values| values.iter().sum());
                (reason, total)
            })
            .collect()
    }
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

fn absent_is_fine(name: &'static str, result: Result<(), MapError>) -> Result<(), KernelError> {
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

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A poisoned lock guards a map handle, which a panic cannot leave half-written.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
