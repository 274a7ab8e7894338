//! `inbound`: who gets a connection that arrives in a pod. Loaded once per pod, because here the kernel offers no way
//! to ask which namespace it is in.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, sk_action::SK_DROP, sk_action::SK_PASS},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use culvert_abi::{
    FlowKey, HBONE_PORT, INBOUND_PORT, Listener, OUTBOUND_PORT, Reason, claim_kind, config_flag,
    knob, listener_kind, mapped,
};

use crate::{
    address::{AF_INET, from_words, is_loopback},
    maps::{CLAIMS, LISTENERS, count, flag, is_pod, knob},
    verdicts,
};

/// Cookie of the pod this instance serves, set by the loader.
#[unsafe(no_mangle)]
static POD_COOKIE: u64 = 0;

const IPPROTO_TCP: u32 = 6;

#[sk_lookup]
pub fn inbound(ctx: SkLookupContext) -> u32 {
    match decide(&ctx) {
        Ok(reason) => {
            count(reason);
            SK_PASS
        }
        Err(None) => SK_PASS,
        Err(Some(reason)) => {
            count(reason);
            SK_DROP
        }
    }
}

/// `Ok`: the connection is where it belongs. `Err(None)`: not ours to decide. `Err(Some)`: dropped.
#[inline(always)]
fn decide(ctx: &SkLookupContext) -> Result<Reason, Option<Reason>> {
    let lookup = ctx.lookup;
    // SAFETY: single volatile reads of context fields.
    let (protocol, family, local_port) = unsafe {
        (
            ptr::read_volatile(&raw const (*lookup).protocol),
            ptr::read_volatile(&raw const (*lookup).family),
            ptr::read_volatile(&raw const (*lookup).local_port) as u16,
        )
    };
    if protocol != IPPROTO_TCP {
        return Err(None);
    }
    // SAFETY: single volatile reads of context fields; those of the other family are 0. All of them before any branch: merged
    // loads through a changed context pointer are what the verifier refuses.
    let (local4, remote4, local6, remote6, remote_port) = unsafe {
        (
            ptr::read_volatile(&raw const (*lookup).local_ip4),
            ptr::read_volatile(&raw const (*lookup).remote_ip4),
            [
                ptr::read_volatile(&raw const (*lookup).local_ip6[0]),
                ptr::read_volatile(&raw const (*lookup).local_ip6[1]),
                ptr::read_volatile(&raw const (*lookup).local_ip6[2]),
                ptr::read_volatile(&raw const (*lookup).local_ip6[3]),
            ],
            [
                ptr::read_volatile(&raw const (*lookup).remote_ip6[0]),
                ptr::read_volatile(&raw const (*lookup).remote_ip6[1]),
                ptr::read_volatile(&raw const (*lookup).remote_ip6[2]),
                ptr::read_volatile(&raw const (*lookup).remote_ip6[3]),
            ],
            u16::from_be(ptr::read_volatile(&raw const (*lookup).remote_port)),
        )
    };
    let (local, remote) = if family == AF_INET {
        (mapped(local4), mapped(remote4))
    } else {
        (from_words(local6), from_words(remote6))
    };
    if is_loopback(&local) {
        return Err(None);
    }
    if flag(config_flag::LEAVING) {
        count(Reason::PassedLeaving);
        return Err(None);
    }
    // SAFETY: the loader sets this constant; a volatile read keeps the compiler from assuming the value here.
    let cookie = unsafe { ptr::read_volatile(&raw const POD_COOKIE) };
    let key = FlowKey {
        netns_cookie: cookie,
        client: remote,
        server: local,
        client_port: remote_port,
        server_port: local_port,
        padding: 0,
    };
    if let Some(claim) = CLAIMS.get_ptr_mut(&key) {
        // SAFETY: claims are written whole before the SYN leaves; `admitted` is written here only.
        let claim = unsafe { &mut *claim };
        match claim.kind {
            claim_kind::DIRECT => {
                // A pod that is leaving guards nothing any more: what was let through before arrives.
                let stands = verdicts::standing(claim, &key).is_some() || !is_pod(cookie);
                if claim.server_netns == cookie && (stands || knob(knob::SKIP_GENERATION)) {
                    claim.admitted = 1;
                    return Ok(Reason::AdmittedDirect);
                }
                return Err(Some(Reason::DroppedStaleClaim));
            }
            claim_kind::PROXY => return Ok(Reason::AdmittedProxy),
            claim_kind::OWN_ADDRESS => return Ok(Reason::AdmittedOwnAddress),
            claim_kind::NODE => return Ok(Reason::AdmittedNode),
            claim_kind::STEERED => {
                claim.admitted = 1;
                return assign(ctx, cookie, listener_kind::OUTBOUND, Reason::ToOutbound);
            }
            _ => return Err(Some(Reason::DroppedStaleClaim)),
        }
    }
    match local_port {
        HBONE_PORT => assign(ctx, cookie, listener_kind::HBONE, Reason::ToHbone),
        OUTBOUND_PORT | INBOUND_PORT if !knob(knob::PASS_OWN_PORTS) => {
            Err(Some(Reason::DroppedOwnPort))
        }
        _ if knob(knob::PASS_UNCLAIMED) => Err(None),
        _ => assign(ctx, cookie, listener_kind::INBOUND, Reason::ToPlaintext),
    }
}

/// Gives the connection to a listener of the agent; without one it fails closed.
#[inline(always)]
fn assign(
    ctx: &SkLookupContext,
    netns_cookie: u64,
    kind: u32,
    reason: Reason,
) -> Result<Reason, Option<Reason>> {
    let key = Listener {
        netns_cookie,
        kind,
        padding: 0,
    };
    // NO_REUSEPORT: a process of the pod that binds our port with SO_REUSEPORT gets no share of it.
    match LISTENERS.redirect_sk_lookup(ctx, key, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT)) {
        Ok(()) => Ok(reason),
        Err(_) if knob(knob::MISSING_LISTENER_PASSES) => Err(None),
        Err(_) => Err(Some(Reason::DroppedNoListener)),
    }
}
