//! What each pod has used up: claims in flight, direct flows. Counted atomically, because every CPU does.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr,
};

use culvert_abi::{CLAIMS_OF_AGENT, CLAIMS_PER_POD, FLOWS_PER_NODE, FLOWS_PER_POD, Quota, knob};

use crate::maps::{QUOTAS, knob};

/// Takes one of the claims that `index` may have; `false` when it has none left.
#[inline(always)]
pub fn take_claim(index: u32) -> bool {
    let Some(quota) = QUOTAS.get_ptr_mut(index) else {
        return false;
    };
    // SAFETY: a live map value; only ever accessed atomically.
    let before = unsafe { add(&raw mut (*quota).claims, 1) };
    let most = if index == Quota::NODE {
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
pub fn return_claim(index: u32) {
    if let Some(quota) = QUOTAS.get_ptr_mut(index) {
        // SAFETY: as in `take_claim`.
        unsafe { add(&raw mut (*quota).claims, -1) };
    }
}

/// Whether a pod may open another direct flow. Those that are just being made are not counted yet: the limits are that
/// much below what the map holds.
#[inline(always)]
pub fn may_open_flow(index: u32) -> bool {
    flows(index) < FLOWS_PER_POD && flows(Quota::NODE) < FLOWS_PER_NODE || knob(knob::SKIP_QUOTAS)
}

#[inline(always)]
pub fn count_flow(index: u32, delta: i64) {
    for index in [index, Quota::NODE] {
        if let Some(quota) = QUOTAS.get_ptr_mut(index) {
            // SAFETY: as in `take_claim`.
            unsafe { add(&raw mut (*quota).flows, delta) };
        }
    }
}

#[inline(always)]
fn flows(index: u32) -> i64 {
    // SAFETY: a live map value; one aligned volatile read.
    QUOTAS
        .get_ptr(index)
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
