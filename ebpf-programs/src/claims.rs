//! Claims: published before the SYN leaves, settled when the other end accepts, withdrawn when the client gives up.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::bindings::BPF_ANY;
use culvert_abi::{CLAIMS_PER_POD, Claim, FlowKey, Reason};

use crate::maps::{CLAIMS, QUOTAS, count};

/// Publishes `claim`, at the expense of the pod with the cookie `claim.client_netns`.
#[inline(always)]
pub fn publish(key: &FlowKey, claim: &Claim) {
    let client = claim.client_netns;
    if !add(client, 1).is_some_and(|before| before < CLAIMS_PER_POD) {
        add(client, -1);
        count(Reason::ClaimQuota);
        return;
    }
    // A claim of the same tuple that is still there belongs to an attempt that is over, at the expense of who made it.
    // SAFETY: only the client is read.
    if let Some(client) = unsafe { CLAIMS.get(key) }.map(|old| old.client_netns) {
        settle(key, client);
    }
    if CLAIMS.insert(key, claim, u64::from(BPF_ANY)).is_err() {
        add(client, -1);
        count(Reason::ClaimMapFull);
    }
}

/// Deletes the claim if it is still the one of this attempt.
#[inline(always)]
pub fn withdraw(key: &FlowKey, sequence: u32) {
    // SAFETY: only the sequence number and the client are read; a concurrent replacement is another attempt's.
    let Some(claim) = (unsafe { CLAIMS.get(key) }) else {
        return;
    };
    let (found, client) = (claim.sequence, claim.client_netns);
    if found == sequence {
        settle(key, client);
    }
}

/// Deletes a claim of the pod `client`.
#[inline(always)]
pub fn settle(key: &FlowKey, client: u64) {
    if CLAIMS.remove(key).is_ok() {
        add(client, -1);
    }
}

/// Changes the count of a pod and returns what it was; `None` for a pod that has left.
#[inline(always)]
fn add(client: u64, delta: i64) -> Option<i64> {
    let quota = QUOTAS.get_ptr_mut(&client)?;
    // The target has no compare-and-swap as Rust's atomics want it, hence the intrinsic.
    // SAFETY: a live map value; only ever accessed atomically.
    Some(unsafe {
        atomic_xadd::<i64, i64, { AtomicOrdering::Relaxed }>(&raw mut (*quota).claims, delta)
    })
}
