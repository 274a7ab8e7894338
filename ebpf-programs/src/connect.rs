//! `connect`: decides each outbound connection of a pod before it exists.

use core::ptr;

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::{
        bpf_get_netns_cookie, bpf_getsockopt, bpf_ktime_get_coarse_ns, bpf_set_retval,
        bpf_setsockopt,
    },
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use culvert_abi::{
    Address, Endpoint, FlowKey, OWN_PORTS, Pod, Reason, STEER_MARK, SocketState, Verdict, action,
    config_flag, event_kind, knob, listener_kind, role,
};

use crate::{
    address::{
        Family, bound_address, is_loopback, is_mapped, rewrite, target_port, target4, target6,
    },
    events,
    maps::{self, CONFIG, ENDPOINTS, SOCKETS, count, flag, knob, listens},
    node, quotas, services, verdicts,
};

const IPPROTO_TCP: u32 = 6;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const ECONNREFUSED: i32 = 111;

const REFUSE: i32 = 0;
const PROCEED: i32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    decide(&ctx, Family::V4, target4(ctx.sock_addr))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    decide(&ctx, Family::V6, target6(ctx.sock_addr))
}

/// What becomes of a pod's connection. Every field has a value in every case: the verifier refuses a program that moves one
/// which was never written.
#[derive(Clone, Copy)]
struct Choice {
    action: Action,
    reason: Reason,
    policy: u32,
    endpoint: Endpoint,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Direct,
    Steer,
    Refuse,
}

impl Choice {
    const NOWHERE: Endpoint = Endpoint {
        netns_cookie: 0,
        workload: 0,
        flags: 0,
        generation: 0,
    };

    #[inline(always)]
    fn direct(endpoint: Endpoint) -> Self {
        Self {
            action: Action::Direct,
            reason: Reason::Direct,
            policy: 0,
            endpoint,
        }
    }

    #[inline(always)]
    fn steer(reason: Reason) -> Self {
        Self {
            action: Action::Steer,
            reason,
            policy: 0,
            endpoint: Self::NOWHERE,
        }
    }
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, family: Family, target: Address) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: single volatile reads of context fields.
    let (protocol, sk) = unsafe {
        (
            ptr::read_volatile(&raw const (*addr).protocol),
            (*addr).__bindgen_anon_1.sk,
        )
    };
    if protocol != IPPROTO_TCP || sk.is_null() {
        return PROCEED;
    }
    // SAFETY: helper call with this program's context.
    let cookie = unsafe { bpf_get_netns_cookie(addr.cast()) };
    let pod = match maps::pod(cookie) {
        Ok(Some(pod)) => pod,
        Ok(None) => {
            node::connect(addr, cookie, &target);
            return PROCEED;
        }
        Err(reason) => return refuse(reason),
    };
    let pod = &pod;
    let state = SOCKETS.find_or_create(sk.cast());
    if let Some(state) = &state
        && state.role == role::PROXY
    {
        return PROCEED;
    }
    if is_loopback(&target) || flag(config_flag::LEAVING) {
        return leave_alone(addr, state);
    }
    let Some(state) = state else {
        return refuse(Reason::RefusedNoStorage);
    };
    state.identity = pod.identity;
    state.pod = pod.pod;
    state.quota = pod.quota;
    state.service = 0;
    state.service_port = 0;
    state.chosen_port = 0;
    let port = target_port(addr);
    let mut server = target;
    let mut server_port = port;
    let choice = match services::find(&target, port, pod.view) {
        Some(service) => {
            state.service = service.number;
            match services::choose(&service) {
                None => Choice::steer(Reason::SteeredEndpointGone),
                Some(slot) => {
                    server = slot.address;
                    server_port = slot.port;
                    // SAFETY: the agent replaces endpoints whole; a copy, because generation and cookie must be of one moment.
                    let choice = match unsafe { ENDPOINTS.get(&server) }.copied() {
                        // Somebody else has the address by now.
                        Some(endpoint)
                            if endpoint.workload != slot.workload
                                && !knob(knob::SKIP_SLOT_CHECK) =>
                        {
                            server_port = 0;
                            Choice::steer(Reason::SteeredEndpointGone)
                        }
                        Some(_) if is_mapped(&server) != is_mapped(&target) => {
                            Choice::steer(Reason::SteeredNotEligible)
                        }
                        Some(endpoint) => judge(pod, endpoint, server_port),
                        None if slot.workload != 0 => {
                            server_port = 0;
                            Choice::steer(Reason::SteeredEndpointGone)
                        }
                        None => Choice::steer(Reason::SteeredRemote),
                    };
                    state.chosen = server;
                    state.chosen_port = server_port;
                    count(Reason::ServiceResolved);
                    choice
                }
            }
        }
        // SAFETY: as above.
        None => match unsafe { ENDPOINTS.get(&target) }.copied() {
            None => Choice::steer(Reason::SteeredRemote),
            Some(endpoint) if endpoint.netns_cookie == cookie => {
                restore_mark(addr, state);
                state.role = role::OWN_ADDRESS;
                state.server_netns = cookie;
                return PROCEED;
            }
            Some(endpoint) => judge(pod, endpoint, port),
        },
    };
    let choice = if choice.action == Action::Direct
        && !is_own_source(cookie, bound_address(sk, family).as_ref())
        && !knob(knob::SKIP_SOURCE_CHECK)
    {
        Choice::steer(Reason::SteeredForeignSource)
    } else {
        choice
    };
    let reason = choice.reason;
    match choice.action {
        Action::Direct => {
            restore_mark(addr, state);
            state.role = role::DIRECT;
            state.server_netns = choice.endpoint.netns_cookie;
            state.generation = choice.endpoint.generation;
            state.workload = choice.endpoint.workload;
            let both = pod.flags & Pod::SHORT_CIRCUIT != 0
                && choice.endpoint.flags & Endpoint::SHORT_CIRCUIT != 0;
            state.exchanges = u32::from(both);
            if state.service != 0 {
                state.service_address = target;
                state.service_port = port;
                rewrite(addr, family, &server, server_port);
            }
            count(reason);
            PROCEED
        }
        // The reset for a SYN that `inbound` drops would have somebody else's address and never leave: refuse here.
        Action::Steer
            if !listens(cookie, listener_kind::OUTBOUND) && !knob(knob::SKIP_STEERING) =>
        {
            refuse(Reason::RefusedNoAgent)
        }
        Action::Steer => steer(addr, state, &pod.devices, reason),
        Action::Refuse => {
            let key = FlowKey {
                netns_cookie: 0,
                client: bound_address(sk, family).unwrap_or_default(),
                server,
                client_port: 0,
                server_port,
                padding: 0,
            };
            let mut event = events::blank(event_kind::REFUSED, &key);
            event.netns = cookie;
            event.policy = choice.policy;
            event.reason = reason as u32;
            event.service = state.service;
            events::refused(&mut event, pod.quota);
            refuse(reason)
        }
    }
}

/// Whether a bound socket's address is one that the pod is known by. Whoever binds another one is not claimed to be anybody.
#[inline(always)]
fn is_own_source(cookie: u64, bound: Option<&Address>) -> bool {
    let Some(bound) = bound else {
        return true;
    };
    // SAFETY: a single field of a map value.
    unsafe { ENDPOINTS.get(bound) }.is_some_and(|endpoint| endpoint.netns_cookie == cookie)
}

/// Whether a destination on this node may be reached directly.
#[inline(always)]
fn judge(pod: &Pod, endpoint: Endpoint, port: u16) -> Choice {
    if flag(config_flag::CHANGING) && !knob(knob::SKIP_CHANGING) {
        return Choice::steer(Reason::SteeredChanging);
    }
    if pod.flags & Pod::NO_DIRECT != 0
        || endpoint.flags & Endpoint::STEER != 0
        || OWN_PORTS.contains(&port)
    {
        return Choice::steer(Reason::SteeredNotEligible);
    }
    let key = verdicts::key(&endpoint, pod.identity, pod.pod, port);
    let verdict: Verdict = match maps::verdict(&key) {
        Some(verdict) => verdict,
        None if knob(knob::UNKNOWN_VERDICT_ALLOWS) => return Choice::direct(endpoint),
        None => return Choice::steer(Reason::SteeredUnknownVerdict),
    };
    if verdict.generation != endpoint.generation && !knob(knob::SKIP_GENERATION) {
        return Choice::steer(Reason::SteeredOldGeneration);
    }
    if !is_fresh() {
        return Choice::steer(Reason::SteeredStaleHeartbeat);
    }
    if verdict.action == action::ALLOW || knob(knob::DENY_ALLOWS) {
        if quotas::may_open_flow(pod.quota) {
            Choice::direct(endpoint)
        } else {
            Choice::steer(Reason::SteeredFlowQuota)
        }
    } else {
        Choice {
            action: Action::Refuse,
            reason: Reason::RefusedByPolicy,
            policy: verdict.policy,
            endpoint,
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
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    now.saturating_sub(config.heartbeat_ns) <= config.verdict_max_age_ns
}

#[inline(always)]
fn steer(
    addr: *mut bpf_sock_addr,
    state: &mut SocketState,
    devices: &[u32; Pod::DEVICES],
    reason: Reason,
) -> i32 {
    if knob(knob::SKIP_STEERING) {
        return PROCEED;
    }
    // Only these devices have a route for the mark; a socket bound to another would send its SYN out of the pod.
    let bound = bound_device(addr);
    let [first, second, third, fourth] = *devices;
    if bound != 0 && bound != first && bound != second && bound != third && bound != fourth {
        return refuse(Reason::RefusedBoundDevice);
    }
    if state.role != role::STEERED {
        state.mark = mark(addr).unwrap_or(0);
    }
    if !set_mark(addr, STEER_MARK) {
        return refuse(Reason::RefusedNoMark);
    }
    state.role = role::STEERED;
    state.reason = reason as u32;
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
