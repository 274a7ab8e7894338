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

/// The pod's address that a tunnel begins at: the other end knows the client by it, and judges it by it.
pub(super) fn tunnel_source(pod: &LocalPod, client: IpAddr, target: IpAddr) -> Option<IpAddr> {
    let mut own = of_family(pod, target);
    if own.clone().any(|ip| ip == client) {
        Some(client)
    } else {
        own.next()
    }
}

/// The address that a connection out of the mesh begins at; `None` for the one that the kernel chooses, as it would for the client
/// itself: only where there are several it may have been the client's choice.
pub(super) fn plain_source(pod: &LocalPod, client: IpAddr, target: IpAddr) -> Option<IpAddr> {
    let mut own = of_family(pod, target);
    (own.clone().count() > 1 && own.any(|ip| ip == client)).then_some(client)
}

fn of_family(pod: &LocalPod, target: IpAddr) -> impl Iterator<Item = IpAddr> + Clone {
    let own = pod.addresses().into_iter();
    own.filter(move |ip| ip.is_ipv4() == target.is_ipv4())
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
