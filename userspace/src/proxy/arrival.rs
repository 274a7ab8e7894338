//! Where a connection given to the agent came from and was going to.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::TcpStream;

use crate::enrol::LocalPod;

/// The two ends of an accepted connection. Its local address is the original destination, because the kernel part hands
/// connections over without rewriting them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

impl Arrival {
    pub fn of(stream: &TcpStream) -> io::Result<Self> {
        let canonical =
            |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Ok(Self {
            source: canonical(stream.peer_addr()?),
            destination: canonical(stream.local_addr()?),
        })
    }
}

/// Whether an address and port are the pod's application's, not the agent's and not somebody else's.
pub(super) fn names_application(pod: &LocalPod, target: SocketAddr) -> bool {
    target.ip() == pod.ip && !culvert_abi::OWN_PORTS.contains(&target.port())
}

/// Whether an address is this pod's own.
pub(super) fn is_own(pod: &LocalPod, ip: IpAddr) -> bool {
    ip == pod.ip || ip.is_loopback() || ip.is_unspecified()
}
