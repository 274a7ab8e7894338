//! Writing events into the ring buffer; a full buffer is counted, never waited for.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::bpf_ktime_get_ns,
};
use culvert_abi::{Event, FlowKey, REFUSALS_PER_SECOND, Reason, event_kind};

use crate::maps::{ALARMS, EVENTS, QUOTAS, count};

const SECOND: u64 = 1_000_000_000;

/// An event with nothing but its kind and connection set.
#[inline(always)]
pub fn blank(kind: u32, key: &FlowKey) -> Event {
    Event {
        key: *key,
        client_netns: 0,
        opened_ns: 0,
        // SAFETY: helper call without arguments.
        at_ns: unsafe { bpf_ktime_get_ns() },
        bytes_sent: 0,
        bytes_received: 0,
        generation: 0,
        kind,
        reason: 0,
        workload: 0,
        sequence: 0,
        srtt_us: 0,
        retransmits: 0,
        connect_latency_us: 0,
        last_state: 0,
        policy: 0,
        padding: 0,
        socket_cookie: 0,
        socket_netns: 0,
        client_end: 0,
    }
}

/// For what happens per connection: the agent reads these on a timer, so that a busy node pays no wake-up for each.
#[inline(always)]
pub fn emit(event: &Event) {
    if EVENTS.output(event, u64::from(BPF_RB_NO_WAKEUP)).is_err() {
        count(Reason::EventLost);
    }
}

/// For what must be acted on now, whatever else there is to read.
#[inline(always)]
pub fn alarm(event: &Event) {
    if ALARMS
        .output(event, u64::from(BPF_RB_FORCE_WAKEUP))
        .is_err()
    {
        count(Reason::EventLost);
    }
}

/// A connection that `connect` refused. A pod that tries again and again is not reported each time: the others' events
/// need the room.
#[inline(always)]
pub fn refused(key: &FlowKey, client_netns: u64, workload: u32, policy: u32, reason: Reason) {
    let mut event = blank(event_kind::REFUSED, key);
    if let Some(quota) = QUOTAS.get_ptr_mut(&client_netns) {
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
    event.client_netns = client_netns;
    event.workload = workload;
    event.policy = policy;
    event.reason = reason as u32;
    emit(&event);
}
