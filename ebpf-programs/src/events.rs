//! Writing events into the ring buffer; a full buffer is counted, never waited for.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::bpf_ktime_get_ns,
};
use culvert_abi::{Event, FlowKey, Reason, event_kind};

use crate::maps::{EVENTS, count};

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
        reserved: [0; 3],
    }
}

/// For what happens per connection: the agent reads these on a timer, so that a busy node pays no wake-up for each.
#[inline(always)]
pub fn emit(event: &Event) {
    output(event, BPF_RB_NO_WAKEUP);
}

/// For what must be acted on now.
#[inline(always)]
pub fn emit_urgent(event: &Event) {
    output(event, BPF_RB_FORCE_WAKEUP);
}

#[inline(always)]
fn output(event: &Event, flags: u32) {
    if EVENTS.output(event, u64::from(flags)).is_err() {
        count(Reason::EventLost);
    }
}

/// A connection that `connect` refused.
#[inline(always)]
pub fn refused(key: &FlowKey, client_netns: u64, workload: u32, policy: u32, reason: Reason) {
    let mut event = blank(event_kind::REFUSED, key);
    event.client_netns = client_netns;
    event.workload = workload;
    event.policy = policy;
    event.reason = reason as u32;
    emit(&event);
}
