//! What each pod has used up: claims in flight, direct flows. Counted atomically, because every CPU does.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr,
};

use culvert_abi::{CLAIMS_OF_AGENT, CLAIMS_PER_POD, FLOWS_PER_NODE, FLOWS_PER_POD, Quota, knob};

use crate::maps::{QUOTAS, knob};

/// The entry that counts for the whole node.
pub const NODE: u64 = 0;

/// Takes one of a pod's claims; `false` when it has none left, or has left itself.
#[inline(always)]
pub fn take_claim(client: u64) -> bool {
    let Some(quota) = QUOTAS.get_ptr_mut(&client) else {
        return false;
    };
    // SAFETY: a live map value; only ever accessed atomically.
    let before = unsafe { add(&raw mut (*quota).claims, 1) };
    let most = if client == NODE {
        CLAIMS_OF_AGENT
    } else {
        CLAIMS_PER_POD
    };
    if before < most || knob(knob::SKIP_QUOTAS) {
        return true;
    }
    // SAFETY: as above.
    unsafe { add(&raw mut (*quota).claims, -1) };
    false
}

#[inline(always)]
pub fn return_claim(client: u64) {
    if let Some(quota) = QUOTAS.get_ptr_mut(&client) {
        // SAFETY: as in `take_claim`.
        unsafe { add(&raw mut (*quota).claims, -1) };
    }
}

/// Whether a pod may open another direct flow. Those that are just being made are not counted yet: the limits are that
/// much below what the map holds.
#[inline(always)]
pub fn may_open_flow(client: u64) -> bool {
    flows(client) < FLOWS_PER_POD && flows(NODE) < FLOWS_PER_NODE || knob(knob::SKIP_QUOTAS)
}

#[inline(always)]
pub fn count_flow(client: u64, delta: i64) {
    for cookie in [client, NODE] {
        if let Some(quota) = QUOTAS.get_ptr_mut(&cookie) {
            // SAFETY: as in `take_claim`.
            unsafe { add(&raw mut (*quota).flows, delta) };
        }
    }
}

#[inline(always)]
fn flows(cookie: u64) -> i64 {
    // SAFETY: a live map value; one aligned volatile read.
    QUOTAS
        .get_ptr(&cookie)
        .map_or(0, |quota: *const Quota| unsafe {
            ptr::read_volatile(&raw const (*quota).flows)
        })
}

/// Adds, and returns what was there. The target has no compare-and-swap as Rust's atomics want it, hence the intrinsic.
///
/// # Safety
/// `counter` must point into a live map value.
#[inline(always)]
unsafe fn add(counter: *mut i64, delta: i64) -> i64 {
    // Not relaxed: for that the compiler emits an addition which returns nothing, and takes what is added for what was there.
    // SAFETY: the caller's promise.
    unsafe { atomic_xadd::<i64, i64, { AtomicOrdering::AcqRel }>(counter, delta) }
}
