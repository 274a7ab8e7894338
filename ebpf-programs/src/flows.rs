//! Established direct flows: what revocation walks through.

use aya_ebpf::bindings::BPF_NOEXIST;
use culvert_abi::{Flow, FlowKey};

use crate::{maps::FLOWS, quotas};

/// Enters a flow, in place of what is left of an older one with the same key. It is counted before it is there, and until it is not:
/// where nothing is counted, the agent does not look for flows to cut.
#[inline(always)]
pub fn enter(key: &FlowKey, flow: &Flow) -> Result<(), i32> {
    quotas::count_flow(flow.quota, 1);
    if FLOWS.insert(key, flow, u64::from(BPF_NOEXIST)).is_err() {
        // SAFETY: a single field of an entry that is written whole.
        if let Some(quota) = unsafe { FLOWS.get(key) }.map(|old| old.quota) {
            delete(key, quota);
        }
        if let Err(error) = FLOWS.insert(key, flow, u64::from(BPF_NOEXIST)) {
            quotas::count_flow(flow.quota, -1);
            return Err(error);
        }
    }
    Ok(())
}

/// Removes a flow whose client has closed, if it is still the connection with this sequence number; `false` if it is not there.
#[inline(always)]
pub fn remove(key: &FlowKey, sequence: u32) -> bool {
    // SAFETY: single fields of an entry that is written whole.
    let Some(flow) = (unsafe { FLOWS.get(key) }) else {
        return false;
    };
    let (found, quota) = (flow.sequence, flow.quota);
    if found != sequence {
        return false;
    }
    delete(key, quota);
    true
}

#[inline(always)]
fn delete(key: &FlowKey, quota: u32) {
    if FLOWS.remove(key).is_ok() {
        quotas::count_flow(quota, -1);
    }
}
