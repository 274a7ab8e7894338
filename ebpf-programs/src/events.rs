//! Writing events into the ring buffer; a full buffer is counted, never waited for.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{
    bindings::{BPF_NOEXIST, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::bpf_ktime_get_ns,
};
use culvert_abi::{
    Event, FlowKey, Lost, LostKey, REFUSALS_PER_SECOND, Reason, SocketState, config_flag, end,
    event_kind, short_state,
};

use crate::maps::{ALARMS, CONFIG, EVENTS, LOST, QUOTAS, count};

const SECOND: u64 = 1_000_000_000;

/// Not on the stack: `keep` and its callers share 512 bytes of it.
static NOTHING: Lost = Lost {
    closed: 0,
    failed: 0,
    bytes_sent: 0,
    bytes_received: 0,
    retransmits: 0,
};

/// An event with nothing but its kind and connection set.
#[inline(always)]
pub fn blank(kind: u32, key: &FlowKey) -> Event {
    Event {
        key: *key,
        netns: 0,
        socket_cookie: 0,
        opened_ns: 0,
        // SAFETY: helper call without arguments.
        at_ns: unsafe { bpf_ktime_get_ns() },
        bytes_sent: 0,
        bytes_received: 0,
        redirected_sent: 0,
        redirected_received: 0,
        kind,
        reason: 0,
        sequence: 0,
        srtt_us: 0,
        retransmits: 0,
        connect_latency_us: 0,
        end: end::UNKNOWN,
        policy: 0,
        service: 0,
        client_end: 0,
        short_state: short_state::OFF,
    }
}

/// An event about the flow of a client's socket.
#[inline(always)]
pub fn of_flow(kind: u32, state: &SocketState, client_netns: u64) -> Event {
    Event {
        netns: client_netns,
        opened_ns: state.opened_ns,
        sequence: state.sequence,
        service: state.service,
        connect_latency_us: state.connect_latency_us,
        ..blank(kind, &state.key)
    }
}

/// For what happens per connection: the agent reads these on a timer, so that a busy node pays no wake-up for each.
#[inline(always)]
pub fn emit(event: &Event) {
    if CONFIG
        .get(0)
        .is_some_and(|config| config.flags & config_flag::NO_TELEMETRY != 0)
    {
        return;
    }
    if EVENTS.output(event, u64::from(BPF_RB_NO_WAKEUP)).is_err() {
        count(Reason::EventLost);
        keep(event);
    }
}

/// Keeps the sums of what a lost event would have said. A subprogram: it is rarely run, and needs a stack of its own.
#[inline(never)]
fn keep(event: &Event) {
    if event.kind != event_kind::CLOSED && event.kind != event_kind::FAILED {
        return;
    }
    let key = LostKey {
        client_netns: event.netns,
        server: event.key.server,
        service: event.service,
        padding: 0,
    };
    let Some(lost) = LOST.get_ptr_mut(&key).or_else(|| {
        // Another CPU may have entered it meanwhile; a full map is like a full ring, and the event is counted as lost.
        let _ = LOST.insert(&key, &NOTHING, u64::from(BPF_NOEXIST));
        LOST.get_ptr_mut(&key)
    }) else {
        return;
    };
    // SAFETY: a live map value; only ever changed atomically here.
    unsafe {
        if event.kind == event_kind::FAILED {
            sum(&raw mut (*lost).failed, 1);
            return;
        }
        sum(&raw mut (*lost).closed, 1);
        sum(&raw mut (*lost).bytes_sent, event.bytes_sent);
        sum(&raw mut (*lost).bytes_received, event.bytes_received);
        sum(&raw mut (*lost).retransmits, u64::from(event.retransmits));
    }
}

/// Adds to a total that other CPUs add to.
///
/// # Safety
/// `total` must point into a live map value.
#[inline(always)]
pub unsafe fn sum(total: *mut u64, more: u64) {
    // SAFETY: the caller's promise.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(total, more) };
}

/// For what must be acted on now, whatever else there is to read.
#[inline(always)]
pub fn alarm(event: &Event) {
    if ALARMS
        .output(event, u64::from(BPF_RB_FORCE_WAKEUP))
        .is_err()
    {
        count(Reason::AlarmLost);
    }
}

/// A connection of the pod with this quota that `connect` refused. A pod that tries again and again is not reported each time:
/// the others' events need the room.
#[inline(always)]
pub fn refused(event: &mut Event, quota: u32) {
    if let Some(quota) = QUOTAS.get_ptr_mut(quota) {
        // SAFETY: a live map value; two CPUs that race here report a few more or less.
        let quota = unsafe { &mut *quota };
        if event.at_ns.saturating_sub(quota.window_ns) > SECOND {
            quota.window_ns = event.at_ns;
            quota.refusals = 0;
        }
        if quota.refusals >= REFUSALS_PER_SECOND {
            count(Reason::RefusalNotReported);
            return;
        }
        quota.refusals += 1;
    }
    event.kind = event_kind::REFUSED;
    emit(event);
}
