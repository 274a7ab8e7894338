//! Reading addresses and ports out of contexts, whose fields the verifier only lets us read whole and one by one.

use core::ptr;

use aya_ebpf::bindings::{bpf_sock_addr, bpf_sock_ops};
use culvert_abi::{Address, FlowKey, mapped};

pub const AF_INET: u32 = 2;
pub const AF_INET6: u32 = 10;

/// Both ends of a socket as a sockops program sees them.
pub struct Ends {
    pub local: Address,
    pub remote: Address,
    pub local_port: u16,
    pub remote_port: u16,
}

impl Ends {
    /// `None` for what is neither IPv4 nor IPv4-mapped.
    #[inline(always)]
    pub fn of(ops: *mut bpf_sock_ops) -> Option<Self> {
        // SAFETY: single volatile reads of context fields.
        unsafe {
            let family = ptr::read_volatile(&raw const (*ops).family);
            if family == AF_INET6 {
                let prefix = ptr::read_volatile(&raw const (*ops).remote_ip6[2]);
                let high = ptr::read_volatile(&raw const (*ops).remote_ip6[0])
                    | ptr::read_volatile(&raw const (*ops).remote_ip6[1]);
                if high != 0 || prefix != u32::to_be(0xffff) {
                    return None;
                }
            } else if family != AF_INET {
                return None;
            }
            Some(Self {
                local: mapped(ptr::read_volatile(&raw const (*ops).local_ip4)),
                remote: mapped(ptr::read_volatile(&raw const (*ops).remote_ip4)),
                local_port: ptr::read_volatile(&raw const (*ops).local_port) as u16,
                remote_port: u32::from_be(ptr::read_volatile(&raw const (*ops).remote_port)) as u16,
            })
        }
    }

    /// The key of the connection that this socket opened.
    #[inline(always)]
    pub fn as_client(&self, netns_cookie: u64) -> FlowKey {
        FlowKey {
            netns_cookie,
            client: self.local,
            server: self.remote,
            client_port: self.local_port,
            server_port: self.remote_port,
            padding: 0,
        }
    }

    /// The key of the connection that this socket accepted.
    #[inline(always)]
    pub fn as_server(&self, netns_cookie: u64) -> FlowKey {
        FlowKey {
            netns_cookie,
            client: self.remote,
            server: self.local,
            client_port: self.remote_port,
            server_port: self.local_port,
            padding: 0,
        }
    }
}

/// Destination of a connect call.
pub enum Target {
    V4(u32),
    V6Loopback,
    V6,
}

#[inline(always)]
pub fn target4(addr: *mut bpf_sock_addr) -> Target {
    // SAFETY: single volatile read of a context field.
    Target::V4(unsafe { ptr::read_volatile(&raw const (*addr).user_ip4) })
}

#[inline(always)]
pub fn target6(addr: *mut bpf_sock_addr) -> Target {
    // SAFETY: single volatile reads of context fields.
    let [a, b, c, d] = unsafe {
        [
            ptr::read_volatile(&raw const (*addr).user_ip6[0]),
            ptr::read_volatile(&raw const (*addr).user_ip6[1]),
            ptr::read_volatile(&raw const (*addr).user_ip6[2]),
            ptr::read_volatile(&raw const (*addr).user_ip6[3]),
        ]
    };
    if a | b == 0 && c == u32::to_be(0xffff) {
        return Target::V4(d);
    }
    // The unspecified address connects to loopback.
    if a | b | c == 0 && (d == u32::to_be(1) || d == 0) {
        return Target::V6Loopback;
    }
    Target::V6
}

#[inline(always)]
pub fn target_port(addr: *mut bpf_sock_addr) -> u16 {
    // SAFETY: single volatile read of a context field.
    u16::from_be(unsafe { ptr::read_volatile(&raw const (*addr).user_port) } as u16)
}

/// 127.0.0.0/8, and 0.0.0.0, which connects to it.
#[inline(always)]
pub fn is_loopback(ip4: u32) -> bool {
    let [first, ..] = ip4.to_ne_bytes();
    first == 127 || ip4 == 0
}
