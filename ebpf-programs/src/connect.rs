//! `connect`: decides each outbound connection of a pod before it exists.

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{
        bpf_get_netns_cookie, bpf_getsockopt, bpf_ktime_get_ns, bpf_set_retval, bpf_setsockopt,
    },
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use culvert_abi::{
    Endpoint, FlowKey, OWN_PORTS, Pod, Reason, STEER_MARK, SocketState, Verdict, VerdictKey,
    action, knob, listener_kind, mapped, role, scope,
};

use crate::{
    address::{Target, is_loopback, target_port, target4, target6},
    events,
    maps::{CONFIG, ENDPOINTS, PODS, SOCKETS, VERDICTS, count, knob, listens},
};

const IPPROTO_TCP: u32 = 6;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const ECONNREFUSED: i32 = 111;

const REFUSE: i32 = 0;
const PROCEED: i32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    decide(&ctx, target4(ctx.sock_addr))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    decide(&ctx, target6(ctx.sock_addr))
}

/// What becomes of a pod's connection.
enum Choice {
    Direct(Endpoint),
    Steer(Reason),
    Refuse {
        reason: Reason,
        policy: u32,
        workload: u32,
    },
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, target: Target) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: single volatile reads of context fields.
    let (protocol, sk) = unsafe {
        (
            ptr::read_volatile(&raw const (*addr).protocol),
            (*addr).__bindgen_anon_1.sk,
        )
    };
    if protocol != IPPROTO_TCP {
        return PROCEED;
    }
    // SAFETY: helper call with this program's context.
    let cookie = unsafe { bpf_get_netns_cookie(addr.cast()) };
    // SAFETY: the agent replaces entries whole; a stale copy is a valid one.
    let Some(pod) = (unsafe { PODS.get(&cookie) }) else {
        return PROCEED;
    };
    let state = SOCKETS.find_or_create(sk.cast());
    if let Some(state) = &state
        && state.role == role::PROXY
    {
        return PROCEED;
    }
    let ip4 = match target {
        Target::V4(ip4) => ip4,
        Target::V6Loopback => return leave_alone(addr, state),
        Target::V6 => return refuse(Reason::RefusedIpv6),
    };
    let Some(state) = state else {
        return refuse(Reason::RefusedNoStorage);
    };
    if is_loopback(ip4) {
        return leave_alone(addr, Some(state));
    }
    let server = mapped(ip4);
    let port = target_port(addr);
    if server == pod.address {
        restore_mark(addr, state);
        state.role = role::OWN_ADDRESS;
        state.server_netns = cookie;
        return PROCEED;
    }
    // SAFETY: as for PODS.
    let choice = match unsafe { ENDPOINTS.get(&server) } {
        None => Choice::Steer(Reason::SteeredRemote),
        // A copy: generation and cookie must be of one moment.
        Some(endpoint) => judge(pod, *endpoint, port),
    };
    match choice {
        Choice::Direct(endpoint) => {
            restore_mark(addr, state);
            state.role = role::DIRECT;
            state.server_netns = endpoint.netns_cookie;
            state.generation = endpoint.generation;
            state.workload = endpoint.workload;
            count(Reason::Direct);
            PROCEED
        }
        // The reset for a SYN that `inbound` drops would have somebody else's address and never leave: refuse here.
        Choice::Steer(_)
            if !listens(cookie, listener_kind::OUTBOUND) && !knob(knob::SKIP_STEERING) =>
        {
            refuse(Reason::RefusedNoAgent)
        }
        Choice::Steer(reason) => steer(addr, state, pod.device, reason),
        Choice::Refuse {
            reason,
            policy,
            workload,
        } => {
            let key = FlowKey {
                netns_cookie: 0,
                client: pod.address,
                server,
                client_port: 0,
                server_port: port,
                padding: 0,
            };
            events::refused(&key, cookie, workload, policy, reason);
            refuse(reason)
        }
    }
}

/// Whether a destination on this node may be reached directly.
#[inline(always)]
fn judge(pod: &Pod, endpoint: Endpoint, port: u16) -> Choice {
    if pod.flags & Pod::NO_DIRECT != 0
        || endpoint.flags & Endpoint::STEER != 0
        || OWN_PORTS.contains(&port)
    {
        return Choice::Steer(Reason::SteeredNotEligible);
    }
    let by_pod = endpoint.flags & Endpoint::BY_POD != 0;
    let key = VerdictKey {
        source: if by_pod { pod.pod } else { pod.identity },
        workload: endpoint.workload,
        port,
        scope: if by_pod { scope::POD } else { scope::IDENTITY },
        padding: 0,
    };
    // SAFETY: the agent replaces verdicts whole.
    let verdict: &Verdict = match unsafe { VERDICTS.get(&key) } {
        Some(verdict) => verdict,
        None if knob(knob::UNKNOWN_VERDICT_ALLOWS) => return Choice::Direct(endpoint),
        None => return Choice::Steer(Reason::SteeredUnknownVerdict),
    };
    if verdict.generation != endpoint.generation && !knob(knob::SKIP_GENERATION) {
        return Choice::Steer(Reason::SteeredOldGeneration);
    }
    if !is_fresh() {
        return Choice::Steer(Reason::SteeredStaleHeartbeat);
    }
    if verdict.action == action::ALLOW || knob(knob::DENY_ALLOWS) {
        Choice::Direct(endpoint)
    } else {
        Choice::Refuse {
            reason: Reason::RefusedByPolicy,
            policy: verdict.policy,
            workload: endpoint.workload,
        }
    }
}

/// Whether the agent has lived recently enough for its verdicts to stand.
#[inline(always)]
fn is_fresh() -> bool {
    let Some(config) = CONFIG.get(0) else {
        return false;
    };
    // SAFETY: helper call without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    now.saturating_sub(config.heartbeat_ns) <= config.verdict_max_age_ns
}

#[inline(always)]
fn steer(addr: *mut bpf_sock_addr, state: &mut SocketState, device: u32, reason: Reason) -> i32 {
    if knob(knob::SKIP_STEERING) {
        return PROCEED;
    }
    // The mark's route is one of the pod's device; a socket bound to another would send its SYN out of the pod.
    let bound = bound_device(addr);
    if bound != 0 && bound != device {
        return refuse(Reason::RefusedBoundDevice);
    }
    if state.role != role::STEERED {
        state.mark = mark(addr).unwrap_or(0);
    }
    if !set_mark(addr, STEER_MARK) {
        return refuse(Reason::RefusedNoMark);
    }
    state.role = role::STEERED;
    count(reason);
    PROCEED
}

/// A socket that was steered once and now goes elsewhere gets its own mark back.
#[inline(always)]
fn restore_mark(addr: *mut bpf_sock_addr, state: &SocketState) {
    if state.role == role::STEERED {
        set_mark(addr, state.mark);
    }
}

#[inline(always)]
fn leave_alone(addr: *mut bpf_sock_addr, state: Option<&mut SocketState>) -> i32 {
    if let Some(state) = state {
        restore_mark(addr, state);
        state.role = role::NONE;
    }
    PROCEED
}

#[inline(always)]
fn bound_device(addr: *mut bpf_sock_addr) -> u32 {
    // SAFETY: `sk` is checked; a single volatile read of a field of the kernel's `struct bpf_sock`.
    unsafe {
        let sk = (*addr).__bindgen_anon_1.sk;
        if sk.is_null() {
            0
        } else {
            ptr::read_volatile(&raw const (*sk).bound_dev_if)
        }
    }
}

#[inline(always)]
fn mark(addr: *mut bpf_sock_addr) -> Option<u32> {
    let mut value = 0u32;
    // SAFETY: the helper writes four bytes into a variable of four bytes.
    let status =
        unsafe { bpf_getsockopt(addr.cast(), SOL_SOCKET, SO_MARK, (&raw mut value).cast(), 4) };
    (status == 0).then_some(value)
}

#[inline(always)]
fn set_mark(addr: *mut bpf_sock_addr, mut value: u32) -> bool {
    // SAFETY: the helper reads four bytes.
    unsafe { bpf_setsockopt(addr.cast(), SOL_SOCKET, SO_MARK, (&raw mut value).cast(), 4) == 0 }
}

#[inline(always)]
fn refuse(reason: Reason) -> i32 {
    count(reason);
    // SAFETY: sets the error that connect(2) returns.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REFUSE
}
