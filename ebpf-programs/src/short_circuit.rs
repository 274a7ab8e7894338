//! The short-circuit: what one end of a direct flow sends goes straight into the other end's receive queue.
//!
//! `short_circuit` decides for each message; whenever in doubt it goes by TCP, and the next may be redirected again. A message is
//! redirected only when the peer has read every byte that this socket ever sent by TCP, for redirected bytes are read first.
//! `short_request` is run by the agent in a pod's namespace: it looks at a socket, and puts it into the map.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_F_CURRENT_NETNS, BPF_F_INGRESS, bpf_sock_tuple, sk_action::SK_PASS, sk_msg_md,
    },
    helpers::generated::{
        bpf_ktime_get_coarse_ns, bpf_map_update_elem, bpf_msg_redirect_hash, bpf_sk_lookup_tcp,
        bpf_sk_release, bpf_skc_to_tcp_sock,
    },
    macros::{classifier, sk_msg},
    programs::{SkMsgContext, TcContext},
};
use culvert_abi::{
    Candidate, FlowKey, ShortEnd, ShortFlow, ShortRequest, ShortSide, config_flag, fit, kept, knob,
    news, step,
};

use crate::{
    address::{is_mapped, words},
    events::sum,
    kernel::{
        FILE_FLAGS_OFFSET, PROTOCOL_LIMITS_OFFSET, PROTOCOL_MEMORY_OFFSET, SHORT_LIMIT,
        SOCK_COOKIE_OFFSET, SOCK_FLAGS_OFFSET, SOCK_LOCKS_OFFSET, SOCK_LOCKS_SHIFT,
        SOCK_LOW_WATER_OFFSET, SOCK_OWNED_OFFSET, SOCK_PROTOCOL_OFFSET, SOCK_STATE_OFFSET,
        SOCK_UNREAD_OFFSET, TCP_COPIED_SEQ_OFFSET, TCP_MULTIPATH_OFFSET, TCP_UPPER_LAYER_OFFSET,
        WAITS_IN_CALL, ZERO_COPY_FLAG, file_of, given, has_redirected, is_at_rest, peek, tcp_field,
        waiters, write_seq,
    },
    maps::{
        CANDIDATES, SHORT_ENDED, SHORT_ENDS, SHORT_FLOWS, SHORT_NAMES, SHORT_SOCKETS, flag, knob,
    },
};

const TCP_ESTABLISHED: u8 = 1;
const O_NONBLOCK: u32 = 0o4000;

/// Tells the agent of a flow that has carried enough to be worth it. What finds no room stays plain TCP.
#[inline(always)]
pub fn propose(flow: &FlowKey, sequence: u32) {
    let candidate = Candidate {
        flow: *flow,
        sequence,
        news: news::WORTH,
    };
    let _ = CANDIDATES.output(&candidate, 0);
}

/// The bytes that a flow's ends have redirected, the client's first, if it was entered. It is forgotten with its end.
#[inline(always)]
pub fn take(flow: &FlowKey) -> Option<(u64, u64)> {
    // SAFETY: single fields of a live map value.
    let found = unsafe { SHORT_FLOWS.get(flow) }?;
    let [client, server] = &found.sides;
    let bytes = (client.redirected, server.redirected);
    add_up(client);
    add_up(server);
    for socket in found.sockets {
        let _ = SHORT_NAMES.remove(&socket);
    }
    let _ = SHORT_FLOWS.remove(flow);
    Some(bytes)
}

/// Adds what an end has counted to the sums of the flows that are no more.
#[inline(always)]
fn add_up(side: &ShortSide) {
    let Some(sums) = SHORT_ENDED.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: a live map value; only ever changed atomically here.
    unsafe {
        sum(&raw mut (*sums).redirected, side.redirected);
        sum(&raw mut (*sums).messages, side.messages);
        sum(&raw mut (*sums).tcp_bytes, side.tcp_bytes);
        for (reason, count) in side.by_tcp.iter().enumerate() {
            sum(&raw mut (*sums).by_tcp[reason], *count);
        }
    }
}

#[sk_msg]
pub fn short_circuit(ctx: SkMsgContext) -> u32 {
    send(ctx.msg);
    SK_PASS
}

#[inline(always)]
fn send(msg: *mut sk_msg_md) {
    // SAFETY: reads of context fields, one of which the verifier types as a socket.
    let (sk, size) = unsafe {
        (
            (*msg).__bindgen_anon_3.sk.cast::<c_void>(),
            ptr::read_volatile(&raw const (*msg).size),
        )
    };
    let Some(end) = SHORT_ENDS.find(sk) else {
        return;
    };
    // What is not counted is not redirected.
    let Some(flow) = SHORT_FLOWS.get_ptr_mut(&end.flow) else {
        return;
    };
    let (side, peer) = sides(flow, end);
    let sent = if peer.unfit == 0 {
        judge(sk, end).and_then(|()| redirect(msg, end.peer_cookie))
    } else {
        Err(kept::READER)
    };
    match sent {
        Ok(()) => {
            side.redirected += u64::from(size);
            side.messages += 1;
            // SAFETY: helper call without arguments.
            side.last_ns = unsafe { bpf_ktime_get_coarse_ns() };
        }
        Err(reason) => {
            side.tcp_bytes += u64::from(size);
            if let Some(count) = side.by_tcp.get_mut(reason as usize) {
                *count += 1;
            }
        }
    }
}

/// An end's own side of a flow, and its peer's.
#[inline(always)]
fn sides<'a>(flow: *mut ShortFlow, end: &ShortEnd) -> (&'a mut ShortSide, &'a ShortSide) {
    // SAFETY: a live map value; the kernel holds the socket's lock, so nobody else counts for this side.
    let [client, server] = unsafe { &mut (*flow).sides };
    if end.side == 0 {
        (client, server)
    } else {
        (server, client)
    }
}

/// Whether the peer may be given a message directly: it must be the one of this connection, and have read everything else.
#[inline(always)]
fn judge(sk: *mut c_void, end: &mut ShortEnd) -> Result<(), u32> {
    let peer = end.peer;
    let is_peer = || peek::<u64>(peer + given(&SOCK_COOKIE_OFFSET)) == Some(end.peer_cookie);
    // With the maps goes what is in the queues.
    if end.live == 0 || flag(config_flag::LEAVING) {
        return Err(kept::NOT_LIVE);
    }
    if !is_peer() || peek::<u8>(peer + given(&SOCK_STATE_OFFSET)) != Some(TCP_ESTABLISHED) {
        return Err(kept::NOT_ESTABLISHED);
    }
    if tcp_field::<u64>(sk, given(&TCP_UPPER_LAYER_OFFSET)) != Some(0)
        || peek::<u64>(peer + given(&TCP_UPPER_LAYER_OFFSET)) != Some(0)
    {
        return Err(kept::CHANGED);
    }
    let Some(written) = write_seq(sk) else {
        return Err(kept::CHANGED);
    };
    let settled = ShortEnd::SETTLED | u64::from(written);
    if end.settled != settled && !knob(knob::SKIP_UNREAD) {
        // Whoever is in the middle of reading TCP would read on what comes that way, past what is redirected now.
        if peek::<u32>(peer + given(&TCP_COPIED_SEQ_OFFSET)) != Some(written)
            || peek::<u32>(peer + given(&SOCK_OWNED_OFFSET)) != Some(0)
        {
            return Err(kept::UNREAD);
        }
    }
    if end.settled != settled {
        // So would who waits since before O_NONBLOCK was set.
        if waits_since_before(peer) {
            return Err(kept::READER);
        }
        // And who has seen that there are bytes of TCP, and is about to read what another thread has read meanwhile.
        if !rests(peer) {
            return Err(kept::UNREAD);
        }
    }
    let unread = peek::<u32>(peer + given(&SOCK_UNREAD_OFFSET));
    if unread.is_none_or(|unread| u64::from(unread) > given(&SHORT_LIMIT))
        && !knob(knob::SKIP_LIMIT)
    {
        return Err(kept::FULL);
    }
    // Each CPU keeps a part of its own: the sum may be below zero.
    let pages = peek::<i64>(end.memory);
    if pages.is_none_or(|pages| pages >= end.memory_most as i64) {
        return Err(kept::PRESSURE);
    }
    if !reads_at_once(peer) && !knob(knob::SKIP_READER_FLAGS) {
        return Err(kept::READER);
    }
    // What was read since may have been another's.
    if !is_peer() {
        return Err(kept::NOT_ESTABLISHED);
    }
    end.settled = settled;
    Ok(())
}

/// Whether a thread waits for a socket that does not block: its call is older than that, and may know of nothing that is redirected.
#[inline(always)]
fn waits_since_before(sock: u64) -> bool {
    waiters(sock) & WAITS_IN_CALL != 0 && !knob(knob::SKIP_WAITERS)
}

/// Whether no call that was begun before can still be about to read.
#[inline(always)]
fn rests(sock: u64) -> bool {
    is_at_rest(sock) || knob(knob::SKIP_CALLS)
}

/// Whether a socket's reads neither block nor wait for more than a byte, and its buffer may grow.
#[inline(always)]
fn reads_at_once(sock: u64) -> bool {
    if peek::<u32>(sock + given(&SOCK_LOW_WATER_OFFSET)) != Some(1) || has_own_buffer(sock) {
        return false;
    }
    flags(sock).is_some_and(|flags| flags & O_NONBLOCK != 0)
}

/// Whether the application has chosen the size of a socket's receive buffer.
#[inline(always)]
fn has_own_buffer(sock: u64) -> bool {
    const SOCK_RCVBUF_LOCK: u8 = 2;
    let locks = peek::<u8>(sock + given(&SOCK_LOCKS_OFFSET));
    locks.is_none_or(|byte| (byte >> (given(&SOCK_LOCKS_SHIFT) & 7)) & SOCK_RCVBUF_LOCK != 0)
}

/// The flags of the open file that a socket belongs to.
#[inline(always)]
fn flags(sock: u64) -> Option<u32> {
    peek::<u32>(file_of(sock)? + given(&FILE_FLAGS_OFFSET))
}

#[inline(always)]
fn redirect(msg: *mut sk_msg_md, peer_cookie: u64) -> Result<(), u32> {
    let mut key = peer_cookie;
    // SAFETY: helper call with this program's context and a key of the map's size.
    let verdict = unsafe {
        bpf_msg_redirect_hash(
            msg,
            (&raw const SHORT_SOCKETS).cast_mut().cast(),
            (&raw mut key).cast(),
            u64::from(BPF_F_INGRESS),
        )
    };
    if verdict == i64::from(SK_PASS) {
        Ok(())
    } else {
        Err(kept::LEFT)
    }
}

/// Run by the agent with a [`ShortRequest`] as the packet; returns one of [`fit`].
#[classifier]
pub fn short_request(ctx: TcContext) -> i32 {
    let (start, end) = (ctx.data(), ctx.data_end());
    if start + size_of::<ShortRequest>() > end {
        return fit::MALFORMED as i32;
    }
    let packet = start as *mut ShortRequest;
    // SAFETY: the verifier has seen that the packet is long enough, and any bytes are a request.
    let (answer, socket) = find(&ctx, unsafe { &*packet });
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*packet).socket, socket) };
    answer as i32
}

/// Looks the socket up and does what is asked; returns the answer, and the socket's address.
#[inline(always)]
fn find(ctx: &TcContext, request: &ShortRequest) -> (u32, u64) {
    let flow = &request.end.flow;
    let (local, local_port, remote, remote_port) = if request.end.side == 0 {
        (
            &flow.client,
            flow.client_port,
            &flow.server,
            flow.server_port,
        )
    } else {
        (
            &flow.server,
            flow.server_port,
            &flow.client,
            flow.client_port,
        )
    };
    // As in a packet that arrives.
    // SAFETY: zero is a valid value of every field.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let size = if is_mapped(local) {
        let ([.., from], [.., to]) = (words(remote), words(local));
        let ipv4 = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
        ipv4.saddr = from;
        ipv4.daddr = to;
        ipv4.sport = remote_port.to_be();
        ipv4.dport = local_port.to_be();
        size_of_val(ipv4)
    } else {
        let ipv6 = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
        ipv6.saddr = words(remote);
        ipv6.daddr = words(local);
        ipv6.sport = remote_port.to_be();
        ipv6.dport = local_port.to_be();
        size_of_val(ipv6)
    };
    // SAFETY: helper calls with this program's context; what is found is given back.
    unsafe {
        let sk = bpf_sk_lookup_tcp(
            ctx.skb.skb.cast(),
            &raw mut tuple,
            size as u32,
            BPF_F_CURRENT_NETNS as i64 as u64,
            0,
        );
        if sk.is_null() {
            return (fit::GONE, 0);
        }
        let sk = sk.cast::<c_void>();
        let tcp = bpf_skc_to_tcp_sock(sk) as u64;
        let answer = if tcp == 0 {
            fit::GONE
        } else {
            serve(sk, tcp, request)
        };
        bpf_sk_release(sk);
        (answer, tcp)
    }
}

#[inline(always)]
fn serve(sk: *mut c_void, tcp: u64, request: &ShortRequest) -> u32 {
    if peek::<u64>(tcp + given(&SOCK_COOKIE_OFFSET)) != Some(request.cookie) {
        return fit::GONE;
    }
    match request.step {
        step::EXAMINE => examine(tcp),
        step::ENTER => match examine(tcp) {
            fit::YES => enter(sk, tcp, request),
            unfit => unfit,
        },
        step::START => start(sk, request),
        step::STOP => {
            if let Some(end) = SHORT_ENDS.find(sk) {
                end.live = 0;
            }
            fit::YES
        }
        step::LOOK if has_redirected(tcp) => fit::BUSY,
        step::LOOK => fit::YES,
        _ => fit::MALFORMED,
    }
}

/// Whether a socket is one that can be short-circuited. With a stack of its own.
#[inline(never)]
fn examine(tcp: u64) -> u32 {
    if peek::<u8>(tcp + given(&SOCK_STATE_OFFSET)) != Some(TCP_ESTABLISHED) {
        return fit::NOT_ESTABLISHED;
    }
    if peek::<u64>(tcp + given(&TCP_UPPER_LAYER_OFFSET)) != Some(0) {
        return fit::UPPER_LAYER;
    }
    if peek::<u8>(tcp + given(&TCP_MULTIPATH_OFFSET)) != Some(0) {
        return fit::MULTIPATH;
    }
    if peek::<u32>(tcp + given(&SOCK_LOW_WATER_OFFSET)) != Some(1) {
        return fit::LOW_WATER;
    }
    if has_own_buffer(tcp) {
        return fit::RECEIVE_BUFFER;
    }
    let options = peek::<u64>(tcp + given(&SOCK_FLAGS_OFFSET));
    if options.is_none_or(|options| options >> (given(&ZERO_COPY_FLAG) & 63) & 1 != 0) {
        return fit::ZERO_COPY;
    }
    match flags(tcp) {
        None => fit::GONE,
        Some(flags) if flags & O_NONBLOCK == 0 => fit::BLOCKING,
        // It would go on waiting for what comes by TCP.
        Some(_) if waits_since_before(tcp) => fit::BLOCKING,
        Some(_) => fit::YES,
    }
}

#[inline(always)]
fn enter(sk: *mut c_void, tcp: u64, request: &ShortRequest) -> u32 {
    let protocol = peek::<u64>(tcp + given(&SOCK_PROTOCOL_OFFSET));
    let memory = protocol.and_then(|at| peek::<u64>(at + given(&PROTOCOL_MEMORY_OFFSET)));
    let most = match request.end.memory_most {
        0 => protocol.and_then(memory_most),
        asked => Some(asked),
    };
    let (Some(memory), Some(most)) = (memory, most) else {
        return fit::REFUSED;
    };
    let Some(end) = SHORT_ENDS.find_or_create(sk) else {
        return fit::REFUSED;
    };
    *end = request.end;
    end.live = 0;
    end.settled = 0;
    end.memory = memory;
    end.memory_most = most;
    let key = request.cookie;
    // SAFETY: a key of the map's size, and a socket with a reference; the kernel takes its own.
    let status = unsafe {
        bpf_map_update_elem(
            (&raw const SHORT_SOCKETS).cast_mut().cast(),
            (&raw const key).cast(),
            sk.cast_const(),
            u64::from(BPF_ANY),
        )
    };
    if status == 0 { fit::YES } else { fit::REFUSED }
}

/// Up to how much memory for TCP bytes are redirected, in pages. Below the first limit the kernel lets receive buffers grow; this is
/// some way below: what then comes by TCP needs room as well.
#[inline(always)]
fn memory_most(protocol: u64) -> Option<u64> {
    const LITTLE: u64 = 4096;
    if knob(knob::LITTLE_MEMORY) {
        let memory = peek::<u64>(protocol + given(&PROTOCOL_MEMORY_OFFSET))?;
        return Some(peek::<u64>(memory)? + LITTLE);
    }
    let limits = peek::<u64>(protocol + given(&PROTOCOL_LIMITS_OFFSET))?;
    Some(peek::<u64>(limits)? / 2)
}

#[inline(always)]
fn start(sk: *mut c_void, request: &ShortRequest) -> u32 {
    let Some(end) = SHORT_ENDS.find(sk) else {
        return fit::GONE;
    };
    // A read that began before the peer was in the map knows of nothing that is redirected. It may have begun to wait since, or
    // have waited for the lock and not gone on yet.
    let peer = request.end.peer;
    if peek::<u32>(peer + given(&SOCK_OWNED_OFFSET)) != Some(0)
        || waits_since_before(peer)
        || !rests(peer)
    {
        return fit::BUSY;
    }
    end.live = 1;
    fit::YES
}
