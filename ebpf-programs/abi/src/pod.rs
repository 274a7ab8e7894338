//! Who is in the mesh on this node.

/// What all hooks need to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Config {
    /// `CLOCK_MONOTONIC` ns at which the agent last said that it lives.
    pub heartbeat_ns: u64,
    /// Verdicts admit no new flow when the heartbeat is older than this.
    pub verdict_max_age_ns: u64,
    /// Cookie of the node's own namespace, 0 when its processes are like any other.
    pub host_netns: u64,
    /// The cgroup below which pods live: a process there is never the node's.
    pub pods_cgroup: u64,
    /// Start time of the agent that owns the maps (`/proc/PID/stat`, field 22): tells a process id that is used again.
    pub owner_started: u64,
    pub owner_pid: u32,
    /// Bits of [`knob`]; always 0 outside tests.
    pub knobs: u32,
    /// Bits of [`config_flag`].
    pub flags: u32,
    pub padding: u32,
    pub reserved: [u64; 2],
}

pub mod config_flag {
    /// A change of policy is being written: whether a flow may be direct is not known at this moment.
    pub const CHANGING: u32 = 1 << 0;
    /// The kernel part is being taken away: every connection is left alone.
    pub const LEAVING: u32 = 1 << 1;
    /// Flows are not reported.
    pub const NO_TELEMETRY: u32 = 1 << 2;
}

/// Protections that a test switches off, one at a time, to show that it would notice.
pub mod knob {
    pub const SKIP_SEQUENCE: u32 = 1 << 0;
    pub const KEEP_CLAIMS: u32 = 1 << 1;
    pub const SKIP_GENERATION: u32 = 1 << 2;
    pub const UNKNOWN_VERDICT_ALLOWS: u32 = 1 << 3;
    pub const PASS_UNCLAIMED: u32 = 1 << 4;
    pub const PASS_OWN_PORTS: u32 = 1 << 5;
    pub const SKIP_ISOLATION: u32 = 1 << 6;
    pub const DENY_ALLOWS: u32 = 1 << 7;
    pub const SKIP_STEERING: u32 = 1 << 8;
    pub const MISSING_LISTENER_PASSES: u32 = 1 << 9;
    pub const SKIP_ADMITTED: u32 = 1 << 10;
    pub const SKIP_QUOTAS: u32 = 1 << 11;
    pub const HOST_PODS_ARE_NODE: u32 = 1 << 12;
    pub const SKIP_SLOT_CHECK: u32 = 1 << 13;
    pub const SKIP_CHANGING: u32 = 1 << 14;
    pub const SKIP_SOURCE_CHECK: u32 = 1 << 15;
    pub const SKIP_CLAIM_SOURCE: u32 = 1 << 16;
    /// No protection: flows are short-circuited from their first round trip on, as early as can be.
    pub const EAGER_SHORT_CIRCUIT: u32 = 1 << 17;
    pub const SKIP_UNREAD: u32 = 1 << 18;
    pub const SKIP_READERS: u32 = 1 << 19;
    pub const SKIP_LIMIT: u32 = 1 << 20;
    pub const SKIP_READER_FLAGS: u32 = 1 << 21;
    pub const SKIP_WAITERS: u32 = 1 << 22;
    /// No protection: as if the node had little memory left for TCP.
    pub const LITTLE_MEMORY: u32 = 1 << 23;
    pub const SKIP_CALLS: u32 = 1 << 24;
}

/// An enrolled pod; the key is its netns cookie. Its addresses are those of [`Endpoint`]s with that cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Pod {
    /// The key once more: tells a reader that the memory it looks at has not become another pod's.
    pub netns_cookie: u64,
    pub identity: u32,
    /// Number of this pod on this node, for verdicts of scope `POD`.
    pub pod: u32,
    pub flags: u32,
    /// Which view of the services it has: see [`crate::ServiceKey`].
    pub view: u32,
    /// Indexes of devices for which the pod has a route: a socket bound to one can be steered.
    pub devices: [u32; Pod::DEVICES],
    /// Where what it uses is counted: an index of [`Quota`]s, of this pod alone.
    pub quota: u32,
    pub padding: u32,
}

impl Pod {
    /// The pod's traffic always goes through the agent.
    pub const NO_DIRECT: u32 = 1 << 0;
    /// Some of its flows may be short-circuited, where the other end's may as well: which ports' is the agent's business.
    pub const SHORT_CIRCUIT: u32 = 1 << 1;

    pub const DEVICES: usize = 4;
}

/// What a pod has used up, at the index that its [`Pod`] entry names. Index [`Quota::NODE`] counts the flows of the whole node,
/// and the claims of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Quota {
    /// Claims in flight.
    pub claims: i64,
    /// Direct flows that the pod opened.
    pub flows: i64,
    /// When the second began in which refusals are counted, and how many were reported in it.
    pub window_ns: u64,
    pub refusals: u64,
}

impl Quota {
    pub const NODE: u32 = 0;
    /// Processes of the node, outside all pods.
    pub const HOST: u32 = 1;
    /// The first of a pod.
    pub const FIRST_POD: u32 = 2;
    /// How many there are: one for each of the most pods that a node can have, and those above.
    pub const COUNT: u32 = Self::FIRST_POD + 4096;
}

/// Refusals of one pod that are reported in a second.
pub const REFUSALS_PER_SECOND: u64 = 100;

/// A destination on this node; the key is its address. A pod with several addresses has one for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Endpoint {
    pub netns_cookie: u64,
    /// Number of the workload at this address, never used for anything else.
    pub workload: u32,
    pub flags: u32,
    /// Bumped when a policy, an identity or the pod itself changes.
    pub generation: u64,
}

impl Endpoint {
    /// Every connection goes through the agent: not HBONE-capable, or behind a waypoint.
    pub const STEER: u32 = 1 << 0;
    /// Verdicts are per source pod instead of per source identity.
    pub const BY_POD: u32 = 1 << 1;
    /// As [`Pod::SHORT_CIRCUIT`].
    pub const SHORT_CIRCUIT: u32 = 1 << 2;
}
