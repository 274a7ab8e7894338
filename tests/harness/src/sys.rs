//! The harness's unsafe code, but for `ring`'s: what neither std, nix nor socket2 offers as a safe call.
//! Called by `process`, `packet`, `netns`, `ways`, `receiving`, `stalled` and `foreign`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use io_uring::{IoUring, opcode, types};
use nix::sched::{CloneFlags, setns};
use socket2::SockAddr;

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

/// SO_RCVLOWAT.
pub(crate) fn set_low_water(fd: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    // SAFETY: pointer and length describe a live i32, which the kernel reads.
    checked(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast::<libc::c_void>(),
            length_of::<i32>(),
        )
    })?;
    Ok(())
}

/// The first two figures of SO_MEMINFO (the kernel's linux/sock_diag.h): memory of what is unread, and its limit.
pub(crate) fn receive_memory(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let mut figures = [0u32; 2];
    let mut length = length_of::<[u32; 2]>();
    let pointer = (&raw mut figures).cast::<libc::c_void>();
    // SAFETY: pointer and length describe two live integers, which the kernel fills.
    checked(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            pointer,
            &raw mut length,
        )
    })?;
    let [used, most] = figures;
    Ok((used, most))
}

/// Makes this thread another user's, for good. The library's own call would do it to all threads.
pub(crate) fn become_user(user: u32) -> io::Result<()> {
    // SAFETY: plain system call without pointers.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) };
    checked(result as libc::c_int).map(drop)
}

/// From now on nothing but what is as urgent runs where this thread does: SCHED_FIFO. Others get a little of the processor after a second.
pub(crate) fn become_urgent() -> io::Result<()> {
    let urgency = libc::sched_param { sched_priority: 1 };
    // SAFETY: the pointer is to a live sched_param, which the kernel reads.
    checked(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const urgency) }).map(drop)
}

/// Takes a descriptor that the kernel has just put into this process for us.
pub(crate) fn own_received(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller has it from a message, so that nobody else in this process knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Has an io_uring connect a socket, and waits for the outcome.
pub(crate) fn connect_by_ring(fd: BorrowedFd<'_>, address: &SockAddr) -> io::Result<()> {
    let mut ring = IoUring::new(2)?;
    let connect = opcode::Connect::new(
        types::Fd(fd.as_raw_fd()),
        address.as_ptr().cast(),
        address.len(),
    )
    .build();
    // SAFETY: address and descriptor outlive the operation: its end is waited for below.
    unsafe { ring.submission().push(&connect) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let done = ring.completion().next();
    let done = done.ok_or_else(|| io::Error::other("io_uring ended a wait without an outcome"))?;
    match done.result() {
        0.. => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Kinds of eBPF programs, with the hook they are made for (the kernel's linux/bpf.h).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProgramKind {
    pub kind: u32,
    pub hook: u32,
}

/// Loads a program that returns 1 and does nothing else.
pub(crate) fn load_idle_program(kind: ProgramKind, name: &str) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        device: u32,
        hook: u32,
    }
    // mov r0, 1; exit
    let instructions: [u64; 2] = [0x1_0000_00b7, 0x95];
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    let attributes = Attributes {
        kind: kind.kind,
        count: 2,
        instructions: (&raw const instructions) as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: bytes,
        device: 0,
        hook: kind.hook,
    };
    const BPF_PROG_LOAD: libc::c_long = 5;
    let fd = bpf(BPF_PROG_LOAD, &attributes)?;
    // SAFETY: the descriptor was just returned to us and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a program to a cgroup for itself alone: without `BPF_F_ALLOW_MULTI`.
pub(crate) fn attach_alone(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: u32,
) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_long = 8;
    bpf(
        BPF_PROG_ATTACH,
        &[
            cgroup.as_raw_fd() as u32,
            program.as_raw_fd() as u32,
            hook,
            0,
        ],
    )
    .map(drop)
}

/// Undoes [`attach_alone`].
pub(crate) fn detach(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, hook: u32) -> io::Result<()> {
    const BPF_PROG_DETACH: libc::c_long = 9;
    bpf(
        BPF_PROG_DETACH,
        &[
            cgroup.as_raw_fd() as u32,
            program.as_raw_fd() as u32,
            hook,
            0,
        ],
    )
    .map(drop)
}

/// Attaches a program to a namespace or cgroup for as long as the link is open.
pub(crate) fn link(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    hook: u32,
) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: libc::c_long = 28;
    let fd = bpf(
        BPF_LINK_CREATE,
        &[
            program.as_raw_fd() as u32,
            target.as_raw_fd() as u32,
            hook,
            0,
        ],
    )?;
    // SAFETY: the descriptor was just returned to us and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    // SAFETY: `attributes` is live, initialised, of the size that is passed, and what it points to outlives the call.
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

/// A page of this process's memory that is not there: whoever reads it waits until [`AbsentPage::release`].
pub(crate) struct AbsentPage {
    address: usize,
    /// Answers for what is missing, which it never does.
    faults: std::sync::Mutex<Option<OwnedFd>>,
}

const PAGE: usize = 4096;

impl AbsentPage {
    pub(crate) fn new() -> io::Result<Self> {
        /// Requests of linux/userfaultfd.h.
        const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
        const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
        const UFFD_API: u64 = 0xaa;
        const MODE_MISSING: u64 = 1;
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        let fd = checked(fd as libc::c_int)?;
        // SAFETY: the descriptor was just returned to us and nobody else owns it.
        let faults = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a new mapping, which touches no memory that is in use.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut hello = [UFFD_API, 0, 0];
        // SAFETY: `struct uffdio_api` is three 64-bit integers.
        checked(unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_API, &raw mut hello) })?;
        let mut range = [page as u64, PAGE as u64, MODE_MISSING, 0];
        // SAFETY: `struct uffdio_register` is four 64-bit integers.
        checked(unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_REGISTER, &raw mut range) })?;
        Ok(Self {
            address: page as usize,
            faults: std::sync::Mutex::new(Some(faults)),
        })
    }

    /// Sends the page. The kernel reads it while it holds the socket.
    pub(crate) fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: the page is mapped for as long as the process lives; the kernel reads its size at most.
        let sent = unsafe {
            libc::send(
                socket.as_raw_fd(),
                self.address as *const libc::c_void,
                PAGE,
                libc::MSG_NOSIGNAL,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Returns once somebody waits for the page.
    pub(crate) fn wait_for_reader(&self) -> io::Result<()> {
        /// `struct uffd_msg`.
        const MESSAGE: usize = 32;
        let faults = self.faults.lock();
        let faults = faults.map_err(|_| io::Error::other("a thread panicked"))?;
        let Some(faults) = &*faults else {
            return Ok(());
        };
        nix::unistd::read(faults, &mut [0; MESSAGE])?;
        Ok(())
    }

    /// From now on the page is there.
    pub(crate) fn release(&self) {
        let faults = self.faults.lock();
        drop(faults.map(|mut faults| faults.take()));
    }
}
