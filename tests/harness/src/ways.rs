//! Ways to a connection that std does not offer: a socket of another process, and io_uring. Called by `culvert-probe`.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use socket2::SockAddr;

use crate::sys;

/// Waits for somebody at a path in the file system, and gives him a socket.
pub fn hand_over(listener: &UnixListener, socket: impl AsFd) -> io::Result<()> {
    let (taker, _) = listener.accept()?;
    let sockets = [socket.as_fd().as_raw_fd()];
    let message = [ControlMessage::ScmRights(&sockets)];
    // A message needs a byte to ride on.
    let bytes = [IoSlice::new(b"s")];
    sendmsg::<UnixAddr>(taker.as_raw_fd(), &bytes, &message, MsgFlags::empty(), None)?;
    Ok(())
}

/// Takes the socket that somebody offers at a path.
pub fn take_over(path: &Path) -> io::Result<OwnedFd> {
    let giver = UnixStream::connect(path)?;
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let message = recvmsg::<UnixAddr>(
        giver.as_raw_fd(),
        &mut bytes,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let socket = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(sockets) => sockets.first().copied(),
        _ => None,
    });
    socket
        .map(sys::own_received)
        .ok_or_else(|| io::Error::other("no socket was handed over"))
}

/// Connects a socket by io_uring.
pub fn connect_by_ring(socket: impl AsFd, address: &SockAddr) -> io::Result<()> {
    sys::connect_by_ring(socket.as_fd(), address)
}
