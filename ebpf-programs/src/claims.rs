//! Claims: published before the SYN leaves, settled when the other end accepts, withdrawn when the client gives up.

use aya_ebpf::bindings::BPF_ANY;
use culvert_abi::{Claim, FlowKey, Reason};

use crate::{
    maps::{CLAIMS, count},
    quotas,
};

/// Publishes `claim`, at the expense of the pod with the cookie `claim.client_netns`.
#[inline(always)]
pub fn publish(key: &FlowKey, claim: &Claim) {
    let client = claim.client_netns;
    if !quotas::take_claim(client) {
        count(Reason::ClaimQuota);
        return;
    }
    // A claim of the same tuple that is still there belongs to an attempt that is over, at the expense of who made it.
    // SAFETY: only the client is read.
    if let Some(client) = unsafe { CLAIMS.get(key) }.map(|old| old.client_netns) {
        settle(key, client);
    }
    if CLAIMS.insert(key, claim, u64::from(BPF_ANY)).is_err() {
        quotas::return_claim(client);
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

/// Deletes a claim of the pod `client`; `false` when it is not there any more.
#[inline(always)]
pub fn settle(key: &FlowKey, client: u64) -> bool {
    let deleted = CLAIMS.remove(key).is_ok();
    if deleted {
        quotas::return_claim(client);
    }
    deleted
}
