//! Receiving a message together with the descriptors that came with it. None of them is ever lost: not when there are more than was
//! expected, nor when the kernel had no room for all. Called by `enrol::zds`.

use std::{
    io,
    mem::{size_of, zeroed},
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    ptr,
};

/// As many as the kernel lets anybody send with one message (`SCM_MAX_FD`).
const MOST_DESCRIPTORS: usize = 253;
/// Room for one control message with all of these, in units that are aligned as its header must be.
const CONTROL: usize = MOST_DESCRIPTORS * size_of::<RawFd>() / size_of::<u64>() + 8;

/// What [`receive`] got.
#[derive(Debug)]
pub struct Received {
    /// Bytes in the buffer.
    pub length: usize,
    pub descriptors: Vec<OwnedFd>,
    /// The message was longer than the buffer.
    pub cut: bool,
    /// Not all of the descriptors got here.
    pub control_cut: bool,
}

/// Receives one message. Descriptors are close-on-exec from the beginning.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = [0_u64; CONTROL];
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a structure of numbers and pointers, for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message names one live buffer for data and one for control data, each with its size.
    let length = unsafe {
        libc::recvmsg(
            socket.as_fd().as_raw_fd(),
            &raw mut message,
            libc::MSG_CMSG_CLOEXEC,
        )
    };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    Ok(Received {
        length,
        descriptors: descriptors(&message),
        cut: message.msg_flags & libc::MSG_TRUNC != 0,
        control_cut: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Takes the descriptors out of the control data of a message that `recvmsg` has just filled.
fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    // SAFETY: the kernel has filled the control data and set its length; these walk it, and end where it ends.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: not null, so that a whole header is there; read without asking for its alignment.
        let read = unsafe { ptr::read_unaligned(header) };
        if read.cmsg_level == libc::SOL_SOCKET && read.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: arithmetic only.
            let own = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (read.cmsg_len as usize).saturating_sub(own) / size_of::<RawFd>();
            // SAFETY: what follows the header is `count` numbers of descriptors.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(header) }.cast();
            for index in 0..count {
                // SAFETY: within the control message; the kernel has made the descriptor for us, and nobody else knows of it.
                found.push(unsafe { OwnedFd::from_raw_fd(ptr::read_unaligned(data.add(index))) });
            }
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    found
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{IoSlice, Write as _},
        os::unix::net::UnixStream,
    };

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::*;

    fn send(socket: &UnixStream, files: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(files)];
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(b"hello")],
            &rights,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }

    #[test]
    fn every_descriptor_that_came_is_owned() {
        let (here, there) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        for count in [1, 2, MOST_DESCRIPTORS] {
            send(&there, &vec![file.as_raw_fd(); count]);
            let received = receive(&here, &mut [0; 16]).unwrap();
            assert_eq!(received.descriptors.len(), count);
            assert!(!received.cut && !received.control_cut);
            assert_eq!(received.length, 5);
        }
    }

    #[test]
    fn a_message_may_bring_none() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(b"hello").unwrap();
        let received = receive(&here, &mut [0; 16]).unwrap();
        assert!(received.descriptors.is_empty());
    }
}
