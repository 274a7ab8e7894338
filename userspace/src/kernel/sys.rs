//! System calls that no library of ours offers. The only unsafe code of the agent outside its generated parts.
#![allow(unsafe_code, reason = "raw system calls, each wrapped safely here")]

pub mod message;
pub mod tracepoint;

use std::{
    ffi::CString,
    io,
    mem::{size_of, zeroed},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use aya::maps::{IterableMap, MapData, RingBuf};
use tokio::io::unix::AsyncFd;

/// Gives memory that was freed back to the kernel: the allocator keeps it otherwise, after a large mesh was read.
pub fn give_back_memory() {
    // SAFETY: without conditions; other threads may allocate meanwhile.
    unsafe { libc::malloc_trim(0) };
}

/// From which size on, in bytes, what is freed goes back to the kernel at once.
const LARGE: libc::c_int = 256 << 10;

/// Has the allocator give back large blocks as they are freed. Left alone it keeps blocks as large as the largest that it has seen, and
/// those of tables and of the kernel's types are some MiB, for each thread that ever held one. To be called once, at the start.
pub fn keep_no_large_blocks() {
    // SAFETY: without conditions. What it does not take stays as it was.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}

const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_LOOKUP_AND_DELETE_BATCH: libc::c_long = 25;
const BPF_MAP_DELETE_BATCH: libc::c_long = 27;
const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
const SO_NETNS_COOKIE: libc::c_int = 71;
/// Longer chains are not read: a hash map of ours never has them, even if somebody chose the keys.
const MOST_IN_BUCKET: u32 = 1 << 20;
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

/// Pins a link.
pub fn object_pin(link: impl AsFd, path: &Path) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = Attributes {
        path: path.as_ptr() as u64,
        fd: link.as_fd().as_raw_fd() as u32,
        flags: 0,
    };
    bpf(BPF_OBJ_PIN, &attributes).map(drop)
}

fn link_create(program: impl AsFd, target: u32, kind: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        kind: u32,
        flags: u32,
        rest: [u64; 2],
    }
    let attributes = Attributes {
        program: program.as_fd().as_raw_fd() as u32,
        target,
        kind,
        flags: 0,
        rest: [0; 2],
    };
    let fd = bpf(BPF_LINK_CREATE, &attributes)?;
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

/// Detaches a link now, and not when the kernel gets around to releasing it.
pub fn link_detach(link: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        link: u32,
    }
    let attributes = Attributes {
        link: link.as_fd().as_raw_fd() as u32,
    };
    bpf(BPF_LINK_DETACH, &attributes).map(drop)
}

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LinkInfo {
    /// `enum bpf_link_type` of the kernel's linux/bpf.h.
    pub kind: u32,
    pub id: u32,
    pub program: u32,
    padding: u32,
    /// A cgroup's id, or a namespace's inode; 0 once that has gone.
    pub target: u64,
    rest: [u64; 16],
}

impl LinkInfo {
    pub const CGROUP: u32 = 3;
    pub const NETNS: u32 = 5;
}

pub fn link_info(link: impl AsFd) -> io::Result<LinkInfo> {
    #[repr(C)]
    struct Attributes {
        fd: u32,
        length: u32,
        info: u64,
    }
    let mut info = LinkInfo::default();
    let attributes = Attributes {
        fd: link.as_fd().as_raw_fd() as u32,
        length: size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &attributes)?;
    if info.kind == LinkInfo::NETNS {
        // A namespace link reports a 32-bit inode followed by the attach type.
        info.target &= 0xffff_ffff;
    }
    Ok(info)
}

/// Kinds of eBPF objects that have ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objects {
    Programs = 11,
    Links = 31,
}

/// The smallest id above `id` that is in use. Takes no reference: asking does not keep an object alive.
pub fn next_id(objects: Objects, id: u32) -> io::Result<Option<u32>> {
    #[repr(C)]
    struct Attributes {
        start: u32,
        next: u32,
        flags: u32,
    }
    let mut attributes = Attributes {
        start: id,
        next: 0,
        flags: 0,
    };
    match bpf_answering(objects as libc::c_long, &mut attributes) {
        Ok(_) => Ok(Some(attributes.next)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a link by its id.
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(BPF_LINK_GET_FD_BY_ID, id)
}

/// Opens a program by its id.
pub fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(BPF_PROG_GET_FD_BY_ID, id)
}

fn by_id(command: libc::c_long, id: u32) -> io::Result<OwnedFd> {
    let fd = bpf(command, &[id, 0, 0])?;
    // SAFETY: the kernel returned a descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Runs a classifier once with `packet`, which it may change; returns what the program returned.
pub fn program_run<T: aya::Pod>(program: impl AsFd, packet: &mut T) -> io::Result<u32> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        returned: u32,
        size_in: u32,
        size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        context_size_in: u32,
        context_size_out: u32,
        context_in: u64,
        context_out: u64,
        flags: u32,
        cpu: u32,
        batch: u32,
        padding: u32,
    }
    let place = std::ptr::from_mut(packet) as u64;
    let size = size_of::<T>() as u32;
    let mut attributes = Attributes {
        program: program.as_fd().as_raw_fd() as u32,
        returned: 0,
        size_in: size,
        size_out: size,
        data_in: place,
        data_out: place,
        repeat: 1,
        duration: 0,
        context_size_in: 0,
        context_size_out: 0,
        context_in: 0,
        context_out: 0,
        flags: 0,
        cpu: 0,
        batch: 0,
        padding: 0,
    };
    bpf_answering(BPF_PROG_TEST_RUN, &mut attributes)?;
    Ok(attributes.returned)
}

/// The programs that are attached to a cgroup itself at one hook, and how: flags of `BPF_PROG_ATTACH`.
pub fn cgroup_programs(cgroup: impl AsFd, hook: u32) -> io::Result<(u32, Vec<u32>)> {
    /// As many as the kernel lets be attached at one hook of a cgroup.
    const MOST: usize = 64;
    #[repr(C)]
    struct Attributes {
        target: u32,
        hook: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        padding: u32,
        rest: [u64; 4],
    }
    let mut programs = [0u32; MOST];
    let mut attributes = Attributes {
        target: cgroup.as_fd().as_raw_fd() as u32,
        hook,
        query_flags: 0,
        attach_flags: 0,
        programs: (&raw mut programs) as u64,
        count: MOST as u32,
        padding: 0,
        rest: [0; 4],
    };
    bpf_answering(BPF_PROG_QUERY, &mut attributes)?;
    let found = programs.into_iter().take(attributes.count as usize);
    Ok((attributes.attach_flags, found.collect()))
}

/// The path of the cgroup with this id, below the mount that `mount` is a directory of.
pub fn cgroup_path(mount: impl AsFd, id: u64) -> io::Result<PathBuf> {
    /// `struct file_handle` with the eight bytes of a kernfs handle.
    #[repr(C)]
    struct Handle {
        length: u32,
        kind: i32,
        id: u64,
    }
    const FILEID_KERNFS: i32 = 0xfe;
    let mut handle = Handle {
        length: 8,
        kind: FILEID_KERNFS,
        id,
    };
    // SAFETY: a live handle whose length says how much follows its header.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_fd().as_raw_fd(),
            &raw mut handle,
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned a descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// What becomes of the entries that [`map_batch`] reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchReads {
    Copies,
    /// They are removed from the map.
    Takes,
}

/// How far a walk through a hash map has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BatchCursor {
    #[default]
    Start,
    /// The next bucket, as the kernel numbers them.
    At(u32),
    End,
}

/// Reads the next entries of a hash map, about `most`, into `entries`. The kernel goes bucket by bucket, each under its lock:
/// whatever is entered or removed meanwhile, an entry that is there all the time is read exactly once.
///
/// The sizes of `K` and `V` must be those of the map, which aya's typed maps have checked; others are refused.
pub fn map_batch<K: aya::Pod, V: aya::Pod>(
    map: &aya::maps::HashMap<MapData, K, V>,
    reads: BatchReads,
    cursor: &mut BatchCursor,
    most: u32,
    entries: &mut Vec<(K, V)>,
) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        before: u64,
        after: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }
    let mut before = match *cursor {
        BatchCursor::Start => None,
        BatchCursor::At(bucket) => Some(bucket),
        BatchCursor::End => return Ok(()),
    };
    let data = IterableMap::<K, V>::map(map);
    let mut room = most.max(1);
    loop {
        let (mut keys, mut values) = (
            Vec::<K>::with_capacity(room as usize),
            Vec::<V>::with_capacity(room as usize),
        );
        let mut after = 0u32;
        let mut attributes = Attributes {
            before: before
                .as_mut()
                .map_or(0, |bucket| std::ptr::from_mut(bucket) as u64),
            after: (&raw mut after) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: room,
            map: data.fd().as_fd().as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        };
        let command = match reads {
            BatchReads::Copies => BPF_MAP_LOOKUP_BATCH,
            BatchReads::Takes => BPF_MAP_LOOKUP_AND_DELETE_BATCH,
        };
        let ended = match bpf_answering(command, &mut attributes) {
            Ok(_) => false,
            Err(error) => match error.raw_os_error() {
                // The last buckets: there may be entries all the same.
                Some(libc::ENOENT) => true,
                // A single bucket holds more: the kernel has read nothing.
                Some(libc::ENOSPC) if room < MOST_IN_BUCKET => {
                    room = room.saturating_mul(4);
                    continue;
                }
                _ => return Err(error),
            },
        };
        let read = attributes.count.min(room) as usize;
        // SAFETY: the kernel has written so many of each, of the sizes that aya checked when it typed the map, and there is
        // room for `room`; every bit pattern is a valid `Pod`.
        unsafe {
            keys.set_len(read);
            values.set_len(read);
        }
        entries.extend(keys.into_iter().zip(values));
        *cursor = if ended {
            BatchCursor::End
        } else {
            BatchCursor::At(after)
        };
        return Ok(());
    }
}

/// Deletes entries of a hash map. Keys that are not there, any more, are passed over.
///
/// The size of `K` must be that of the map's keys, which aya's typed maps have checked.
pub fn map_delete_batch<K: aya::Pod, V: aya::Pod>(
    map: &aya::maps::HashMap<MapData, K, V>,
    keys: &[K],
) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        before: u64,
        after: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }
    let data = IterableMap::<K, V>::map(map);
    let mut rest = keys;
    while !rest.is_empty() {
        let mut attributes = Attributes {
            before: 0,
            after: 0,
            keys: rest.as_ptr() as u64,
            values: 0,
            count: u32::try_from(rest.len()).unwrap_or(u32::MAX),
            map: data.fd().as_fd().as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        };
        match bpf_answering(BPF_MAP_DELETE_BATCH, &mut attributes) {
            Ok(_) => return Ok(()),
            // The kernel stops at a key that is not there, and says how many came before it.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                let passed = (attributes.count as usize).saturating_add(1);
                rest = rest.get(passed..).unwrap_or_default();
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// For commands that answer in their attributes.
fn bpf_answering<T>(command: libc::c_long, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` is a live, fully initialised structure of the size that is passed, and may be written.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
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

/// Bytes of the kernel's memory that a socket's unread data takes.
pub fn receive_memory(socket: impl AsFd) -> io::Result<u32> {
    const SO_MEMINFO: libc::c_int = 55;
    const VARIABLES: usize = 9;
    let mut memory = [0_u32; VARIABLES];
    let mut length = size_of_val(&memory) as libc::socklen_t;
    // SAFETY: writable bytes and their length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            memory.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let [unread, ..] = memory;
    Ok(unread)
}

/// Sets an option of SOL_SOCKET whose value is a number.
pub fn set_socket_option(socket: impl AsFd, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: four readable bytes and their number.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Ends a connected TCP socket with a reset. Closing it does the same where it lingers for no time, and takes longer.
pub fn disconnect(socket: impl AsFd) -> io::Result<()> {
    // SAFETY: an address without a family is all zeros.
    let nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    // SAFETY: an address and its length.
    let result = unsafe {
        libc::connect(
            socket.as_fd().as_raw_fd(),
            &raw const nowhere,
            size_of_val(&nowhere) as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// How many bytes FIONREAD says are unread.
pub fn available(socket: impl AsFd) -> io::Result<i32> {
    let mut count = 0;
    // SAFETY: this ioctl writes an int.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(count)
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
