//! TLS in front of the services: accepts connections, shakes hands with a deadline, and hands over what speaks HTTP/2.
//!
//! tonic's own TLS would bring another set of choices; this one is the mesh's. Used by `dev_control_plane::run`.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::identity::certificate::PROVIDER;

const HANDSHAKE: Duration = Duration::from_secs(10);
const MOST_HANDSHAKES: usize = 256;
/// How long nothing is accepted after accepting failed, most likely for want of file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// A client's connection.
#[derive(Debug)]
pub struct Connection(TlsStream<TcpStream>);

/// TLS 1.3 with this certificate, for clients that have none.
///
/// # Errors
/// The key is not the certificate's.
pub fn tls_config(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Puts connections into `accepted`, until `shutdown`.
pub async fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    accepted: mpsc::Sender<Connection>,
    shutdown: CancellationToken,
) {
    let mut handshakes = JoinSet::new();
    loop {
        let stream = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = handshakes.join_next() => continue,
            stream = listener.accept(), if handshakes.len() < MOST_HANDSHAKES => stream,
        };
        let Ok((stream, peer)) = stream else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let (tls, accepted) = (Arc::clone(&tls), accepted.clone());
        handshakes.spawn(async move {
            match tokio::time::timeout(HANDSHAKE, handshake(stream, tls)).await {
                // It fails when the server is about to end.
                Ok(Ok(connection)) => drop(accepted.send(connection).await),
                Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
            }
        });
    }
    handshakes.shutdown().await;
}

async fn handshake(stream: TcpStream, tls: Arc<ServerConfig>) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    Ok(Connection(TlsAcceptor::from(tls).accept(stream).await?))
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
