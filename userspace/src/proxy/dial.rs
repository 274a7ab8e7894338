//! Opening connections from inside a pod's namespace, with a deadline.

use std::{io, net::SocketAddr, time::Duration};

use socket2::{SockRef, Socket};
use tokio::{net::TcpStream, time::timeout};

use crate::{enrol::LocalPod, kernel::PodSockets};

/// How long a peer or application has to accept a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// A connection out of the pod, with the pod's address as source.
pub(super) async fn out_of_pod(
    sockets: PodSockets,
    destination: SocketAddr,
) -> io::Result<TcpStream> {
    connect(sockets.outgoing()?, destination).await
}

/// A tunnel out of the pod, with the pod's address as source.
pub(super) async fn tunnel(sockets: PodSockets, destination: SocketAddr) -> io::Result<TcpStream> {
    connect(sockets.tunnel()?, destination).await
}

/// A connection to the pod's application that shows it `client` as its peer.
pub(super) async fn to_application(
    pod: &LocalPod,
    client: SocketAddr,
    target: SocketAddr,
) -> io::Result<TcpStream> {
    match connect(pod.sockets.to_application(client)?, target).await {
        // The client's port is in use towards this target, by a connection that is just ending: another port will do.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse
            ) =>
        {
            connect(
                pod.sockets
                    .to_application(SocketAddr::new(client.ip(), 0))?,
                target,
            )
            .await
        }
        result => result,
    }
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
