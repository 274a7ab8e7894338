//! The server's end of one tunnel: takes CONNECT requests and hands each well-formed one to a handler.
//!
//! Invariants: a handler runs in a task of its own that does not outlive `serve`; their number is bounded. Called for each connection
//! to 15008 after its TLS handshake.

use std::future::{Future, pending};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::request::{Incoming, IncomingConnect, Refusal, answer};
use super::settings::ServerSettings;
use crate::proxy::deadline::within;

/// What handlers have to report streams that were cut.
const LAST_WORD: Duration = Duration::from_millis(200);

/// The ways to end a tunnel from our side.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// GOAWAY; streams get all the time they want.
    pub leave: CancellationToken,
    /// GOAWAY; streams get the grace time.
    pub drain: CancellationToken,
    /// At once; streams are cut.
    pub close: CancellationToken,
    /// At once, because the peer is revoked; whoever says so has cut the streams, which end in their own way.
    pub revoked: CancellationToken,
}

/// Why a tunnel ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeEnd {
    #[error("the peer closed the tunnel")]
    Closed,
    #[error("the tunnel had no stream for too long")]
    Idle,
    #[error("the tunnel was drained")]
    Drained,
    #[error("the tunnel was closed by this agent")]
    Stopped,
    #[error("the peer's certificate was revoked")]
    Revoked,
    #[error("the peer sent no {0} within {1:?}")]
    Deadline(&'static str, Duration),
    #[error("the tunnel failed: {0}")]
    Failed(h2::Error),
}

/// Serves one tunnel to its end. The handler answers each request through [`Incoming`] and then carries the stream.
pub async fn serve<S, H, F>(io: S, settings: ServerSettings, stop: Stop, handler: H) -> ServeEnd
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Incoming) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let handshake = within(
        settings.handshake_deadline,
        settings.limits.server().handshake::<_, Bytes>(io),
    );
    let connection = tokio::select! {
        result = handshake => match result {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return ServeEnd::Failed(error),
            Err(deadline) => return ServeEnd::Deadline("HTTP/2 preface", deadline),
        },
        () = stop.close.cancelled() => return ServeEnd::Stopped,
        () = stop.revoked.cancelled() => return ServeEnd::Revoked,
        () = stop.drain.cancelled() => return ServeEnd::Drained,
        () = stop.leave.cancelled() => return ServeEnd::Drained,
    };
    let mut tunnel = Tunnel {
        connection,
        settings,
        handlers: JoinSet::new(),
        handler,
    };
    let end = tunnel.run(&stop).await;
    let Tunnel {
        connection,
        mut handlers,
        ..
    } = tunnel;
    // With the connection every stream fails; the handlers see that, deliver what they hold and end.
    drop(connection);
    let finishing = async { while handlers.join_next().await.is_some() {} };
    let cut = async {
        stop.close.cancelled().await;
        sleep(LAST_WORD).await;
    };
    tokio::select! {
        _ = timeout(settings.grace, finishing) => {}
        () = cut => {}
    }
    handlers.shutdown().await;
    end
}

struct Tunnel<S, H> {
    connection: Connection<S, Bytes>,
    settings: ServerSettings,
    handlers: JoinSet<()>,
    handler: H,
}

impl<S, H, F> Tunnel<S, H>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Incoming) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    async fn run(&mut self, stop: &Stop) -> ServeEnd {
        let mut busy = false;
        let first = self
            .settings
            .handshake_deadline
            .unwrap_or(self.settings.idle);
        let mut quiet = Instant::now() + first;
        let mut leaving = false;
        let mut drained_by: Option<(Instant, ServeEnd)> = None;
        loop {
            let deadline = drained_by.as_ref().map(|(deadline, _)| *deadline);
            let wait_quiet = self.handlers.is_empty() && deadline.is_none();
            tokio::select! {
                biased;
                () = stop.close.cancelled() => return ServeEnd::Stopped,
                () = stop.revoked.cancelled() => return ServeEnd::Revoked,
                () = maybe(deadline) => {
                    self.connection.abrupt_shutdown(Reason::NO_ERROR);
                    let _ = timeout(Duration::from_secs(1), self.connection.accept()).await;
                    return drained_by.map_or(ServeEnd::Drained, |(_, end)| end);
                }
                request = self.connection.accept() => match request {
                    Some(Ok((request, respond))) => {
                        busy = true;
                        self.begin(request, respond);
                    }
                    // A peer that was told to go away may go without a word.
                    Some(Err(error)) if error.is_io() && drained_by.is_some() => {
                        return drained_by.map_or(ServeEnd::Drained, |(_, end)| end);
                    }
                    Some(Err(error)) => return ServeEnd::Failed(error),
                    None => return drained_by.map_or(ServeEnd::Closed, |(_, end)| end),
                },
                Some(ended) = self.handlers.join_next() => {
                    if let Err(error) = ended {
                        debug!(%error, "a handler of a tunnel's stream ended unexpectedly");
                    }
                    quiet = Instant::now() + self.settings.idle;
                }
                () = stop.drain.cancelled(), if deadline.is_none() => {
                    self.connection.graceful_shutdown();
                    drained_by = Some((Instant::now() + self.settings.grace, ServeEnd::Drained));
                }
                () = stop.leave.cancelled(), if !leaving => {
                    self.connection.graceful_shutdown();
                    leaving = true;
                }
                () = sleep_until(quiet), if wait_quiet => {
                    if !busy {
                        return ServeEnd::Deadline("request", first);
                    }
                    self.connection.graceful_shutdown();
                    drained_by = Some((Instant::now() + self.settings.grace, ServeEnd::Idle));
                }
            }
        }
    }

    fn begin(&mut self, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
        let Some(connect) = IncomingConnect::parse(&request) else {
            return answer(&mut respond, Refusal::BadRequest);
        };
        // A client that opens and resets streams faster than handlers can end must not make more of them.
        let most = usize::try_from(self.settings.limits.max_streams)
            .unwrap_or(usize::MAX)
            .saturating_mul(2);
        if self.handlers.len() >= most {
            return respond.send_reset(Reason::REFUSED_STREAM);
        }
        let handling = (self.handler)(Incoming::new(connect, respond, request.into_body()));
        self.handlers.spawn(handling);
    }
}

async fn maybe(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
