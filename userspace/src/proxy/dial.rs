//! Opening connections from inside a pod's namespace, with a deadline.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use socket2::{SockRef, Socket};
use tokio::{net::TcpStream, time::timeout};

use crate::{enrol::LocalPod, kernel::PodSockets};

/// How long a peer or application has to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// The address that what a pod's client began goes on from; `None` for the one the kernel chooses.
///
/// The kernel chooses as it would for the client itself, unless that has chosen another of the pod's addresses.
pub(super) fn source(pod: &LocalPod, client: IpAddr, target: IpAddr) -> Option<IpAddr> {
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == client.is_ipv4();
    let primary = pod.addresses.iter().find(same_family);
    let chosen = primary != Some(&client) && pod.has_address(client);
    (chosen && client.is_ipv4() == target.is_ipv4()).then_some(client)
}

/// A connection out of the pod.
pub(super) async fn out_of_pod(
    sockets: PodSockets,
    from: Option<IpAddr>,
    destination: SocketAddr,
) -> io::Result<TcpStream> {
    connect(sockets.outgoing(destination, from)?, destination).await
}

/// A tunnel out of the pod.
pub(super) async fn tunnel(
    sockets: PodSockets,
    from: Option<IpAddr>,
    destination: SocketAddr,
) -> io::Result<TcpStream> {
    connect(sockets.tunnel(destination, from)?, destination).await
}

/// A connection to the pod's application that shows it `client` as its peer.
pub(super) async fn to_application(
    pod: &LocalPod,
    client: SocketAddr,
    target: SocketAddr,
) -> io::Result<TcpStream> {
    match connect(pod.sockets.to_application(client, target)?, target).await {
        // The client's port is in use towards this target, by a connection that is just ending: another port will do.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse
            ) =>
        {
            connect(
                pod.sockets.to_application(with_port(client, 0), target)?,
                target,
            )
            .await
        }
        result => result,
    }
}

/// The same address, with what belongs to it, and another port.
pub(super) fn with_port(mut address: SocketAddr, port: u16) -> SocketAddr {
    address.set_port(port);
    address
}

async fn connect(socket: Socket, destination: SocketAddr) -> io::Result<TcpStream> {
    match socket.connect(&destination.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
    }
    let stream = TcpStream::from_std(socket.into())?;
    timeout(CONNECT_DEADLINE, stream.writable())
        .await
        .map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer within {CONNECT_DEADLINE:?}"),
            )
        })??;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// Ends a connection so that its peer sees a reset.
pub(super) fn reset(stream: TcpStream) {
    // If it cannot be set the peer sees an end of file before any byte: no harm, since nothing was promised yet.
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}
