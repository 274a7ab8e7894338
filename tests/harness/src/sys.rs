//! The harness's only unsafe code: what neither std, nix nor socket2 offers as a safe call.
//! Called by `process`, `packet` and `netns`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sched::{CloneFlags, setns};

/// `SO_NETNS_COOKIE`, which the libc crate does not name on every target.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Has the child join a cgroup (through its open `cgroup.procs`) and a network namespace before it runs its program.
pub(crate) fn join_before_exec(command: &mut Command, cgroup_procs: File, netns: File) {
    let join = move || {
        nix::unistd::write(&cgroup_procs, b"0")?;
        setns(&netns, CloneFlags::CLONE_NEWNET)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls on descriptors that were opened before the
    // fork; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(join) };
}

fn checked(outcome: libc::c_int) -> io::Result<libc::c_int> {
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(outcome)
    }
}

fn length_of<T>() -> libc::socklen_t {
    // Every T here is a kernel structure of a few dozen bytes.
    size_of::<T>() as libc::socklen_t
}

/// Opens a non-blocking packet socket that sees whole frames of every protocol on one interface.
pub(crate) fn packet_socket(ifindex: i32) -> io::Result<OwnedFd> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // Protocol 0: nothing is received before bind() names both interface and protocol.
    // SAFETY: plain system call without pointers.
    let fd = checked(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
    // SAFETY: the descriptor was just returned to us and nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: sockaddr_ll is made of integers, for which all zeroes is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = all;
    address.sll_ifindex = ifindex;
    let pointer = (&raw const address).cast::<libc::sockaddr>();
    // SAFETY: the pointer is to a live sockaddr_ll and the length is its size.
    checked(unsafe { libc::bind(fd.as_raw_fd(), pointer, length_of::<libc::sockaddr_ll>()) })?;
    Ok(fd)
}

/// Makes the interface deliver frames that are not addressed to it, for as long as the socket lives.
pub(crate) fn promiscuous(fd: BorrowedFd<'_>, ifindex: i32) -> io::Result<()> {
    let request = libc::packet_mreq {
        mr_ifindex: ifindex,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    let pointer = (&raw const request).cast::<libc::c_void>();
    let length = length_of::<libc::packet_mreq>();
    // SAFETY: the pointer is to a live packet_mreq and the length is its size.
    checked(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            pointer,
            length,
        )
    })?;
    Ok(())
}

/// Frames the kernel dropped on this packet socket since the last call, because it was not read fast enough.
pub(crate) fn packet_drops(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats {
        tp_packets: 0,
        tp_drops: 0,
    };
    let mut length = length_of::<libc::tpacket_stats>();
    let pointer = (&raw mut statistics).cast::<libc::c_void>();
    // SAFETY: pointer and length describe a live tpacket_stats, which the kernel fills.
    checked(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            pointer,
            &raw mut length,
        )
    })?;
    Ok(statistics.tp_drops)
}

/// The cookie of the network namespace a socket belongs to.
pub(crate) fn netns_cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = length_of::<u64>();
    let pointer = (&raw mut cookie).cast::<libc::c_void>();
    // SAFETY: pointer and length describe a live u64, which the kernel fills.
    checked(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            pointer,
            &raw mut length,
        )
    })?;
    Ok(cookie)
}
