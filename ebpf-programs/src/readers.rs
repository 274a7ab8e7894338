//! Who uses sockets in ways that do not go with redirected bytes. Such a pod is remembered; what is short-circuited already is not any
//! more, and where such bytes are unread by then, the flow is stuck and the agent is told.
//!
//! These are tracepoints of system calls, which every kernel has; the kernel says a descriptor, and from there on it is read.

use aya_ebpf::{
    helpers::generated::bpf_get_current_task, macros::tracepoint, programs::TracePointContext,
};
use culvert_abi::{Candidate, ShortName, knob, news, unfit};

use crate::{
    kernel::{
        FILE_INODE_OFFSET, FILE_PRIVATE_OFFSET, FILES_TABLE_OFFSET, INODE_MODE_OFFSET,
        NET_COOKIE_OFFSET, SOCK_COOKIE_OFFSET, SOCK_NET_OFFSET, SOCK_TRANSPORT_OFFSET,
        SOCK_UNREAD_OFFSET, SOCKET_SOCK_OFFSET, TABLE_FILES_OFFSET, TABLE_SIZE_OFFSET,
        TASK_FILES_OFFSET, given, has_redirected, peek,
    },
    maps::{CANDIDATES, SHORT_FLOWS, SHORT_NAMES, UNFIT, is_pod, knob},
};

/// Where a tracepoint of a system call has its arguments, 8 bytes each: see its `format` in tracefs.
const ARGUMENTS: usize = 16;

/// `syscalls:sys_enter_splice`
#[tracepoint]
pub fn splices(ctx: TracePointContext) -> u32 {
    notice(argument(&ctx, 0), unfit::SPLICES);
    0
}

/// `syscalls:sys_enter_setsockopt`
#[tracepoint]
pub fn sets(ctx: TracePointContext) -> u32 {
    const SOL_SOCKET: u64 = 1;
    const SO_ZEROCOPY: u64 = 60;
    if argument(&ctx, 1) == Some(SOL_SOCKET) && argument(&ctx, 2) == Some(SO_ZEROCOPY) {
        notice(argument(&ctx, 0), unfit::ZERO_COPIES);
    }
    0
}

/// `syscalls:sys_enter_ioctl`
#[tracepoint]
pub fn asks(ctx: TracePointContext) -> u32 {
    const FIONREAD: u64 = 0x541b;
    if argument(&ctx, 1) == Some(FIONREAD) {
        notice(argument(&ctx, 0), unfit::ASKS);
    }
    0
}

#[inline(always)]
fn argument(ctx: &TracePointContext, index: usize) -> Option<u64> {
    // SAFETY: a word of the tracepoint's record.
    unsafe { ctx.read_at(ARGUMENTS + 8 * index) }.ok()
}

#[inline(always)]
fn notice(descriptor: Option<u64>, how: u32) {
    let Some(sk) = descriptor.and_then(tcp_socket) else {
        return;
    };
    let Some(netns) = peek::<u64>(sk + given(&SOCK_NET_OFFSET))
        .and_then(|net| peek::<u64>(net + given(&NET_COOKIE_OFFSET)))
    else {
        return;
    };
    if !is_pod(netns) || knob(knob::SKIP_READERS) {
        return;
    }
    if UNFIT.get_ptr(&netns).is_none() {
        // Where there is no room, each of its flows is told of.
        let _ = UNFIT.insert(&netns, &how, 0);
    }
    let Some(cookie) = peek::<u64>(sk + given(&SOCK_COOKIE_OFFSET)) else {
        return;
    };
    // SAFETY: names are written whole.
    let Some(name) = (unsafe { SHORT_NAMES.get(&cookie) }) else {
        return;
    };
    stop(name, how);
    if is_stuck(sk, how) {
        let stuck = Candidate {
            flow: name.flow,
            sequence: name.sequence,
            news: if name.side == 0 {
                news::STUCK_CLIENT
            } else {
                news::STUCK_SERVER
            },
        };
        let _ = CANDIDATES.output(&stuck, 0);
    }
}

/// Whether a flow cannot go on as it would over TCP, now that an end does this.
#[inline(always)]
fn is_stuck(sk: u64, how: u32) -> bool {
    match how {
        unfit::SPLICES => has_redirected(sk),
        // Which of the unread bytes it does not count depends on the kernel.
        unfit::ASKS => peek::<u32>(sk + given(&SOCK_UNREAD_OFFSET)) != Some(0),
        _ => true,
    }
}

/// Nothing more is redirected to this end.
#[inline(always)]
fn stop(name: &ShortName, how: u32) {
    if let Some(flow) = SHORT_FLOWS.get_ptr_mut(&name.flow) {
        // SAFETY: a live map value; whoever else writes here writes such bits.
        let [client, server] = unsafe { &mut (*flow).sides };
        let side = if name.side == 0 { client } else { server };
        side.unfit |= how;
    }
}

/// The TCP socket behind a descriptor of this thread. What it says may change meanwhile: then it is another's call that is noticed, or none.
#[inline(always)]
fn tcp_socket(descriptor: u64) -> Option<u64> {
    const KIND: u16 = 0o170_000;
    const SOCKET: u16 = 0o140_000;
    const TCP: u16 = 6;
    // SAFETY: helper call without arguments.
    let task = unsafe { bpf_get_current_task() };
    let files = peek::<u64>(task + given(&TASK_FILES_OFFSET))?;
    let table = peek::<u64>(files + given(&FILES_TABLE_OFFSET))?;
    let size = peek::<u32>(table + given(&TABLE_SIZE_OFFSET))?;
    if descriptor >= u64::from(size) {
        return None;
    }
    let slots = peek::<u64>(table + given(&TABLE_FILES_OFFSET))?;
    let file = peek::<u64>(slots + 8 * descriptor)?;
    let inode = peek::<u64>(file + given(&FILE_INODE_OFFSET))?;
    if peek::<u16>(inode + given(&INODE_MODE_OFFSET))? & KIND != SOCKET {
        return None;
    }
    let socket = peek::<u64>(file + given(&FILE_PRIVATE_OFFSET))?;
    let sk = peek::<u64>(socket + given(&SOCKET_SOCK_OFFSET))?;
    (peek::<u16>(sk + given(&SOCK_TRANSPORT_OFFSET))? == TCP).then_some(sk)
}
