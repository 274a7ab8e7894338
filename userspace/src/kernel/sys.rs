//! System calls that no library of ours offers. The only unsafe code of the agent outside its generated parts.
#![allow(unsafe_code, reason = "raw system calls, each wrapped safely here")]

use std::{
    ffi::CString,
    io,
    mem::{size_of, zeroed},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;

const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_UPDATE: libc::c_long = 29;
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
const SO_NETNS_COOKIE: libc::c_int = 71;
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// Opens a pinned eBPF object.
pub fn object_get(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        path: u64,
        fd: u32,
        flags: u32,
        path_fd: i32,
        padding: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = Attributes {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
        path_fd: 0,
        padding: 0,
    };
    let fd = bpf(BPF_OBJ_GET, &attributes)?;
    // SAFETY: the kernel returned a descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Replaces the program of an attached link; connections see the old one or the new one, never none.
pub fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        link: u32,
        program: u32,
        flags: u32,
        old_program: u32,
    }
    let attributes = Attributes {
        link: link.as_fd().as_raw_fd() as u32,
        program: program.as_fd().as_raw_fd() as u32,
        flags: 0,
        old_program: 0,
    };
    bpf(BPF_LINK_UPDATE, &attributes).map(drop)
}

/// What a link is attached to: a cgroup's id, or a namespace's inode.
pub fn link_target(link: impl AsFd) -> io::Result<u64> {
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        padding: u32,
        target: u64,
        rest: [u64; 16],
    }
    #[repr(C)]
    struct Attributes {
        fd: u32,
        length: u32,
        info: u64,
    }
    const NETNS_LINK: u32 = 5;
    let mut info = Info::default();
    let attributes = Attributes {
        fd: link.as_fd().as_raw_fd() as u32,
        length: size_of::<Info>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &attributes)?;
    // A namespace link reports a 32-bit inode followed by the attach type.
    Ok(if info.kind == NETNS_LINK {
        info.target & 0xffff_ffff
    } else {
        info.target
    })
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: `attributes` is a live, fully initialised structure of the size that is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

/// Waits until every eBPF program that is running now has left (an RCU grace period).
pub fn wait_for_running_programs() -> io::Result<()> {
    // SAFETY: no pointers are passed.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The kernel's name for the namespace of a socket; never reused while the machine runs.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: eight writable bytes and their length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(cookie)
    }
}

/// Whether a descriptor names a network namespace.
pub fn is_network_namespace(fd: impl AsFd) -> bool {
    // SAFETY: this ioctl takes no argument.
    let kind = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), NS_GET_NSTYPE) };
    kind == libc::CLONE_NEWNET
}

/// Moves this thread into a network namespace.
pub fn enter_network_namespace(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    let result = unsafe { libc::setns(fd.as_fd().as_raw_fd(), libc::CLONE_NEWNET) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The clock that the eBPF programs read.
pub fn monotonic_now() -> Duration {
    // SAFETY: a zeroed timespec is a valid one.
    let mut now: libc::timespec = unsafe { zeroed() };
    // SAFETY: a writable timespec; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// A map layout read from bytes that the kernel wrote; `None` when there are too few.
pub fn read_plain<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: there are enough bytes, and every bit pattern is a valid `Pod`.
    (bytes.len() >= size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// A ring buffer that a runtime can wait for.
pub fn watch_ring(ring: RingBuf<MapData>) -> io::Result<AsyncFd<RingBuf<MapData>>> {
    // SAFETY: a ring buffer holds one descriptor from its creation to its end.
    unsafe { AsyncFd::register(ring) }.map_err(io::Error::from)
}
