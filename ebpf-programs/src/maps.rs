//! Every map, and the few accesses that all hooks share.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE,
        bpf_map_type::BPF_MAP_TYPE_SK_STORAGE,
    },
    btf_maps::{Array, HashMap, PerCpuArray, RingBuf, SockHash},
    helpers::generated::{bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_get},
    macros::btf_map,
};
use culvert_abi::{
    Address, Candidate, Claim, Config, Endpoint, Event, Flow, FlowKey, Isolated, Listener, Lost,
    LostKey, Pod, Quota, REASON_COUNT, Reason, Service, ServiceKey, ShortEnd, ShortFlow, ShortName,
    ShortSide, Slot, SlotKey, SocketState, Verdict, VerdictKey,
};

const DEMAND: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static CONFIG: Array<Config, 1> = Array::new();
#[btf_map]
pub static PODS: HashMap<u64, Pod, 4096, DEMAND> = HashMap::new();
#[btf_map]
pub static ENDPOINTS: HashMap<Address, Endpoint, 16384, DEMAND> = HashMap::new();
#[btf_map]
pub static VERDICTS: HashMap<VerdictKey, Verdict, 262144, DEMAND> = HashMap::new();
#[btf_map]
pub static CLAIMS: HashMap<FlowKey, Claim, 262144, DEMAND> = HashMap::new();
/// Services that have an endpoint on this node.
#[btf_map]
pub static SERVICES: HashMap<ServiceKey, Service, 65536, DEMAND> = HashMap::new();
#[btf_map]
pub static SLOTS: HashMap<SlotKey, Slot, 262144, DEMAND> = HashMap::new();
/// Claims in flight and flows per pod. Counted by the kernel part; the agent sets an entry back when it gives it to a pod. An
/// array: it costs no look-up.
#[btf_map]
pub static QUOTAS: Array<Quota, { Quota::COUNT as usize }> = Array::new();
#[btf_map]
pub static FLOWS: HashMap<FlowKey, Flow, 262144, DEMAND> = HashMap::new();
#[btf_map]
pub static LISTENERS: SockHash<Listener, 16384> = SockHash::new();
/// Sockets cut off from their applications: see `isolation.rs`. What a pod can do to its own sockets takes no room from those
/// that others connect to.
#[btf_map]
pub static ISOLATED_CLIENTS: SockHash<Isolated, 65536> = SockHash::new();
#[btf_map]
pub static ISOLATED_SERVERS: SockHash<Isolated, 65536> = SockHash::new();
#[btf_map]
pub static EVENTS: RingBuf<Event, { 1 << 21 }> = RingBuf::new();
/// Events that must not be lost among the ordinary ones.
#[btf_map]
pub static ALARMS: RingBuf<Event, { 1 << 18 }> = RingBuf::new();
/// What lost events would have said, by client, server and service.
#[btf_map]
pub static LOST: HashMap<LostKey, Lost, 4096, DEMAND> = HashMap::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { REASON_COUNT as usize }> = PerCpuArray::new();
#[btf_map]
pub static SOCKETS: SocketStorage<SocketState> = SocketStorage::new();

/// The sockets of short-circuited flows, by their cookies. An entry leaves with its socket.
#[btf_map]
pub static SHORT_SOCKETS: SockHash<u64, 131072> = SockHash::new();
#[btf_map]
pub static SHORT_ENDS: SocketStorage<ShortEnd> = SocketStorage::new();
#[btf_map]
pub static SHORT_FLOWS: HashMap<FlowKey, ShortFlow, 65536, DEMAND> = HashMap::new();
/// What flows that have ended had counted in `SHORT_FLOWS`, both ends together; nothing but counts.
#[btf_map]
pub static SHORT_ENDED: Array<ShortSide, 1> = Array::new();
#[btf_map]
pub static SHORT_NAMES: HashMap<u64, ShortName, 131072, DEMAND> = HashMap::new();
/// Pods that read in ways that do not see redirected bytes.
#[btf_map]
pub static UNFIT: HashMap<u64, u32, 4096, DEMAND> = HashMap::new();
#[btf_map]
pub static CANDIDATES: RingBuf<Candidate, { 1 << 18 }> = RingBuf::new();

/// Socket storage that an accepted socket inherits from its listener: so the agent marks a listener once.
#[repr(C)]
pub struct SocketStorage<T> {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the fields are type information for the loader; nothing reads or writes them.
unsafe impl<T> Sync for SocketStorage<T> {}

impl<T> SocketStorage<T> {
    const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }

    /// The socket's state, if it has one. `sk` is the context's socket and may be null.
    #[inline(always)]
    pub fn find(&self, sk: *mut c_void) -> Option<&mut T> {
        if sk.is_null() {
            return None;
        }
        // SAFETY: the helper returns null or memory that lives as long as the socket, which outlives the program.
        unsafe {
            bpf_sk_storage_get(self.address(), sk, ptr::null_mut(), 0)
                .cast::<T>()
                .as_mut()
        }
    }

    /// The socket's state, zeroed when it is new.
    #[inline(always)]
    pub fn find_or_create(&self, sk: *mut c_void) -> Option<&mut T> {
        if sk.is_null() {
            return None;
        }
        let flags = u64::from(BPF_SK_STORAGE_GET_F_CREATE);
        // SAFETY: as in `find`.
        unsafe {
            bpf_sk_storage_get(self.address(), sk, ptr::null_mut(), flags)
                .cast::<T>()
                .as_mut()
        }
    }

    #[inline(always)]
    fn address(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }
}

/// Times that an entry which is being replaced is read again.
const ATTEMPTS: usize = 4;

/// A pod; `Err` when its entry is replaced faster than it can be read.
///
/// Looked up twice: the kernel gives the memory of an entry that was replaced to the next one at once, so that only what was
/// read between two look-ups with the same result is known to belong to the key.
#[inline(always)]
pub fn pod(netns_cookie: u64) -> Result<Option<Pod>, Reason> {
    for _ in 0..ATTEMPTS {
        let Some(found) = PODS.get_ptr(&netns_cookie) else {
            return Ok(None);
        };
        // SAFETY: map memory stays mapped while the program runs; a copy.
        let copy = unsafe { ptr::read_volatile(found) };
        if PODS.get_ptr(&netns_cookie) == Some(found) && copy.netns_cookie == netns_cookie {
            return Ok(Some(copy));
        }
    }
    Err(Reason::RefusedUnsettled)
}

#[inline(always)]
pub fn is_pod(netns_cookie: u64) -> bool {
    PODS.get_ptr(&netns_cookie).is_some()
}

/// A cached decision, looked up twice for the same reason.
#[inline(always)]
pub fn verdict(key: &VerdictKey) -> Option<Verdict> {
    let found = VERDICTS.get_ptr(key)?;
    // SAFETY: as in `pod`.
    let copy = unsafe { ptr::read_volatile(found) };
    let again = VERDICTS.get_ptr(key)?;
    (found == again).then_some(copy)
}

/// Whether the agent listens for connections of `kind` in a pod.
#[inline(always)]
pub fn listens(netns_cookie: u64, kind: u32) -> bool {
    let key = Listener {
        netns_cookie,
        kind,
        padding: 0,
    };
    // SAFETY: the helper returns null or a socket with a reference that is given back at once.
    unsafe {
        let socket = bpf_map_lookup_elem(
            (&raw const LISTENERS).cast_mut().cast(),
            (&raw const key).cast(),
        );
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket);
    }
    true
}

#[inline(always)]
pub fn count(reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: a slot of this CPU in a per-CPU array.
        unsafe { *counter = (*counter).wrapping_add(1) };
    }
}

/// Whether a bit of [`culvert_abi::config_flag`] is set.
#[inline(always)]
pub fn flag(bit: u32) -> bool {
    CONFIG.get(0).is_some_and(|config| config.flags & bit != 0)
}

/// Whether a test has switched this protection off.
#[inline(always)]
pub fn knob(bit: u32) -> bool {
    CONFIG.get(0).is_some_and(|config| config.knobs & bit != 0)
}
