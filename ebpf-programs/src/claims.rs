//! Claims: published before the SYN leaves, settled when the other end accepts, withdrawn when the client gives up.

use aya_ebpf::bindings::BPF_NOEXIST;
use culvert_abi::{Claim, FlowKey, Reason};

use crate::{
    maps::{CLAIMS, count},
    quotas,
};

/// Publishes `claim`, at the expense of `claim.quota`.
#[inline(always)]
pub fn publish(key: &FlowKey, claim: &Claim) {
    if !quotas::take_claim(claim.quota) {
        count(Reason::ClaimQuota);
        return;
    }
    if CLAIMS.insert(key, claim, u64::from(BPF_NOEXIST)).is_ok() {
        return;
    }
    // A claim of the same tuple that is still there belongs to an attempt that is over, at the expense of who made it.
    // SAFETY: a single field of an entry that is written whole.
    if let Some(quota) = unsafe { CLAIMS.get(key) }.map(|old| old.quota) {
        settle(key, quota);
    }
    if CLAIMS.insert(key, claim, u64::from(BPF_NOEXIST)).is_err() {
        quotas::return_claim(claim.quota);
        count(Reason::ClaimMapFull);
    }
}

/// Deletes the claim if it is still the one of this attempt.
#[inline(always)]
pub fn withdraw(key: &FlowKey, sequence: u32) {
    // SAFETY: only the sequence number and the quota are read; a concurrent replacement is another attempt's.
    let Some(claim) = (unsafe { CLAIMS.get(key) }) else {
        return;
    };
    let (found, quota) = (claim.sequence, claim.quota);
    if found == sequence {
        settle(key, quota);
    }
}

/// Deletes a claim at the expense of `quota`; `false` when it is not there any more.
#[inline(always)]
pub fn settle(key: &FlowKey, quota: u32) -> bool {
    let deleted = CLAIMS.remove(key).is_ok();
    if deleted {
        quotas::return_claim(quota);
    }
    deleted
}
