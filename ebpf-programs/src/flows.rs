//! Established direct flows: what revocation walks through.

use aya_ebpf::bindings::BPF_NOEXIST;
use culvert_abi::{Flow, FlowKey};

use crate::{maps::FLOWS, quotas};

/// Enters a flow, in place of what is left of an older one with the same key.
#[inline(always)]
pub fn enter(key: &FlowKey, flow: &Flow) -> Result<(), i32> {
    // SAFETY: only the client is read.
    if let Some(client) = unsafe { FLOWS.get(key) }.map(|old| old.client_netns) {
        delete(key, client);
    }
    FLOWS.insert(key, flow, u64::from(BPF_NOEXIST))?;
    quotas::count_flow(flow.client_netns, 1);
    Ok(())
}

/// Removes a flow whose client has closed, if it is still the connection with this sequence number.
#[inline(always)]
pub fn remove(key: &FlowKey, sequence: u32) {
    // SAFETY: single fields of an entry that is written whole.
    let Some(flow) = (unsafe { FLOWS.get(key) }) else {
        return;
    };
    let (found, client) = (flow.sequence, flow.client_netns);
    if found == sequence {
        delete(key, client);
    }
}

#[inline(always)]
fn delete(key: &FlowKey, client: u64) {
    if FLOWS.remove(key).is_ok() {
        quotas::count_flow(client, -1);
    }
}
