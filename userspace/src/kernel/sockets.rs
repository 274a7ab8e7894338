//! Sockets of the agent inside a pod: its listeners, and the connections it opens there.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use culvert_abi::{HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, listener_kind};
use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};

use super::{KernelError, Netns, RedirectMode, RoutingSettings, Steered, Tables};

const BACKLOG: i32 = 4096;
/// How long sent bytes may stay unacknowledged.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);
/// Idle time before the peer is probed, as in ztunnel.
const IDLE: Duration = Duration::from_secs(180);

/// The three listeners of a pod. Dropping them closes the ports; `inbound` then refuses what needs them.
#[derive(Debug)]
pub struct PodListeners {
    pub outbound: TcpListener,
    pub inbound: TcpListener,
    pub hbone: TcpListener,
}

/// Opens sockets in one pod's namespace, marked as the agent's.
#[derive(Clone)]
pub struct PodSockets {
    netns: Arc<Netns>,
    tables: Arc<Tables>,
    packet_mark: u32,
    application_mark: u32,
    original_source: bool,
    redirect: RedirectMode,
}

impl PodSockets {
    pub fn new(netns: Arc<Netns>, tables: Arc<Tables>, settings: RoutingSettings) -> Self {
        Self {
            netns,
            tables,
            packet_mark: settings.packet_mark,
            application_mark: settings.application_mark(),
            original_source: settings.original_source,
            redirect: settings.redirect,
        }
    }

    pub fn netns(&self) -> &Arc<Netns> {
        &self.netns
    }

    /// Opens the listeners. Nothing comes to them before [`Self::publish`].
    pub fn listen(&self) -> Result<PodListeners, KernelError> {
        let outbound = self.listener(OUTBOUND_PORT)?;
        let inbound = self.listener(INBOUND_PORT)?;
        let hbone = self.listener(HBONE_PORT)?;
        Ok(PodListeners {
            outbound,
            inbound,
            hbone,
        })
    }

    /// Where a connection was going that one of the listeners accepted.
    pub fn destination(&self, accepted: impl AsFd) -> io::Result<SocketAddr> {
        self.redirect.destination(accepted)
    }

    /// What `connect` knew of a connection that the pod's outbound listener accepted.
    pub fn steered(&self, accepted: impl AsFd) -> Steered {
        self.tables.steered(accepted)
    }

    /// Takes the listeners away from `inbound`.
    pub fn unlisten(&self) {
        for kind in [
            listener_kind::OUTBOUND,
            listener_kind::INBOUND,
            listener_kind::HBONE,
        ] {
            self.tables.remove_listener(self.netns.cookie(), kind);
        }
    }

    fn listener(&self, port: u16) -> Result<TcpListener, KernelError> {
        let socket = self
            .netns
            .run(|| {
                let socket = any_family()?;
                socket.set_reuse_address(true)?;
                // Two agents serve a pod for a while in an upgrade. The kernel part gives connections to the one it knows, whoever
                // else shares the port.
                socket.set_reuse_port(true)?;
                // Connections accepted here have addresses that are not the pod's. (The kernel has one such flag for both families.)
                socket.set_ip_transparent_v4(true)?;
                // Accepted connections inherit both.
                socket.set_tcp_keepalive(&keepalive())?;
                if port == HBONE_PORT {
                    // Only here: it also ends connections whose peer is there but does not read, which an application may do
                    // for as long as it likes, and another agent does not.
                    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
                }
                let any = if socket.domain()? == Domain::IPV6 {
                    IpAddr::V6(Ipv6Addr::UNSPECIFIED)
                } else {
                    IpAddr::V4(Ipv4Addr::UNSPECIFIED)
                };
                socket.bind(&SocketAddr::new(any, port).into())?;
                Ok(socket)
            })
            .and_then(|socket| socket)
            .map_err(|source| KernelError::Port { port, source })?;
        self.tables.mark_proxy(&socket)?;
        socket
            .listen(BACKLOG)
            .map_err(|source| KernelError::Port { port, source })?;
        Ok(socket.into())
    }

    /// Gives `inbound` the listeners, and lets `connect` steer: only once the pod's routing leads here.
    pub fn publish(&self, listeners: &PodListeners) -> Result<(), KernelError> {
        let cookie = self.netns.cookie();
        for (kind, socket) in [
            (listener_kind::INBOUND, &listeners.inbound),
            (listener_kind::HBONE, &listeners.hbone),
            (listener_kind::OUTBOUND, &listeners.outbound),
        ] {
            self.tables.put_listener(cookie, kind, socket)?;
        }
        Ok(())
    }

    /// A socket for a connection that leaves the pod, from an address of the pod's, or from the one that the kernel chooses.
    pub fn outgoing(&self, destination: SocketAddr, from: Option<IpAddr>) -> io::Result<Socket> {
        let domain = Domain::for_address(destination);
        let socket = self.netns.run(|| stream(domain))??;
        self.tables.mark_proxy(&socket).map_err(io::Error::other)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(&keepalive())?;
        if self.redirect == RedirectMode::Iptables {
            // Or the rules would send it back here.
            socket.set_mark(self.packet_mark)?;
        }
        if let Some(ip) = from {
            // The port is chosen once the destination is known too, or the address would soon have none left.
            setsockopt(&socket, IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::new(ip, 0).into())?;
        }
        Ok(socket)
    }

    /// A socket for a tunnel, whose other end always reads: one that does not for a while is gone.
    pub fn tunnel(&self, destination: SocketAddr, from: Option<IpAddr>) -> io::Result<Socket> {
        let socket = self.outgoing(destination, from)?;
        socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED))?;
        Ok(socket)
    }

    /// A socket for a connection to the pod's own application, which will see `client` as its peer. With a port of 0,
    /// or one that is taken, the kernel chooses the port. A client of the other family cannot be shown: the application
    /// then sees the pod itself, as it does where the settings say so.
    pub fn to_application(&self, client: SocketAddr, target: SocketAddr) -> io::Result<Socket> {
        let socket = self.outgoing(target, None)?;
        if !self.original_source || client.is_ipv4() != target.is_ipv4() {
            return Ok(socket);
        }
        socket.set_mark(self.application_mark)?;
        socket.set_ip_transparent_v4(true)?;
        socket.set_reuse_address(true)?;
        if client.port() == 0 || socket.bind(&client.into()).is_err() {
            let mut any_port = client;
            any_port.set_port(0);
            socket.bind(&any_port.into())?;
        }
        Ok(socket)
    }
}

/// For connections of either family, or of IPv4 only where the kernel has no IPv6.
fn any_family() -> io::Result<Socket> {
    match stream(Domain::IPV6) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            Ok(socket)
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => stream(Domain::IPV4),
        Err(error) => Err(error),
    }
}

fn stream(domain: Domain) -> io::Result<Socket> {
    Socket::new(
        domain,
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )
}

/// A peer that is silent for [`IDLE`] is asked whether it is still there.
fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(IDLE)
        .with_interval(IDLE / 10)
        .with_retries(9)
}
