//! `sockops`: publishes claims, settles them, and measures flows.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_RTT_CB, BPF_SOCK_OPS_RTT_CB_FLAG, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns},
    macros::sock_ops,
    programs::SockOpsContext,
};
use culvert_abi::{
    Claim, Event, Flow, FlowKey, OWN_PORTS, Quota, Reason, SocketState, claim_kind, config_flag,
    end, event_kind, knob, role, short_state,
};

use crate::{
    address::{Ends, is_loopback},
    claims, events, flows,
    isolation::isolate,
    kernel::{has_received_fin, sock_error, write_seq},
    maps::{CLAIMS, ENDPOINTS, PODS, SOCKETS, count, flag, is_pod, knob},
    short_circuit, verdicts,
};

const TCP_ESTABLISHED: u32 = 1;
const TCP_FIN_WAIT1: u32 = 4;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

const EPIPE: u32 = 32;
const ECONNABORTED: u32 = 103;
const ECONNRESET: u32 = 104;
const ETIMEDOUT: u32 = 110;
const ECONNREFUSED: u32 = 111;
const ENETUNREACH: u32 = 101;
const EHOSTUNREACH: u32 = 113;

#[sock_ops]
pub fn socket_ops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => connected(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        BPF_SOCK_OPS_STATE_CB => state_changed(&ctx),
        BPF_SOCK_OPS_RTT_CB => exchanged(&ctx),
        _ => {}
    }
    1
}

/// Port and sequence number are chosen, the SYN has not left.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let sk = socket(ctx);
    let Some(state) = SOCKETS.find(sk) else {
        return;
    };
    if state.role == role::NONE {
        return;
    }
    let own_netns = netns_cookie(ctx);
    // Without a claim it is nobody's, and what was decided for another identity is not this pod's any more.
    if state.role != role::NODE && state.role != role::PROXY && !is_still(state, own_netns) {
        // A pod that is leaving is nobody from now on.
        if state.role == role::DIRECT && !is_pod(own_netns) {
            state.role = role::NONE;
        }
        return;
    }
    let Some(ends) = Ends::of(ctx.ops) else {
        return;
    };
    let is_own = |address| {
        // SAFETY: a single field of a map value.
        unsafe { ENDPOINTS.get(address) }.is_some_and(|endpoint| endpoint.netns_cookie == own_netns)
    };
    let (kind, lookup_netns) = match state.role {
        role::DIRECT => (claim_kind::DIRECT, state.server_netns),
        role::STEERED => (claim_kind::STEERED, own_netns),
        role::OWN_ADDRESS => (claim_kind::OWN_ADDRESS, own_netns),
        role::NODE => (claim_kind::NODE, state.server_netns),
        // The agent's own: only what it opens to the application of the pod it stands in needs a claim.
        role::PROXY if !OWN_PORTS.contains(&ends.remote_port) && is_own(&ends.remote) => {
            (claim_kind::PROXY, own_netns)
        }
        _ => return,
    };
    // Nobody may be taken for the pod whose address he has; who is only led to the agent may have any.
    if (kind == claim_kind::DIRECT || kind == claim_kind::OWN_ADDRESS)
        && !is_own(&ends.local)
        && !knob(knob::SKIP_CLAIM_SOURCE)
    {
        count(Reason::ClaimForeignSource);
        return;
    }
    let Some(sequence) = write_seq(sk) else {
        return;
    };
    let key = ends.as_client(lookup_netns);
    // SAFETY: helper calls without side effects.
    let (now, socket_cookie) =
        unsafe { (bpf_ktime_get_ns(), bpf_get_socket_cookie(ctx.ops.cast())) };
    let claim = Claim {
        client_netns: own_netns,
        server_netns: lookup_netns,
        generation: state.generation,
        opened_ns: now,
        socket_cookie,
        chosen: state.chosen,
        kind,
        sequence,
        workload: state.workload,
        source_identity: state.identity,
        source_pod: state.pod,
        admitted: 0,
        service: state.service,
        reason: state.reason,
        chosen_port: state.chosen_port,
        padding: 0,
        quota: if kind == claim_kind::PROXY {
            Quota::NODE
        } else {
            state.quota
        },
    };
    state.key = key;
    state.opened_ns = now;
    state.sequence = sequence;
    state.established = 0;
    state.connect_latency_us = 0;
    // Without this callback the claim of a failed connect would stay: better none at all.
    if ctx
        .set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32)
        .is_err()
    {
        return;
    }
    claims::publish(&key, &claim);
}

/// Whether the pod is who it was when `connect` decided.
#[inline(always)]
fn is_still(state: &SocketState, netns_cookie: u64) -> bool {
    // SAFETY: single fields of a map value; one that has just become another pod's has another number.
    unsafe { PODS.get(&netns_cookie) }.is_some_and(|pod| {
        pod.identity == state.identity && pod.pod == state.pod && pod.quota == state.quota
    })
}

/// The client's end of a connection is established.
#[inline(always)]
fn connected(ctx: &SockOpsContext) {
    let Some(state) = SOCKETS.find(socket(ctx)) else {
        return;
    };
    if state.role != role::DIRECT && state.role != role::STEERED {
        return;
    }
    // Whoever answered must be the pod that the claim is for, or the agent where the connection was steered: its `inbound` has
    // marked the claim, which lives until that end has our ACK. Somebody else with the address (a stale entry, a neighbour that
    // answers ARP, another node that a steered SYN went astray to) gets no byte.
    // SAFETY: single fields of a claim that is written whole.
    let admitted = unsafe { CLAIMS.get(&state.key) }
        .is_some_and(|claim| claim.sequence == state.sequence && claim.admitted != 0);
    if !admitted && !knob(knob::SKIP_ADMITTED) && !flag(config_flag::LEAVING) {
        isolate(
            ctx,
            &state.key,
            netns_cookie(ctx),
            true,
            Reason::IsolatedNotAdmitted,
        );
        return;
    }
    // SAFETY: helper call without arguments; single volatile read of a context field.
    let (now, acked) = unsafe {
        (
            bpf_ktime_get_ns(),
            ptr::read_volatile(&raw const (*ctx.ops).bytes_acked),
        )
    };
    state.acked_at_start = acked;
    state.established = 1;
    state.connect_latency_us = (now.saturating_sub(state.opened_ns) / 1000) as u32;
    if state.exchanges != 0 {
        // Without it the flow stays plain TCP.
        let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_RTT_CB_FLAG) as i32);
    }
}

/// A round trip of a flow that may be short-circuited. Few flows live long enough for it to be worth it.
#[inline(always)]
fn exchanged(ctx: &SockOpsContext) {
    const ENOUGH: u32 = 16;
    let Some(state) = SOCKETS.find(socket(ctx)) else {
        return;
    };
    if state.exchanges == SocketState::PROPOSED {
        return;
    }
    state.exchanges += 1;
    if state.exchanges > ENOUGH || knob(knob::EAGER_SHORT_CIRCUIT) {
        state.exchanges = SocketState::PROPOSED;
        let _ = ctx.set_cb_flags((ctx.cb_flags() & !BPF_SOCK_OPS_RTT_CB_FLAG) as i32);
        short_circuit::propose(&state.key, state.sequence);
    }
}

/// The server's end of a connection is established, and the application has not seen it yet.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    let netns = netns_cookie(ctx);
    let Some(ends) = Ends::of(ctx.ops) else {
        return;
    };
    if is_loopback(&ends.local) {
        return;
    }
    let key = ends.as_server(netns);
    if !is_pod(netns) {
        // It left while the handshake was under way: nobody's to judge any more.
        claims::withdraw(&key, sequence_of_syn(ctx));
        return;
    }
    let sk = socket(ctx);
    // A child of the agent's listener: `inbound` chose it, the agent judges it, and is told what `connect` chose.
    if let Some(state) = SOCKETS.find(sk)
        && state.role == role::PROXY
    {
        // SAFETY: claims are written whole; single fields are read before the entry is deleted.
        if let Some(claim) = unsafe { CLAIMS.get(&key) } {
            if claim.kind == claim_kind::STEERED {
                state.chosen = claim.chosen;
                state.chosen_port = claim.chosen_port;
                state.service = claim.service;
                state.reason = claim.reason;
            }
            let quota = claim.quota;
            claims::settle(&key, quota);
        }
        return;
    }
    // While the kernel part is being taken away connections come without claims, and are nobody's to judge.
    if let Err(reason) = admit(ctx, netns, &key)
        && !flag(config_flag::LEAVING)
    {
        isolate(ctx, &key, netns, false, reason);
    }
}

/// The number that the SYN carried of a connection that has just been established.
#[inline(always)]
fn sequence_of_syn(ctx: &SockOpsContext) -> u32 {
    // SAFETY: single volatile read of a context field.
    let next = unsafe { ptr::read_volatile(&raw const (*ctx.ops).rcv_nxt) };
    next.wrapping_sub(1)
}

/// Checks the connection against its claim, and makes it a flow.
#[inline(always)]
fn admit(ctx: &SockOpsContext, netns: u64, key: &FlowKey) -> Result<(), Reason> {
    // SAFETY: claims are written whole; the copy is taken before the entry is deleted.
    let claim = *unsafe { CLAIMS.get(key) }.ok_or(Reason::IsolatedNoClaim)?;
    // A wrong sequence number leaves the claim where it is: it belongs to somebody else's connection.
    if sequence_of_syn(ctx) != claim.sequence && !knob(knob::SKIP_SEQUENCE) {
        return Err(Reason::IsolatedSequence);
    }
    let entered = enter(ctx, netns, key, &claim);
    let settled = knob(knob::KEEP_CLAIMS) || claims::settle(key, claim.quota);
    // The client has given up meanwhile and does not know of the flow.
    if entered == Ok(true) && !settled {
        flows::remove(key, claim.sequence);
        return Err(Reason::IsolatedNoClaim);
    }
    entered.map(drop)
}

/// Whether the connection is what the claim says; `true` if it was entered as a flow.
#[inline(always)]
fn enter(ctx: &SockOpsContext, netns: u64, key: &FlowKey, claim: &Claim) -> Result<bool, Reason> {
    if claim.server_netns != netns {
        return Err(Reason::IsolatedWrongPod);
    }
    match claim.kind {
        claim_kind::DIRECT => {}
        claim_kind::PROXY | claim_kind::OWN_ADDRESS | claim_kind::NODE => return Ok(false),
        // A steered connection belongs to the agent's listener, never to an application.
        _ => return Err(Reason::IsolatedNoClaim),
    }
    let generation = match verdicts::standing(claim, key) {
        Some(generation) => generation,
        None if knob(knob::SKIP_GENERATION) => claim.generation,
        None => return Err(Reason::IsolatedOldGeneration),
    };
    let flow = Flow {
        client_netns: claim.client_netns,
        server_netns: netns,
        generation,
        opened_ns: claim.opened_ns,
        client_socket: claim.socket_cookie,
        // SAFETY: helper call with this program's context.
        server_socket: unsafe { bpf_get_socket_cookie(ctx.ops.cast()) },
        sequence: claim.sequence,
        workload: claim.workload,
        source_identity: claim.source_identity,
        source_pod: claim.source_pod,
        service: claim.service,
        quota: claim.quota,
    };
    flows::enter(key, &flow).map_err(|_| Reason::IsolatedFlowMapFull)?;
    Ok(true)
}

#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    let (old, new) = (arg(ctx, 0), arg(ctx, 1));
    if new != TCP_CLOSE {
        return;
    }
    let sk = socket(ctx);
    let Some(state) = SOCKETS.find(sk) else {
        return;
    };
    // SAFETY: single volatile reads of context fields.
    let (received, acked, unacked, srtt, retransmits) = unsafe {
        (
            ptr::read_volatile(&raw const (*ctx.ops).bytes_received),
            ptr::read_volatile(&raw const (*ctx.ops).bytes_acked),
            ptr::read_volatile(&raw const (*ctx.ops).snd_una),
            ptr::read_volatile(&raw const (*ctx.ops).srtt_us),
            ptr::read_volatile(&raw const (*ctx.ops).total_retrans),
        )
    };
    // A flow's claim is settled by who has entered the flow: no second look into a large table, where no cache has the place.
    let was_flow = state.role == role::DIRECT && flows::remove(&state.key, state.sequence);
    if !was_flow && !knob(knob::KEEP_CLAIMS) {
        claims::withdraw(&state.key, state.sequence);
    }
    if state.role != role::DIRECT {
        return;
    }
    let netns = netns_cookie(ctx);
    let error = sock_error(sk);
    if state.established == 0 {
        let mut event = events::of_flow(event_kind::FAILED, state, netns);
        event.end = ending(old, error);
        event.retransmits = retransmits;
        events::emit(&event);
        return;
    }
    state.established = 0;
    // TCP counts SYN and FIN as an octet each. Who waits for the last ACK may end without it.
    let fin_acked = match old {
        TCP_FIN_WAIT2 => true,
        TCP_LAST_ACK | TCP_CLOSING => write_seq(sk) == Some(unacked),
        _ => false,
    };
    let mut event = events::of_flow(event_kind::CLOSED, state, netns);
    event.bytes_sent = acked
        .saturating_sub(state.acked_at_start)
        .saturating_sub(u64::from(fin_acked));
    event.bytes_received = received.saturating_sub(u64::from(has_received_fin(sk)));
    if state.exchanges != 0 {
        tell_short_circuit(&mut event, state);
    }
    event.srtt_us = srtt >> 3;
    event.retransmits = retransmits;
    event.end = ending(old, error);
    // SAFETY: helper call with this program's context.
    event.socket_cookie = unsafe { bpf_get_socket_cookie(ctx.ops.cast()) };
    events::emit(&event);
}

/// What a flow that might have been short-circuited has come to. TCP has not counted what was redirected.
#[inline(always)]
fn tell_short_circuit(event: &mut Event, state: &SocketState) {
    if state.exchanges != SocketState::PROPOSED {
        event.short_state = short_state::BRIEF;
        return;
    }
    event.short_state = short_state::PROPOSED;
    let Some((sent, received)) = short_circuit::take(&state.key) else {
        return;
    };
    event.short_state = short_state::ENTERED;
    event.redirected_sent = sent;
    event.redirected_received = received;
    event.bytes_sent += sent;
    event.bytes_received += received;
}

/// How a connection ended that left the state `old` with the error `error`.
#[inline(always)]
fn ending(old: u32, error: u32) -> u32 {
    match error {
        0 => match old {
            // The application closed without reading everything, or without lingering.
            TCP_ESTABLISHED | TCP_CLOSE_WAIT | TCP_FIN_WAIT1 => end::RESET_BY_CLIENT,
            _ => end::FIN,
        },
        ECONNRESET | EPIPE => end::RESET_BY_PEER,
        ETIMEDOUT => end::TIMEOUT,
        ECONNABORTED => end::DESTROYED,
        ECONNREFUSED => end::CONNECTION_REFUSED,
        ENETUNREACH | EHOSTUNREACH => end::UNREACHABLE,
        _ => end::UNKNOWN,
    }
}

#[inline(always)]
fn arg(ctx: &SockOpsContext, index: usize) -> u32 {
    // SAFETY: single volatile read of a context field.
    unsafe { ptr::read_volatile(&raw const (*ctx.ops).__bindgen_anon_1.args[index]) }
}

#[inline(always)]
fn socket(ctx: &SockOpsContext) -> *mut c_void {
    // SAFETY: read of a context field that the verifier types as a socket or null.
    unsafe { (*ctx.ops).__bindgen_anon_2.sk.cast() }
}

#[inline(always)]
fn netns_cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: helper call with this program's context.
    unsafe { bpf_get_netns_cookie(ctx.ops.cast()) }
}
