//! Which of two ways brings a pod's connections to the agent, and where a connection was going that came by either.

use std::{fmt, io, net::SocketAddr, os::fd::AsFd, str::FromStr};

use serde::Serialize;
use socket2::SockRef;

/// What steers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RedirectMode {
    /// The kernel part. Pods of a node talk to each other directly.
    #[default]
    Ebpf,
    /// istio-cni's iptables rules in the pod; nothing of the kernel part is attached there.
    Iptables,
}

impl RedirectMode {
    /// Where a connection was going before it came to one of the agent's listeners.
    pub fn destination(self, accepted: impl AsFd) -> io::Result<SocketAddr> {
        let socket = SockRef::from(&accepted);
        let local = address(socket.local_addr()?)?;
        match self {
            // The kernel part hands connections over without rewriting them.
            Self::Ebpf => Ok(local),
            Self::Iptables => {
                // An IPv4 connection is one also where the listener serves both families.
                let before = match local.ip().to_canonical().is_ipv4() {
                    true => socket.original_dst_v4(),
                    false => socket.original_dst_v6(),
                };
                match before {
                    Ok(before) => address(before),
                    // Nobody rewrote it: somebody connected to the agent's port.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(local),
                    Err(error) => Err(error),
                }
            }
        }
    }
}

fn address(address: socket2::SockAddr) -> io::Result<SocketAddr> {
    let other = || io::Error::new(io::ErrorKind::InvalidData, "not an internet address");
    address.as_socket().ok_or_else(other)
}

impl fmt::Display for RedirectMode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Iptables => "iptables",
        })
    }
}

impl FromStr for RedirectMode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "ebpf" => Ok(Self::Ebpf),
            "iptables" => Ok(Self::Iptables),
            _ => Err(()),
        }
    }
}
