//! What is read from the kernel's own structures. Where it lies there the loader finds out from the kernel's BTF.

use core::{ffi::c_void, ptr};

use aya_ebpf::helpers::generated::{bpf_probe_read_kernel, bpf_skc_to_tcp_sock};

macro_rules! offsets {
    ($($(#[doc = $doc:literal])+ $name:ident;)*) => {
        $($(#[doc = $doc])+ #[unsafe(no_mangle)] pub static $name: u64 = 0;)*
    };
}

offsets! {
    /// `write_seq` in `struct tcp_sock`.
    TCP_WRITE_SEQ_OFFSET;
    /// `copied_seq` in it.
    TCP_COPIED_SEQ_OFFSET;
    /// `icsk_ulp_ops` in it.
    TCP_UPPER_LAYER_OFFSET;
    /// `is_mptcp` in it.
    TCP_MULTIPATH_OFFSET;
    /// `sk_err` in `struct sock`.
    SOCK_ERROR_OFFSET;
    /// `__sk_common.skc_cookie` in it.
    SOCK_COOKIE_OFFSET;
    /// `__sk_common.skc_state` in it.
    SOCK_STATE_OFFSET;
    /// `sk_backlog.rmem_alloc` in it.
    SOCK_UNREAD_OFFSET;
    /// `sk_lock.owned` in it.
    SOCK_OWNED_OFFSET;
    /// `sk_rcvlowat` in it.
    SOCK_LOW_WATER_OFFSET;
    /// `sk_socket` in it.
    SOCK_SOCKET_OFFSET;
    /// `file` in `struct socket`.
    SOCKET_FILE_OFFSET;
    /// `f_flags` in `struct file`.
    FILE_FLAGS_OFFSET;
    /// Where a `struct file` counts who holds it.
    FILE_HOLDERS_OFFSET;
    /// What is there if it is one.
    FILE_ONE_HOLDER;
    /// `__sk_common.skc_prot` in `struct sock`.
    SOCK_PROTOCOL_OFFSET;
    /// `memory_allocated` in `struct proto`: a pointer.
    PROTOCOL_MEMORY_OFFSET;
    /// `sysctl_mem` in it: a pointer.
    PROTOCOL_LIMITS_OFFSET;
    /// `sk_userlocks` in `struct sock`: its byte.
    SOCK_LOCKS_OFFSET;
    /// Its lowest bit there.
    SOCK_LOCKS_SHIFT;
    /// `__sk_common.skc_flags` in `struct sock`.
    SOCK_FLAGS_OFFSET;
    /// The number of SOCK_DONE among those.
    DONE_FLAG;
    /// The number of SOCK_ZEROCOPY.
    ZERO_COPY_FLAG;
    /// `sk_user_data` in `struct sock`.
    SOCK_USER_DATA_OFFSET;
    /// `ingress_msg.next` in `struct sk_psock`.
    PSOCK_INGRESS_OFFSET;
    /// `sk_wq` in `struct sock`.
    SOCK_WAIT_OFFSET;
    /// `wait.head.next` in `struct socket_wq`.
    WAIT_HEAD_OFFSET;
    /// `func` in `struct wait_queue_entry`.
    WAITER_FUNCTION_OFFSET;
    /// `entry.next` in it.
    WAITER_NEXT_OFFSET;
    /// Address of the function by which a thread waits in a system call for a socket.
    THREAD_WAITS;
    /// That by which epoll(7) does.
    EPOLL_WAITS;
    /// `__sk_common.skc_net.net` in `struct sock`.
    SOCK_NET_OFFSET;
    /// `net_cookie` in `struct net`.
    NET_COOKIE_OFFSET;
    /// `sk` in `struct socket`.
    SOCKET_SOCK_OFFSET;
    /// `sk_protocol` in `struct sock`.
    SOCK_TRANSPORT_OFFSET;
    /// `files` in `struct task_struct`.
    TASK_FILES_OFFSET;
    /// `fdt` in `struct files_struct`.
    FILES_TABLE_OFFSET;
    /// `max_fds` in `struct fdtable`.
    TABLE_SIZE_OFFSET;
    /// `fd` in it.
    TABLE_FILES_OFFSET;
    /// `f_inode` in `struct file`.
    FILE_INODE_OFFSET;
    /// `private_data` in it.
    FILE_PRIVATE_OFFSET;
    /// `i_mode` in `struct inode`.
    INODE_MODE_OFFSET;
    /// Bytes that a socket may have unread before its peer sends by TCP.
    SHORT_LIMIT;
}

/// The value that the loader gave.
#[inline(always)]
pub fn given(global: &'static u64) -> u64 {
    // SAFETY: a volatile read keeps the compiler from assuming the value here.
    unsafe { ptr::read_volatile(global) }
}

/// The number that the SYN carries (its octet is counted when the SYN is sent, which is after this callback), and later that of
/// the next octet to be written.
#[inline(always)]
pub fn write_seq(sk: *mut c_void) -> Option<u32> {
    tcp_field(sk, given(&TCP_WRITE_SEQ_OFFSET))
}

/// The error that the application will be told, 0 for none.
#[inline(always)]
pub fn sock_error(sk: *mut c_void) -> u32 {
    tcp_field(sk, given(&SOCK_ERROR_OFFSET)).unwrap_or(0)
}

/// Whether the peer's FIN has been taken, and counted in `bytes_received`.
#[inline(always)]
pub fn has_received_fin(sk: *mut c_void) -> bool {
    tcp_field::<u64>(sk, given(&SOCK_FLAGS_OFFSET))
        .is_some_and(|flags| flags >> (given(&DONE_FLAG) & 63) & 1 != 0)
}

/// A field of the kernel's `struct tcp_sock`.
#[inline(always)]
pub fn tcp_field<T: Copy>(sk: *mut c_void, offset: u64) -> Option<T> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: the helper returns null or a `struct tcp_sock` of the kernel; the verifier checks the offset, a constant
    // by then, against the kernel's types.
    unsafe {
        let tcp = bpf_skc_to_tcp_sock(sk).cast::<u8>();
        if tcp.is_null() {
            return None;
        }
        Some(ptr::read_volatile(tcp.add(offset as usize).cast::<T>()))
    }
}

/// What is at an address that may mean nothing any more.
#[inline(always)]
pub fn peek<T: Copy + Default>(address: u64) -> Option<T> {
    let mut value = T::default();
    // SAFETY: the helper writes `size_of::<T>()` bytes into `value`, or none; any address will do.
    let status = unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast(),
            size_of::<T>() as u32,
            address as *const c_void,
        )
    };
    (status == 0).then_some(value)
}

/// Whether what was redirected to a socket is unread.
#[inline(always)]
pub fn has_redirected(sk: u64) -> bool {
    // Bits of the pointer in `sk_user_data`, see the kernel's include/net/sock.h.
    const FLAGS: u64 = 7;
    const IS_PSOCK: u64 = 4;
    let Some(data) = peek::<u64>(sk + given(&SOCK_USER_DATA_OFFSET)) else {
        return false;
    };
    if data & IS_PSOCK == 0 {
        return false;
    }
    let queue = (data & !FLAGS) + given(&PSOCK_INGRESS_OFFSET);
    peek::<u64>(queue).is_some_and(|first| first != queue)
}

/// Who waits for a socket: as many in poll(2) and the like as this says, each of which holds the socket's file (in epoll(7) nobody
/// does), and [`WAITS_IN_CALL`] where a thread waits inside a call that reads or writes. [`TOO_MANY_WAIT`] where that cannot be said.
// Not in each place where it is asked; what a function of its own returns, the kernel's types must be able to say.
#[inline(never)]
pub fn waiters(sk: u64) -> u64 {
    const MOST: usize = 8;
    let Some(queue) = peek::<u64>(sk + given(&SOCK_WAIT_OFFSET)) else {
        return TOO_MANY_WAIT;
    };
    let head = queue + given(&WAIT_HEAD_OFFSET);
    let mut found = 0;
    let mut next = head;
    for _ in 0..MOST {
        next = match peek::<u64>(next) {
            Some(next) if next == head => return forgotten(found),
            Some(next) => next,
            None => return TOO_MANY_WAIT,
        };
        let waiter = next - given(&WAITER_NEXT_OFFSET);
        let function = peek::<u64>(waiter + given(&WAITER_FUNCTION_OFFSET)).unwrap_or(0);
        if function == given(&THREAD_WAITS) {
            found |= WAITS_IN_CALL;
        } else if function != given(&EPOLL_WAITS) {
            found += 1;
        }
    }
    TOO_MANY_WAIT
}

pub const WAITS_IN_CALL: u64 = 1 << 32;
pub const TOO_MANY_WAIT: u64 = 1 << 33 | WAITS_IN_CALL;

/// The same value, of which the verifier knows nothing: what follows need not be looked at once for each that it might be. (It took
/// 0.3 s of each start.)
#[inline(always)]
fn forgotten(value: u64) -> u64 {
    peek((&raw const value) as u64).unwrap_or(TOO_MANY_WAIT)
}

/// Whether nobody can be in the middle of a call on a socket: its file is held by one descriptor, and by those who wait in poll(2). Every
/// call of a process with several threads holds it as well; that of its only thread does not.
#[inline(always)]
pub fn is_at_rest(sk: u64) -> bool {
    let before = waiters(sk);
    let held = file_of(sk).and_then(|file| peek::<u64>(file + given(&FILE_HOLDERS_OFFSET)));
    let polls = before & !WAITS_IN_CALL;
    held == Some(polls + given(&FILE_ONE_HOLDER)) && waiters(sk) == before
}

/// The open file that a socket belongs to.
#[inline(always)]
pub fn file_of(sk: u64) -> Option<u64> {
    let socket = peek::<u64>(sk + given(&SOCK_SOCKET_OFFSET))?;
    peek::<u64>(socket + given(&SOCKET_FILE_OFFSET))
}
