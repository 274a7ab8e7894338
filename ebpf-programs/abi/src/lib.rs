//! Layouts of every map that the eBPF programs and the agent share.
//!
//! Invariants: `repr(C)`, padding explicit and zero, no `bool`, `Option` or Rust enum in a map value (any bit pattern
//! that the other side reads is a valid value of its type), size and alignment asserted. A change of any layout needs
//! a new [`LAYOUT_VERSION`]: pinned maps outlive the agent that made them.
#![no_std]

mod flow;
mod pod;
mod reason;
mod service;
mod short_circuit;
mod verdict;

pub use flow::{
    Claim, Event, Flow, FlowKey, Isolated, Listener, Lost, LostKey, SocketState, claim_kind, end,
    event_kind, listener_kind, role, short_state,
};
pub use pod::{Config, Endpoint, Pod, Quota, REFUSALS_PER_SECOND, config_flag, knob};
pub use reason::{REASON_COUNT, Reason};
pub use service::{Service, ServiceKey, Slot, SlotKey};
pub use short_circuit::{
    Candidate, ShortEnd, ShortFlow, ShortName, ShortRequest, ShortSide, fit, kept, news, step,
    unfit,
};
pub use verdict::{Verdict, VerdictKey, action, scope};

/// Part of the pin path; an agent adopts only maps of its own version.
pub const LAYOUT_VERSION: u32 = 7;

/// An IP address as 16 bytes in network order; IPv4 is held IPv4-mapped (`::ffff:a.b.c.d`).
pub type Address = [u8; 16];

/// Most claims one pod may have in flight; more are refused, so that a pod harms only itself.
pub const CLAIMS_PER_POD: i64 = 4096;

/// Most claims that the agent may have in flight towards applications, of all pods together: what comes into a pod takes
/// nothing of what the pod itself may open.
pub const CLAIMS_OF_AGENT: i64 = 65_536;

/// Most direct flows that one pod may have opened; more go through the agent.
pub const FLOWS_PER_POD: i64 = 32_768;

/// Most direct flows of a node; more go through the agent. Below the size of the map by what fifteen pods may have in flight, so that
/// one which `connect` has let pass finds room. Each change of a policy walks through the map, also through what is empty.
pub const FLOWS_PER_NODE: i64 = 200_000;

/// Mark that `connect` puts on a steered socket; the pod's rule routes it to the loopback device.
///
/// One bit away from istio-cni's packet mark: one rule does for both, and every rule is paid for with every look-up of a route.
pub const STEER_MARK: u32 = 0x53b;

/// The bits of a packet mark that are ours (istio-cni uses the same mask).
pub const MARK_MASK: u32 = 0xfff;

/// Ports of the agent inside a pod.
pub const OUTBOUND_PORT: u16 = 15001;
pub const INBOUND_PORT: u16 = 15006;
pub const HBONE_PORT: u16 = 15008;
pub const DNS_PORT: u16 = 15053;
/// Every port of a pod that belongs to the agent; traffic of the mesh may not name them.
/// (15020 and 15021 are the agent's in its own namespace; in a pod they are the application's, a gateway's for example.)
pub const OWN_PORTS: [u16; 4] = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT];

/// An IPv4 address, given in network byte order, as an [`Address`].
#[inline(always)]
pub const fn mapped(ip4: u32) -> Address {
    let [a, b, c, d] = ip4.to_ne_bytes();
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

macro_rules! layout {
    ($($name:ident: $size:literal),* $(,)?) => {
        $(const _: () = assert!(size_of::<$name>() == $size && align_of::<$name>() == 8);)*
        #[cfg(feature = "user")]
        mod user {
            // SAFETY: `repr(C)`, only integers and arrays of integers, no implicit padding (the sizes above are the
            // sums of the fields), so every bit pattern is valid and every byte initialised.
            $(unsafe impl aya::Pod for super::$name {})*
        }
    };
}

layout! {
    FlowKey: 48,
    Claim: 96,
    Flow: 72,
    SocketState: 168,
    Listener: 16,
    Event: 160,
    Isolated: 64,
    LostKey: 32,
    Lost: 40,
    Config: 72,
    Pod: 48,
    Quota: 32,
    Endpoint: 24,
    VerdictKey: 16,
    Verdict: 16,
    ServiceKey: 24,
    Service: 16,
    SlotKey: 16,
    Slot: 32,
    ShortEnd: 96,
    ShortSide: 104,
    ShortFlow: 224,
    ShortName: 56,
    Candidate: 56,
    ShortRequest: 120,
}
