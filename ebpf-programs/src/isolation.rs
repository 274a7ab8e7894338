//! Cutting a socket off from its application, at no cost to any other.
//!
//! A sockops program cannot reset a connection, but it can put the socket into a SOCKHASH whose programs drop
//! everything: what arrives is thrown away before the application can read it, what the application sends fails with
//! EACCES. The agent then destroys the socket; without an agent it stays mute until there is one.

use aya_ebpf::{
    bindings::sk_action::SK_DROP,
    helpers::generated::bpf_get_socket_cookie,
    macros::{sk_msg, stream_verdict},
    programs::{SkBuffContext, SkMsgContext, SockOpsContext},
};
use culvert_abi::{FlowKey, Isolated, Reason, event_kind, knob};

use crate::{
    events,
    maps::{ISOLATED_CLIENTS, ISOLATED_SERVERS, count, knob},
};

#[stream_verdict]
pub fn isolated_receive(_: SkBuffContext) -> u32 {
    SK_DROP
}

#[sk_msg]
pub fn isolated_send(_: SkMsgContext) -> u32 {
    SK_DROP
}

/// Isolates the socket that is just being established in the namespace `netns`; `client_end` says which end it is.
#[inline(always)]
pub fn isolate(ctx: &SockOpsContext, key: &FlowKey, netns: u64, client_end: bool, reason: Reason) {
    count(reason);
    if knob(knob::SKIP_ISOLATION) {
        return;
    }
    // SAFETY: helper call with this program's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.ops.cast()) };
    // SAFETY: the context is valid for the length of this program.
    let ops = unsafe { &mut *ctx.ops };
    let isolated = Isolated {
        key: *key,
        socket_cookie: cookie,
        socket_netns: netns,
    };
    let entered = if client_end {
        ISOLATED_CLIENTS.update(isolated, ops, 0)
    } else {
        ISOLATED_SERVERS.update(isolated, ops, 0)
    };
    if entered.is_err() {
        count(Reason::IsolationFailed);
    }
    let mut event = events::blank(event_kind::ISOLATED, key);
    event.reason = reason as u32;
    event.socket_cookie = cookie;
    event.netns = netns;
    event.client_end = u32::from(client_end);
    events::alarm(&event);
}
