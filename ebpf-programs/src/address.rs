//! Reading addresses and ports out of contexts, whose fields the verifier only lets us read whole and one by one.

use core::ptr;

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr, bpf_sock_ops};
use culvert_abi::{Address, FlowKey, mapped};

pub const AF_INET: u32 = 2;
pub const AF_INET6: u32 = 10;

/// The words of an address, in network order.
type Words = [u32; 4];

const MAPPED_PREFIX: u32 = u32::to_be(0xffff);

#[inline(always)]
pub fn from_words(words: Words) -> Address {
    let mut address = [0; 16];
    let [a, b, c, d] = words;
    // SAFETY: sixteen bytes are written; the array may be less aligned than a word.
    unsafe {
        let to = address.as_mut_ptr().cast::<u32>();
        to.write_unaligned(a);
        to.add(1).write_unaligned(b);
        to.add(2).write_unaligned(c);
        to.add(3).write_unaligned(d);
    }
    address
}

#[inline(always)]
pub fn words(address: &Address) -> Words {
    let from = address.as_ptr().cast::<u32>();
    // SAFETY: sixteen bytes are read.
    unsafe {
        [
            from.read_unaligned(),
            from.add(1).read_unaligned(),
            from.add(2).read_unaligned(),
            from.add(3).read_unaligned(),
        ]
    }
}

/// Whether an address is an IPv4 one.
#[inline(always)]
pub fn is_mapped(address: &Address) -> bool {
    let [a, b, c, _] = words(address);
    a | b == 0 && c == MAPPED_PREFIX
}

/// Loopback, and the unspecified addresses, which connect to it.
#[inline(always)]
pub fn is_loopback(address: &Address) -> bool {
    let [a, b, c, d] = words(address);
    if a | b == 0 && c == MAPPED_PREFIX {
        let [first, ..] = d.to_ne_bytes();
        return first == 127 || d == 0;
    }
    a | b | c == 0 && (d == u32::to_be(1) || d == 0)
}

/// Both ends of a socket as a sockops program sees them.
pub struct Ends {
    pub local: Address,
    pub remote: Address,
    pub local_port: u16,
    pub remote_port: u16,
}

impl Ends {
    /// `None` for what is neither IPv4 nor IPv6.
    #[inline(always)]
    pub fn of(ops: *mut bpf_sock_ops) -> Option<Self> {
        // SAFETY: single volatile reads of context fields.
        unsafe {
            let family = ptr::read_volatile(&raw const (*ops).family);
            let remote6 = || {
                [
                    ptr::read_volatile(&raw const (*ops).remote_ip6[0]),
                    ptr::read_volatile(&raw const (*ops).remote_ip6[1]),
                    ptr::read_volatile(&raw const (*ops).remote_ip6[2]),
                    ptr::read_volatile(&raw const (*ops).remote_ip6[3]),
                ]
            };
            let (local, remote) = if family == AF_INET {
                ends4(ops)
            } else if family == AF_INET6 {
                let remote = from_words(remote6());
                if is_mapped(&remote) {
                    ends4(ops)
                } else {
                    let local = [
                        ptr::read_volatile(&raw const (*ops).local_ip6[0]),
                        ptr::read_volatile(&raw const (*ops).local_ip6[1]),
                        ptr::read_volatile(&raw const (*ops).local_ip6[2]),
                        ptr::read_volatile(&raw const (*ops).local_ip6[3]),
                    ];
                    (from_words(local), remote)
                }
            } else {
                return None;
            };
            Some(Self {
                local,
                remote,
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

/// # Safety
/// `ops` must be the context of this program.
#[inline(always)]
unsafe fn ends4(ops: *mut bpf_sock_ops) -> (Address, Address) {
    // SAFETY: single volatile reads of context fields.
    unsafe {
        (
            mapped(ptr::read_volatile(&raw const (*ops).local_ip4)),
            mapped(ptr::read_volatile(&raw const (*ops).remote_ip4)),
        )
    }
}

/// Destination of a connect call on an IPv4 socket.
#[inline(always)]
pub fn target4(addr: *mut bpf_sock_addr) -> Address {
    // SAFETY: single volatile read of a context field.
    mapped(unsafe { ptr::read_volatile(&raw const (*addr).user_ip4) })
}

/// Destination of a connect call on an IPv6 socket, which may be an IPv4 address.
#[inline(always)]
pub fn target6(addr: *mut bpf_sock_addr) -> Address {
    // SAFETY: single volatile reads of context fields.
    from_words(unsafe {
        [
            ptr::read_volatile(&raw const (*addr).user_ip6[0]),
            ptr::read_volatile(&raw const (*addr).user_ip6[1]),
            ptr::read_volatile(&raw const (*addr).user_ip6[2]),
            ptr::read_volatile(&raw const (*addr).user_ip6[3]),
        ]
    })
}

#[inline(always)]
pub fn target_port(addr: *mut bpf_sock_addr) -> u16 {
    // SAFETY: single volatile read of a context field.
    u16::from_be(unsafe { ptr::read_volatile(&raw const (*addr).user_port) } as u16)
}

/// Which kind of socket a hook is called for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// Puts another address and port in the place of those that the application named or is to be shown.
#[inline(always)]
pub fn rewrite(addr: *mut bpf_sock_addr, family: Family, address: &Address, port: u16) {
    let [a, b, c, d] = words(address);
    // SAFETY: single volatile writes of context fields.
    unsafe {
        match family {
            Family::V4 => ptr::write_volatile(&raw mut (*addr).user_ip4, d),
            Family::V6 => {
                ptr::write_volatile(&raw mut (*addr).user_ip6[0], a);
                ptr::write_volatile(&raw mut (*addr).user_ip6[1], b);
                ptr::write_volatile(&raw mut (*addr).user_ip6[2], c);
                ptr::write_volatile(&raw mut (*addr).user_ip6[3], d);
            }
        }
        ptr::write_volatile(&raw mut (*addr).user_port, u32::from(port.to_be()));
    }
}

/// The address that a socket is bound to, if it is bound to one.
#[inline(always)]
pub fn bound_address(sk: *mut bpf_sock, family: Family) -> Option<Address> {
    // SAFETY: `sk` is the context's socket, not null; single volatile reads of fields of `struct bpf_sock`.
    let address = unsafe {
        match family {
            Family::V4 => mapped(ptr::read_volatile(&raw const (*sk).src_ip4)),
            Family::V6 => from_words([
                ptr::read_volatile(&raw const (*sk).src_ip6[0]),
                ptr::read_volatile(&raw const (*sk).src_ip6[1]),
                ptr::read_volatile(&raw const (*sk).src_ip6[2]),
                ptr::read_volatile(&raw const (*sk).src_ip6[3]),
            ]),
        }
    };
    let [a, b, c, d] = words(&address);
    let unbound = a | b | d == 0 && (c == 0 || c == MAPPED_PREFIX);
    (!unbound).then_some(address)
}
