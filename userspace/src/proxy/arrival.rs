//! Where a connection given to the agent came from and was going to.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::enrol::LocalPod;

/// Who opened an accepted connection, and to where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

impl Arrival {
    pub fn of(pod: &LocalPod, stream: &TcpStream) -> io::Result<Self> {
        let mut destination = canonical(pod.sockets.destination(stream)?);
        if let SocketAddr::V6(address) = &mut destination
            && address.ip().is_unicast_link_local()
            && address.scope_id() == 0
        {
            // Which link it is on: the kernel notes the device that a connection came by as the one for its multicast.
            address.set_scope_id(SockRef::from(stream).multicast_if_v6()?);
        }
        Ok(Self {
            source: canonical(stream.peer_addr()?),
            destination,
        })
    }
}

/// IPv4 in IPv6 as IPv4, and nothing else changed: an address of a link keeps its link.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(ip) => SocketAddr::new(IpAddr::V4(ip), v6.port()),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}

/// Whether an address and port are the pod's application's, not the agent's and not somebody else's.
pub(super) fn names_application(pod: &LocalPod, target: SocketAddr) -> bool {
    pod.has_address(target.ip()) && !culvert_abi::OWN_PORTS.contains(&target.port())
}

/// Whether an address is this pod's own.
pub(super) fn is_own(pod: &LocalPod, ip: IpAddr) -> bool {
    pod.has_address(ip) || ip.is_loopback() || ip.is_unspecified()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ipv4_in_ipv6_is_changed() {
        for (address, expected) in [
            ("10.0.0.1:80", "10.0.0.1:80"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("[::10.0.0.1]:80", "[::a00:1]:80"),
            ("[fd00::1]:80", "[fd00::1]:80"),
            ("[fe80::1%3]:80", "[fe80::1%3]:80"),
        ] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(canonical(address).to_string(), expected);
        }
    }
}
