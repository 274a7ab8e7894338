//! Carries one connection: bytes both ways, half-closes, resets, and exact counts.
//!
//! Invariants: end of file is passed on only where it was received; a side that fails resets the other, so that a truncated stream never
//! looks complete; at most one chunk per direction is held, and read again only when that is written. Every proxied path ends here.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::hbone::HboneStream;

mod tcp;
#[cfg(test)]
mod tests;

pub use tcp::TcpSide;

/// One end of a relayed connection.
pub trait Side: Unpin {
    /// The next bytes, None at the end of this direction.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>>;

    /// Takes some of `bytes` off its front. Ready means progress.
    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<()>>;

    /// Ends the direction towards this side.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Ready when this side has failed; polled while nothing is read from it. `ended` says that its own direction is over.
    fn poll_failed(&mut self, cx: &mut Context<'_>, ended: bool) -> Poll<io::Error>;

    /// Makes the peer see an error, not an end. Only `hasten` is called afterwards.
    fn reset(&mut self);

    /// Lets the peer of what was reset see it now, if that would wait for the drop.
    fn hasten(&mut self) {}

    /// This side was given everything and its end: dropping it takes nothing back. Nothing is called afterwards.
    fn release(&mut self);
}

/// What can be relayed.
pub trait IntoSide {
    type Side: Side;

    fn into_side(self) -> Self::Side;
}

impl IntoSide for TcpStream {
    type Side = TcpSide;

    fn into_side(self) -> TcpSide {
        TcpSide::new(self)
    }
}

impl<S: Side> IntoSide for S {
    type Side = S;

    fn into_side(self) -> S {
        self
    }
}

impl Side for HboneStream {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        HboneStream::poll_chunk(self, cx)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<()>> {
        HboneStream::poll_send(self, cx, bytes)
    }

    fn poll_finish(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }

    fn poll_failed(&mut self, cx: &mut Context<'_>, ended: bool) -> Poll<io::Error> {
        if ended {
            self.poll_reset(cx)
        } else {
            self.poll_prefetch(cx)
        }
    }

    fn reset(&mut self) {
        self.abort();
    }

    /// A stream that ended both ways is complete, any other is reset by its drop.
    fn release(&mut self) {}
}

/// Bytes that the receiving side has taken so far; readable while the relay runs.
#[derive(Debug, Default)]
pub struct RelayCounters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl RelayCounters {
    /// From client to upstream.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// From upstream to client.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// How a relayed connection ended.
#[derive(Debug)]
pub enum RelayEnd {
    /// Both directions ended.
    Closed,
    ClientReset(io::Error),
    UpstreamReset(io::Error),
    Cancelled,
}

#[derive(Debug)]
pub struct RelayOutcome {
    /// Bytes from client to upstream.
    pub sent: u64,
    /// Bytes from upstream to client.
    pub received: u64,
    pub end: RelayEnd,
}

/// The two sides of a connection that has ended: what is a stream of a tunnel has been reset, what is a socket is closed with this.
#[must_use = "the sockets are closed when this is dropped"]
pub struct Remains<C, U>(C, U);

impl<C: Side, U: Side> Remains<C, U> {
    /// Lets the peers see what was reset, before the time that closing takes is spent.
    pub fn hasten(&mut self) {
        self.0.hasten();
        self.1.hasten();
    }
}

/// Relays until both directions have ended, one side fails, or `cancel`, which resets both.
pub async fn relay<C: IntoSide, U: IntoSide>(
    client: C,
    upstream: U,
    counters: &Arc<RelayCounters>,
    cancel: &CancellationToken,
) -> (RelayOutcome, Remains<C::Side, U::Side>) {
    let mut pair = Pair {
        client: client.into_side(),
        upstream: upstream.into_side(),
        outward: Direction::default(),
        inward: Direction::default(),
        counters,
    };
    let end = {
        let mut cancelled = pin!(cancel.cancelled());
        std::future::poll_fn(|cx| match cancelled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(RelayEnd::Cancelled),
            Poll::Pending => pair.poll(cx),
        })
        .await
    };
    pair.settle(&end);
    let outcome = RelayOutcome {
        sent: counters.sent(),
        received: counters.received(),
        end,
    };
    (outcome, Remains(pair.client, pair.upstream))
}

struct Pair<'a, C, U> {
    client: C,
    upstream: U,
    outward: Direction,
    inward: Direction,
    counters: &'a RelayCounters,
}

impl<C: Side, U: Side> Pair<'_, C, U> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<RelayEnd> {
        let Self {
            client,
            upstream,
            outward,
            inward,
            counters,
        } = self;
        // An error must end the poll at once: the kernel tells a socket's reset to one call only, the next read would see an end.
        let outward_done = match outward.poll(cx, client, upstream, &counters.sent) {
            Poll::Ready(Err(failed)) => return Poll::Ready(failed.end(true)),
            polled => polled.is_ready(),
        };
        let inward_done = match inward.poll(cx, upstream, client, &counters.received) {
            Poll::Ready(Err(failed)) => return Poll::Ready(failed.end(false)),
            polled => polled.is_ready(),
        };
        if outward_done && inward_done {
            return Poll::Ready(RelayEnd::Closed);
        }
        // Whoever is not being read could be gone without a read to tell. After its end, what it sent must first have arrived.
        if let Some(ended) = outward.unread()
            && let Poll::Ready(error) = client.poll_failed(cx, ended)
        {
            return Poll::Ready(RelayEnd::ClientReset(error));
        }
        if let Some(ended) = inward.unread()
            && let Poll::Ready(error) = upstream.poll_failed(cx, ended)
        {
            return Poll::Ready(RelayEnd::UpstreamReset(error));
        }
        Poll::Pending
    }

    /// The side that did not fail is reset, unless it was given the other's whole stream and its end: then dropping it is enough, as
    /// when a program closes a socket, and does not take back what was delivered.
    fn settle(&mut self, end: &RelayEnd) {
        match end {
            RelayEnd::Closed => {
                self.client.release();
                self.upstream.release();
            }
            RelayEnd::Cancelled => {
                self.client.reset();
                self.upstream.reset();
            }
            RelayEnd::ClientReset(_) => {
                self.client.reset();
                if self.outward.finished {
                    self.upstream.release();
                } else {
                    self.upstream.reset();
                }
            }
            RelayEnd::UpstreamReset(_) => {
                self.upstream.reset();
                if self.inward.finished {
                    self.client.release();
                } else {
                    self.client.reset();
                }
            }
        }
    }
}

/// One direction's progress.
#[derive(Default)]
struct Direction {
    chunk: Bytes,
    ended: bool,
    finished: bool,
}

/// Which side of a direction failed.
enum Failed {
    Source(io::Error),
    Sink(io::Error),
}

impl Failed {
    fn end(self, source_is_client: bool) -> RelayEnd {
        match (self, source_is_client) {
            (Self::Source(error), true) | (Self::Sink(error), false) => {
                RelayEnd::ClientReset(error)
            }
            (Self::Source(error), false) | (Self::Sink(error), true) => {
                RelayEnd::UpstreamReset(error)
            }
        }
    }
}

impl Direction {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut impl Side,
        sink: &mut impl Side,
        count: &AtomicU64,
    ) -> Poll<Result<(), Failed>> {
        loop {
            if self.finished {
                return Poll::Ready(Ok(()));
            }
            while !self.chunk.is_empty() {
                let before = self.chunk.len();
                ready!(sink.poll_send(cx, &mut self.chunk)).map_err(Failed::Sink)?;
                let taken = before.saturating_sub(self.chunk.len());
                count.fetch_add(u64::try_from(taken).unwrap_or(u64::MAX), Ordering::Relaxed);
            }
            // Drops the empty rest now: it would keep its buffer alive while nothing flows.
            self.chunk = Bytes::new();
            if self.ended {
                ready!(sink.poll_finish(cx)).map_err(Failed::Sink)?;
                self.finished = true;
                continue;
            }
            match ready!(source.poll_chunk(cx)).map_err(Failed::Source)? {
                Some(chunk) => self.chunk = chunk,
                None => self.ended = true,
            }
        }
    }

    /// Some if the source is not being read now: true after its end was passed on, false while the sink is full.
    fn unread(&self) -> Option<bool> {
        match (self.finished, self.ended, self.chunk.is_empty()) {
            (true, ..) => Some(true),
            (false, false, false) => Some(false),
            _ => None,
        }
    }
}
