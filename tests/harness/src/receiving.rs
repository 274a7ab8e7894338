//! What a socket has to be read, in ways that std does not offer. Called by `culvert-probe`.

use std::io;
use std::os::fd::AsFd;

use crate::sys;

/// Has a socket be readable from so many unread bytes on (SO_RCVLOWAT).
pub fn set_low_water(socket: impl AsFd, bytes: i32) -> io::Result<()> {
    sys::set_low_water(socket.as_fd(), bytes)
}

/// The memory of what is unread, and how much that may be (SO_MEMINFO), in bytes.
pub fn memory(socket: impl AsFd) -> io::Result<(u32, u32)> {
    sys::receive_memory(socket.as_fd())
}
