//! `getpeername`: an application that connected to a service is told the service's address, as it would be without us.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use culvert_abi::role;

use crate::{
    address::{Family, rewrite},
    maps::SOCKETS,
};

#[cgroup_sock_addr(getpeername4)]
pub fn peer_name4(ctx: SockAddrContext) -> i32 {
    show(&ctx, Family::V4)
}

#[cgroup_sock_addr(getpeername6)]
pub fn peer_name6(ctx: SockAddrContext) -> i32 {
    show(&ctx, Family::V6)
}

#[inline(always)]
fn show(ctx: &SockAddrContext, family: Family) -> i32 {
    let addr = ctx.sock_addr;
    // SAFETY: read of a context field that the verifier types as a socket.
    let sk = unsafe { (*addr).__bindgen_anon_1.sk };
    if let Some(state) = SOCKETS.find(sk.cast())
        && state.role == role::DIRECT
        && state.service_port != 0
    {
        rewrite(addr, family, &state.service_address, state.service_port);
    }
    1
}
