//! Attaching a program to a tracepoint, also where nobody has mounted tracefs.

use std::{
    ffi::CStr,
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
};

const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;

/// Attaches a program to a tracepoint such as `syscalls/sys_enter_splice`, on every CPU, for as long as the link lives.
pub fn attach(name: &str, program: impl AsFd) -> io::Result<OwnedFd> {
    // `BPF_PERF_EVENT` of `enum bpf_attach_type`.
    const PERF_EVENT: u32 = 41;
    let event = open_event(number(name)?)?;
    // The link holds the event.
    super::link_create(program, event.as_raw_fd() as u32, PERF_EVENT)
}

/// A tracepoint's number, from a tracefs that is mounted nowhere but here.
fn number(name: &str) -> io::Result<u64> {
    let path = std::ffi::CString::new(format!("events/{name}/id"))?;
    let root = tracefs()?;
    // SAFETY: a live descriptor and a string that ends in a zero.
    let fd = unsafe {
        libc::openat(
            root.as_raw_fd(),
            path.as_ptr(),
            libc::O_RDONLY | libc::O_CLOEXEC,
        )
    };
    let mut text = String::new();
    File::from(owned(fd.into())?).read_to_string(&mut text)?;
    let number = text.trim().parse();
    number.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{name} has no number")))
}

fn tracefs() -> io::Result<OwnedFd> {
    const NAME: &CStr = c"tracefs";
    // SAFETY: the strings end in a zero, the other arguments are numbers.
    unsafe {
        let context = owned(libc::syscall(libc::SYS_fsopen, NAME.as_ptr(), 0))?;
        let made = libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            ptr::null::<u8>(),
            ptr::null::<u8>(),
            0,
        );
        if made < 0 {
            return Err(io::Error::last_os_error());
        }
        owned(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 0, 0))
    }
}

fn open_event(number: u64) -> io::Result<OwnedFd> {
    /// `struct perf_event_attr` as it was first: later kernels take it.
    #[derive(Default)]
    #[repr(C)]
    struct Attributes {
        kind: u32,
        size: u32,
        config: u64,
        sample_period: u64,
        sample_type: u64,
        read_format: u64,
        flags: u64,
        wakeup_events: u32,
        breakpoint: u32,
        breakpoint_address: u64,
    }
    const ANY_PROCESS: libc::pid_t = -1;
    let attributes = Attributes {
        kind: PERF_TYPE_TRACEPOINT,
        size: size_of::<Attributes>() as u32,
        config: number,
        sample_period: 1,
        ..Attributes::default()
    };
    // SAFETY: `attributes` is a live structure that says its size. The program runs wherever the tracepoint is met.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            ptr::from_ref(&attributes),
            ANY_PROCESS,
            0,
            -1,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    owned(fd)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel returned a descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
