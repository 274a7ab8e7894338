//! Connections: claims while they are made, flows while they live, events when something happened to them.

use crate::Address;

/// A connection as it looks to the namespace in which its SYN is looked up.
///
/// The namespace is part of the key: a steered connection, and the agent's connection that continues it in the
/// destination's namespace, have the same addresses and ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey {
    /// Cookie of the namespace that the SYN arrives in.
    pub netns_cookie: u64,
    pub client: Address,
    pub server: Address,
    pub client_port: u16,
    pub server_port: u16,
    pub padding: u32,
}

/// What the kernel saw when a connection was opened: its sequence number is not known to anybody who did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Claim {
    pub client_netns: u64,
    pub server_netns: u64,
    pub generation: u64,
    pub opened_ns: u64,
    pub socket_cookie: u64,
    pub kind: u32,
    pub sequence: u32,
    pub workload: u32,
    pub source_identity: u32,
    pub source_pod: u32,
    /// Non-zero once `inbound` of the destination has let the SYN through to the application.
    pub admitted: u32,
}

pub mod claim_kind {
    pub const DIRECT: u32 = 1;
    pub const STEERED: u32 = 2;
    pub const PROXY: u32 = 3;
    /// A pod's connection to its own address.
    pub const OWN_ADDRESS: u32 = 4;
}

/// An established direct flow: what revocation walks through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Flow {
    pub client_netns: u64,
    pub server_netns: u64,
    pub generation: u64,
    pub opened_ns: u64,
    pub client_socket: u64,
    pub server_socket: u64,
    pub sequence: u32,
    pub workload: u32,
    pub source_identity: u32,
    pub source_pod: u32,
    pub reserved: u64,
}

/// Socket storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SocketState {
    pub key: FlowKey,
    pub generation: u64,
    pub opened_ns: u64,
    pub server_netns: u64,
    /// `bytes_received` when FIN_WAIT2 was entered: tells whether a FIN came after.
    pub received_at_fin_wait: u64,
    /// `bytes_acked` when the connection was established (the SYN counts as one).
    pub acked_at_start: u64,
    pub role: u32,
    pub workload: u32,
    pub sequence: u32,
    /// The mark the socket had before it was steered.
    pub mark: u32,
    /// Non-zero once our own FIN was acknowledged.
    pub fin_acked: u32,
    pub connect_latency_us: u32,
    pub reserved: u64,
}

/// What a socket is to us. Only user space of the agent can make a `PROXY`.
pub mod role {
    pub const NONE: u32 = 0;
    pub const PROXY: u32 = 1;
    pub const DIRECT: u32 = 2;
    pub const STEERED: u32 = 3;
    pub const OWN_ADDRESS: u32 = 4;
    /// The accepted end of a direct flow.
    pub const ACCEPTED: u32 = 5;
}

/// Key of the agent's listeners in a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Listener {
    pub netns_cookie: u64,
    pub kind: u32,
    pub padding: u32,
}

pub mod listener_kind {
    pub const OUTBOUND: u32 = 1;
    pub const INBOUND: u32 = 2;
    pub const HBONE: u32 = 3;
}

/// One entry of the ring buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    pub key: FlowKey,
    pub client_netns: u64,
    pub opened_ns: u64,
    pub at_ns: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub generation: u64,
    pub kind: u32,
    /// A [`crate::Reason`], where there is one.
    pub reason: u32,
    pub workload: u32,
    pub sequence: u32,
    /// Smoothed round-trip time, microseconds.
    pub srtt_us: u32,
    pub retransmits: u32,
    pub connect_latency_us: u32,
    /// The TCP state that the client's socket left when it closed.
    pub last_state: u32,
    /// Number of the policy that refused, 0 when none did.
    pub policy: u32,
    pub padding: u32,
    /// The isolated socket, and the namespace it is in.
    pub socket_cookie: u64,
    pub socket_netns: u64,
    /// 1 if the isolated socket is the client's end.
    pub client_end: u64,
}

pub mod event_kind {
    pub const OPENED: u32 = 1;
    pub const CLOSED: u32 = 2;
    pub const REFUSED: u32 = 3;
    /// A connection was cut off from its application and must be destroyed.
    pub const ISOLATED: u32 = 4;
}
