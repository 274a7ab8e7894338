//! The socket: connecting, one message in, one out. Messages keep their bounds (SOCK_SEQPACKET).

use std::{
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixDatagram as StdSocket,
    },
    path::Path,
};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, send, socket,
    sockopt::PeerCredentials,
};
use tokio::{io::Interest, net::UnixDatagram};

use super::{ZdsError, protocol::MOST_BYTES};
use crate::kernel::{Received, receive_message};

/// A connection to istio-cni. The runtime has no type for this kind of socket; that of another kind that keeps the bounds of messages
/// waits for it as well.
#[derive(Debug)]
pub struct Connection(UnixDatagram);

/// A message as it came.
#[derive(Debug)]
pub struct Packet {
    pub bytes: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

impl Connection {
    /// Connects, to a server of root's only: it says whose identity a pod has. `any_user` is for a test.
    pub fn open(path: &Path, any_user: bool) -> Result<Self, ZdsError> {
        let failed = |source: io::Error| ZdsError::Connect {
            path: path.to_owned(),
            source,
        };
        let socket = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            // A listener whose queue is full makes nobody wait here.
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .map_err(|error| failed(error.into()))?;
        UnixAddr::new(path)
            .and_then(|address| connect(socket.as_raw_fd(), &address))
            .map_err(|error| failed(error.into()))?;
        let peer = getsockopt(&socket, PeerCredentials).map_err(|error| failed(error.into()))?;
        if peer.uid() != 0 && !any_user {
            return Err(ZdsError::NotRoot {
                path: path.to_owned(),
                uid: peer.uid(),
            });
        }
        let socket = UnixDatagram::from_std(StdSocket::from(socket));
        Ok(Self(socket.map_err(failed)?))
    }

    /// Sends a message whole.
    pub async fn send(&self, message: &[u8]) -> Result<(), ZdsError> {
        let sent = self.0.async_io(Interest::WRITABLE, || {
            let flags = MsgFlags::MSG_NOSIGNAL;
            send(self.0.as_raw_fd(), message, flags).map_err(io::Error::from)
        });
        Ok(sent.await.map(drop)?)
    }

    /// The next message. The outer error ends the connection, the inner is the message's own: its descriptors are closed by then.
    pub async fn receive(&self) -> Result<Result<Packet, ZdsError>, ZdsError> {
        let mut bytes = vec![0; MOST_BYTES];
        let Received {
            length,
            descriptors,
            cut,
            control_cut,
        } = self
            .0
            .async_io(Interest::READABLE, || receive_message(&self.0, &mut bytes))
            .await?;
        if length == 0 && descriptors.is_empty() {
            return Err(ZdsError::Closed);
        }
        if cut {
            return Ok(Err(ZdsError::TooLong(MOST_BYTES)));
        }
        if control_cut {
            return Ok(Err(ZdsError::DescriptorsLost));
        }
        bytes.truncate(length);
        Ok(Ok(Packet { bytes, descriptors }))
    }
}
