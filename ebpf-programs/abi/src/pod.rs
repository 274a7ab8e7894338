//! Who is in the mesh on this node.

use crate::Address;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Config {
    /// `CLOCK_MONOTONIC` ns at which the agent last said that it lives.
    pub heartbeat_ns: u64,
    /// Verdicts admit no new flow when the heartbeat is older than this.
    pub verdict_max_age_ns: u64,
    /// Bits of [`knob`]; always 0 outside tests.
    pub knobs: u32,
    pub padding: u32,
    pub reserved: [u64; 2],
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
}

/// An enrolled pod; the key is its netns cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Pod {
    pub address: Address,
    pub identity: u32,
    pub workload: u32,
    /// Number of this pod on this node, for verdicts of scope `POD`.
    pub pod: u32,
    pub flags: u32,
    /// Index of the pod's device: a socket bound to it can be steered, one bound to another cannot.
    pub device: u32,
    pub padding: u32,
}

impl Pod {
    /// The pod's traffic always goes through the agent.
    pub const NO_DIRECT: u32 = 1 << 0;
}

/// What a pod has used up; the key is its netns cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Quota {
    /// Claims in flight.
    pub claims: i64,
    /// When the second began in which refusals are counted, and how many were reported in it.
    pub window_ns: u64,
    pub refusals: u64,
}

/// Refusals of one pod that are reported in a second.
pub const REFUSALS_PER_SECOND: u64 = 100;

/// A destination on this node; the key is its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Endpoint {
    pub netns_cookie: u64,
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
}
