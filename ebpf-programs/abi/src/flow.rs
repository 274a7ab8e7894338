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
    /// The endpoint that `connect` chose for a steered connection to a service; port 0 for none.
    pub chosen: Address,
    pub kind: u32,
    pub sequence: u32,
    pub workload: u32,
    pub source_identity: u32,
    pub source_pod: u32,
    /// Non-zero once `inbound` of the destination has let the SYN through to the application.
    pub admitted: u32,
    /// Number of the service that was connected to, 0 for none.
    pub service: u32,
    /// Why the connection was steered: a [`crate::Reason`].
    pub reason: u32,
    pub chosen_port: u16,
    pub padding: u16,
    /// At whose expense it is: an index of [`crate::Quota`]s.
    pub quota: u32,
}

pub mod claim_kind {
    pub const DIRECT: u32 = 1;
    pub const STEERED: u32 = 2;
    pub const PROXY: u32 = 3;
    /// A pod's connection to its own address.
    pub const OWN_ADDRESS: u32 = 4;
    /// A process of the node, outside all pods: kubelet's probes.
    pub const NODE: u32 = 5;
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
    /// Number of the service that was connected to, 0 for none.
    pub service: u32,
    /// At whose expense it is: an index of [`crate::Quota`]s.
    pub quota: u32,
}

/// Socket storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SocketState {
    pub key: FlowKey,
    pub generation: u64,
    pub opened_ns: u64,
    pub server_netns: u64,
    /// `bytes_acked` when the connection was established (the SYN counts as one).
    pub acked_at_start: u64,
    /// The service address that the application connected to; port 0 for none.
    pub service_address: Address,
    /// The endpoint that `connect` chose for it. On a socket that the agent accepted: for the connection it continues.
    pub chosen: Address,
    pub service_port: u16,
    pub chosen_port: u16,
    pub role: u32,
    pub workload: u32,
    pub sequence: u32,
    /// The mark the socket had before it was steered.
    pub mark: u32,
    pub connect_latency_us: u32,
    /// Number of the service, 0 for none.
    pub service: u32,
    /// Why the connection was steered: a [`crate::Reason`].
    pub reason: u32,
    /// Non-zero from establishment until the end was reported.
    pub established: u32,
    /// Of the pod, when `connect` decided: see [`crate::Pod`].
    pub identity: u32,
    pub pod: u32,
    pub quota: u32,
    /// Round trips of a flow that may be short-circuited, and one more, so that 0 is for all others; [`SocketState::PROPOSED`] once it
    /// is a [`crate::Candidate`].
    pub exchanges: u32,
    pub padding: u32,
}

impl SocketState {
    pub const PROPOSED: u32 = u32::MAX;
}

/// What a socket is to us. Only user space of the agent can make a `PROXY`.
pub mod role {
    pub const NONE: u32 = 0;
    pub const PROXY: u32 = 1;
    pub const DIRECT: u32 = 2;
    pub const STEERED: u32 = 3;
    pub const OWN_ADDRESS: u32 = 4;
    /// A socket of a process of the node, outside all pods.
    pub const NODE: u32 = 6;
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
    /// The socket that the event is about: the client's, or the isolated one, and the namespace it is in.
    pub netns: u64,
    pub socket_cookie: u64,
    pub opened_ns: u64,
    pub at_ns: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Which of those bytes TCP has not seen.
    pub redirected_sent: u64,
    pub redirected_received: u64,
    pub kind: u32,
    /// A [`crate::Reason`], where there is one.
    pub reason: u32,
    pub sequence: u32,
    /// Smoothed round-trip time, microseconds.
    pub srtt_us: u32,
    pub retransmits: u32,
    pub connect_latency_us: u32,
    /// How the connection ended: one of [`end`].
    pub end: u32,
    /// Number of the policy that refused, 0 when none did.
    pub policy: u32,
    /// Number of the service that was connected to, 0 for none.
    pub service: u32,
    /// 1 if the isolated socket is the client's end.
    pub client_end: u32,
    /// How far a closed flow was from being short-circuited: one of [`short_state`].
    pub short_state: u32,
}

/// Key of an isolated socket: all that is needed to destroy it, should its alarm be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Isolated {
    pub key: FlowKey,
    pub socket_cookie: u64,
    /// The namespace that the socket is in.
    pub socket_netns: u64,
}

/// Whose flows [`Lost`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct LostKey {
    pub client_netns: u64,
    pub server: Address,
    /// Number of the service that was connected to, 0 for none.
    pub service: u32,
    pub padding: u32,
}

/// What the events would have said that found no room: the agent takes it from here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Lost {
    pub closed: u64,
    pub failed: u64,
    /// Totals of the closed flows, from client to server and back.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub retransmits: u64,
}

/// An establishment is not told: a short flow's end has it all, and long flows are found in the table.
pub mod event_kind {
    pub const CLOSED: u32 = 2;
    pub const REFUSED: u32 = 3;
    /// A connection was cut off from its application and must be destroyed.
    pub const ISOLATED: u32 = 4;
    /// A direct connection was never established.
    pub const FAILED: u32 = 5;
}

/// How far a flow came towards being short-circuited.
pub mod short_state {
    /// When it was opened, its pods did not both have it on at any port.
    pub const OFF: u32 = 0;
    /// It made too few round trips to be proposed.
    pub const BRIEF: u32 = 1;
    /// The agent was told that it is worth it.
    pub const PROPOSED: u32 = 2;
    /// Its sockets were in `SHORT_SOCKETS`, or were just being entered.
    pub const ENTERED: u32 = 3;
}

/// How a connection ended, as the client's socket saw it.
pub mod end {
    pub const UNKNOWN: u32 = 0;
    /// Both directions were closed in order.
    pub const FIN: u32 = 1;
    /// The other end reset it.
    pub const RESET_BY_PEER: u32 = 2;
    /// This end reset it, by closing with unread data or without lingering.
    pub const RESET_BY_CLIENT: u32 = 3;
    /// The other end did not answer any more.
    pub const TIMEOUT: u32 = 4;
    /// Destroyed from outside: by the agent, or by an administrator.
    pub const DESTROYED: u32 = 5;
    /// Nobody listens.
    pub const CONNECTION_REFUSED: u32 = 6;
    /// The network said that the other end cannot be reached.
    pub const UNREACHABLE: u32 = 7;
}
