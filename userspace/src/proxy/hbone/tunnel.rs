//! The client's end of one tunnel: a connected HTTP/2 session with a bounded number of streams, and the task that drives it.
//!
//! Invariant: a `Slot` is one of the tunnel's places for streams, given back when dropped. Made and kept by the pool.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::error::HboneError;
use super::request::ConnectRequest;
use super::settings::PoolSettings;
use super::stream::HboneStream;
use crate::identity::WorkloadCertificate;
use crate::proxy::tls::{self, ExpectedServer, HandshakeError, PeerChecks, RevocationWatch};

#[derive(Debug)]
pub(super) struct Tunnel {
    destination: SocketAddr,
    certificate: Arc<WorkloadCertificate>,
    sender: SendRequest<Bytes>,
    max_streams: usize,
    streams: AtomicUsize,
    idle_since: Mutex<Instant>,
    /// No new streams.
    retired: AtomicBool,
    close: CancellationToken,
    /// The server is revoked: closed for that reason.
    revoked: CancellationToken,
    failure: Failure,
}

/// One place for a stream in a tunnel.
#[derive(Debug)]
pub(super) struct Slot(Arc<Tunnel>);

/// The reason a TLS stream failed, which h2 keeps only as text.
type Failure = Arc<OnceLock<Arc<HandshakeError>>>;

type Http2<S> = Connection<Watched<TlsStream<S>>, Bytes>;

/// What is driven for a tunnel to work, until it ends.
pub(super) struct Session<S: AsyncRead + AsyncWrite + Unpin> {
    pub(super) http2: Http2<S>,
    /// Ends when the server's certificate is revoked.
    pub(super) peer_revoked: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// How a request ended that got no stream.
pub(super) enum Unopened {
    /// The peer has not begun to process it: another tunnel may be tried.
    NotProcessed(HboneError),
    /// The tunnel died under it. No byte of the application was sent, so where the tunnel was old, another may be tried.
    Died(HboneError),
    Final(HboneError),
}

impl Tunnel {
    /// TLS and HTTP/2 on a fresh connection.
    pub(super) async fn open<S>(
        io: S,
        destination: SocketAddr,
        certificate: Arc<WorkloadCertificate>,
        expected: &ExpectedServer,
        settings: &PoolSettings,
        checks: &PeerChecks,
    ) -> Result<(Arc<Self>, Session<S>), HboneError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let watch = RevocationWatch::begin(checks, &certificate);
        let config = tls::client_config(&certificate, expected, checks)
            .map_err(|error| HboneError::Config(Arc::new(error)))?;
        let connected = tls::connect(
            io,
            config,
            destination.ip(),
            settings.handshake_deadline,
            checks,
        )
        .await
        .map_err(|error| HboneError::Tls {
            destination,
            error: Arc::new(error),
        })?;
        let peer_revoked = Box::pin(watch.peer_revoked(connected.stream.get_ref().1));
        let failure = Failure::default();
        let io = Watched {
            inner: connected.stream,
            failure: Arc::clone(&failure),
        };
        let builder = settings.limits.client(settings.max_streams_per_connection);
        let (sender, http2) = builder
            .handshake(io)
            .await
            .map_err(|error| failed(destination, &failure, error))?;
        let tunnel = Self {
            destination,
            certificate,
            sender,
            max_streams: usize::try_from(settings.max_streams_per_connection)
                .unwrap_or(usize::MAX)
                .max(1),
            streams: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
            retired: AtomicBool::new(false),
            close: CancellationToken::new(),
            revoked: CancellationToken::new(),
            failure,
        };
        let session = Session {
            http2,
            peer_revoked,
        };
        Ok((Arc::new(tunnel), session))
    }

    /// Whether new streams may use it, on behalf of a pod whose certificate now is `certificate`.
    pub(super) fn usable(&self, certificate: &Arc<WorkloadCertificate>, now: SystemTime) -> bool {
        !self.retired.load(Ordering::Relaxed)
            && !self.close.is_cancelled()
            && Arc::ptr_eq(&self.certificate, certificate)
            && !self.certificate.validity().expired(now)
    }

    /// A place for one more stream, if there is one. Called under the pool's lock.
    pub(super) fn slot(self: &Arc<Self>) -> Option<Slot> {
        let most = self.max_streams.min(self.sender.current_max_send_streams());
        let taken = self.streams.load(Ordering::Relaxed);
        (taken < most).then(|| {
            self.streams.fetch_add(1, Ordering::Relaxed);
            Slot(Arc::clone(self))
        })
    }

    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    pub(super) fn close(&self) {
        self.close.cancel();
    }

    /// Cancelled when the server is revoked, and closed for that.
    pub(super) fn revoked(&self) -> &CancellationToken {
        &self.revoked
    }

    /// Why no new stream may use it.
    fn closed(&self) -> HboneError {
        match self.revoked.is_cancelled() {
            true => HboneError::Revoked(self.destination),
            false => HboneError::Closed(self.destination),
        }
    }

    pub(super) fn closing(&self) -> &CancellationToken {
        &self.close
    }

    /// Since when it has no streams, if it has none.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let idle = self.streams.load(Ordering::Relaxed) == 0;
        idle.then(|| {
            *self
                .idle_since
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        })
    }
}

impl Slot {
    pub(super) fn tunnel(&self) -> &Arc<Tunnel> {
        &self.0
    }

    /// Sends CONNECT and waits for 200.
    pub(super) async fn connect(
        self,
        request: &ConnectRequest,
        settings: &PoolSettings,
    ) -> Result<HboneStream, Unopened> {
        let tunnel = &self.0;
        let destination = tunnel.destination;
        let not_sent = |error| Unopened::NotProcessed(failed(destination, &tunnel.failure, error));
        let request = request
            .to_http()
            .map_err(|error| Unopened::Final(HboneError::Request(Arc::new(error))))?;
        let exchange = async {
            let mut sender = tunnel.sender.clone().ready().await.map_err(not_sent)?;
            let (answer, send) = sender.send_request(request, false).map_err(not_sent)?;
            let answer = answer.await.map_err(|error| {
                // A stream that fails with GOAWAY is one of those the peer said it will not look at.
                let refused =
                    error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
                let unprocessed = error.is_remote() && (error.is_go_away() || refused);
                let (io, error) = (error.is_io(), failed(destination, &tunnel.failure, error));
                match (unprocessed, io) {
                    (true, _) => Unopened::NotProcessed(error),
                    (false, true) => Unopened::Died(error),
                    (false, false) => Unopened::Final(error),
                }
            })?;
            Ok((answer, send))
        };
        let answered = tokio::select! {
            answered = timeout(settings.answer_deadline, exchange) => answered,
            () = tunnel.close.cancelled() => return Err(Unopened::Final(tunnel.closed())),
        };
        let (answer, send) = answered.map_err(|_| {
            // A tunnel that does not answer may be dead without knowing.
            tunnel.retire();
            let (waited_for, deadline) = ("the answer to CONNECT", settings.answer_deadline);
            Unopened::Final(HboneError::Deadline {
                destination,
                waited_for,
                deadline,
            })
        })??;
        if answer.status() != StatusCode::OK {
            return Err(Unopened::Final(HboneError::Refused {
                destination,
                status: answer.status(),
            }));
        }
        Ok(HboneStream::new(send, answer.into_body(), Some(self)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The time first: whoever sees no streams must also see since when.
        *self
            .0
            .idle_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.0.streams.fetch_sub(1, Ordering::Release);
    }
}

fn failed(destination: SocketAddr, failure: &Failure, error: h2::Error) -> HboneError {
    match failure.get() {
        Some(tls) if error.is_io() => HboneError::Tls {
            destination,
            error: Arc::clone(tls),
        },
        _ => HboneError::Http2 {
            destination,
            error: Arc::new(error),
        },
    }
}

/// A TLS stream that remembers why it failed: a TLS 1.3 server refuses the client's certificate only after the handshake.
pub(super) struct Watched<S> {
    inner: S,
    failure: Failure,
}

impl<S> Watched<S> {
    fn note(&self, error: io::Error) -> io::Error {
        let Some(tls) = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        else {
            return error;
        };
        let copy = io::Error::new(error.kind(), tls.clone());
        let _ = self.failure.set(Arc::new(HandshakeError::from_io(copy)));
        error
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner)
            .poll_read(cx, buf)
            .map_err(|error| self.note(error))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
