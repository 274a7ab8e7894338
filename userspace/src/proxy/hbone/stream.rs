//! One application connection inside a tunnel, as a byte stream.
//!
//! Invariants: end of file is reported only for END_STREAM; a reset, or the death of the tunnel, is an error, again on every later call.
//! A stream dropped before both directions ended is reset. Used by the relay, and by whoever needs AsyncRead and AsyncWrite.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

use super::inbox::Inbox;
use super::tunnel::Slot;

/// Most that is asked of flow control at once.
const MAX_RESERVED: usize = 1024 * 1024;

#[derive(Debug)]
pub struct HboneStream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    inbox: Inbox,
    receiving: Receiving,
    /// END_STREAM is queued.
    finished: bool,
    aborted: bool,
    /// Keeps the tunnel's place taken.
    slot: Option<Slot>,
}

#[derive(Debug, Clone, Copy)]
enum Receiving {
    Open,
    Ended,
    Failed(io::ErrorKind),
}

impl HboneStream {
    pub(super) fn new(send: SendStream<Bytes>, recv: RecvStream, slot: Option<Slot>) -> Self {
        let (inbox, receiving) = (Inbox::default(), Receiving::Open);
        Self {
            send,
            recv,
            inbox,
            receiving,
            finished: false,
            aborted: false,
            slot,
        }
    }

    /// Cancelled when the tunnel's server is revoked.
    pub fn peer_revoked(&self) -> Option<CancellationToken> {
        let slot = self.slot.as_ref()?;
        Some(slot.tunnel().revoked().clone())
    }

    /// Resets the stream; what is queued in either direction is dropped.
    pub fn abort(&mut self) {
        if !self.aborted {
            self.aborted = true;
            self.send.send_reset(Reason::CANCEL);
        }
    }

    /// The next bytes without copying them, None after the peer's END_STREAM.
    pub fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        let chunk = match self.inbox.pop() {
            Some(chunk) => chunk,
            None => match ready!(self.poll_receive(cx)?) {
                Some(chunk) => chunk,
                None => return Poll::Ready(Ok(None)),
            },
        };
        // Fails only if more is released than was received.
        let released = self.recv.flow_control().release_capacity(chunk.len());
        Poll::Ready(released.map(|()| Some(chunk)).map_err(to_io))
    }

    /// Sends some of `bytes` without copying them and takes that off their front. Ready means progress, unless `bytes` is empty.
    pub fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<()>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let capacity = ready!(self.poll_capacity(cx, bytes.len())?);
        let part = bytes.split_to(capacity.min(bytes.len()));
        Poll::Ready(self.send.send_data(part, false).map_err(to_io))
    }

    /// Ends our direction; the other one goes on.
    pub fn finish(&mut self) -> io::Result<()> {
        if !self.finished {
            self.send.send_data(Bytes::new(), true).map_err(to_io)?;
            self.finished = true;
        }
        Ok(())
    }

    /// For a reader that cannot take bytes now: takes what has arrived out of the tunnel's queue, so that many small frames do not pile
    /// up there, without giving the peer new window. Ready only with an error.
    pub fn poll_prefetch(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            match ready!(self.poll_receive(cx)) {
                Ok(Some(frame)) => self.inbox.push(frame),
                Ok(None) => return Poll::Pending,
                Err(error) => return Poll::Ready(error),
            }
        }
    }

    /// Ready when the peer has reset the stream or the tunnel is gone, also where its direction ended before.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match ready!(self.send.poll_reset(cx)) {
            Ok(reason) => Poll::Ready(reset_by(reason)),
            Err(error) => Poll::Ready(to_io(error)),
        }
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        match self.receiving {
            Receiving::Open if !self.aborted => {}
            Receiving::Open => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            Receiving::Ended => return Poll::Ready(Ok(None)),
            Receiving::Failed(kind) => return Poll::Ready(Err(kind.into())),
        }
        loop {
            let received = match ready!(self.recv.poll_data(cx)) {
                Some(Ok(frame)) if frame.is_empty() => continue,
                Some(Ok(frame)) => return Poll::Ready(Ok(Some(frame))),
                Some(Err(error)) => Err(error),
                // The end, perhaps by way of trailers, which have no meaning here.
                None => ready!(self.recv.poll_trailers(cx)).map(drop),
            };
            return Poll::Ready(match received {
                Ok(()) => {
                    self.receiving = Receiving::Ended;
                    Ok(None)
                }
                Err(error) => {
                    let error = to_io(error);
                    self.receiving = Receiving::Failed(error.kind());
                    Err(error)
                }
            });
        }
    }

    fn poll_capacity(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        self.send.reserve_capacity(wanted.min(MAX_RESERVED));
        loop {
            // Asked for first: h2 announces only changes.
            let capacity = self.send.capacity();
            if capacity > 0 {
                return Poll::Ready(Ok(capacity));
            }
            match ready!(self.send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(to_io(error))),
                None => {
                    let reason = match self.poll_reset(cx) {
                        Poll::Ready(error) => error,
                        Poll::Pending => io::ErrorKind::BrokenPipe.into(),
                    };
                    return Poll::Ready(Err(reason));
                }
            }
        }
    }
}

impl Drop for HboneStream {
    fn drop(&mut self) {
        // After END_STREAM h2 itself sends what is queued, then resets if the peer has not ended: like close(2).
        if !self.finished {
            self.abort();
        }
    }
}

impl AsyncRead for HboneStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let mut chunk = match self.inbox.pop() {
            Some(chunk) => chunk,
            None => match ready!(self.poll_receive(cx)?) {
                Some(chunk) => chunk,
                None => return Poll::Ready(Ok(())),
            },
        };
        let part = chunk.split_to(chunk.len().min(buf.remaining()));
        buf.put_slice(&part);
        self.inbox.unread(chunk);
        Poll::Ready(
            self.recv
                .flow_control()
                .release_capacity(part.len())
                .map_err(to_io),
        )
    }
}

impl AsyncWrite for HboneStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let capacity = ready!(self.poll_capacity(cx, buf.len())?);
        let part = buf.get(..capacity).unwrap_or(buf);
        let sent = self.send.send_data(Bytes::copy_from_slice(part), false);
        Poll::Ready(sent.map(|()| part.len()).map_err(to_io))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The tunnel's task writes what is queued.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}

fn reset_by(reason: Reason) -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionReset,
        format!("the peer reset the stream: {reason}"),
    )
}

/// A reset of the stream is told from the end of the whole tunnel.
fn to_io(error: h2::Error) -> io::Error {
    let kind = if error.is_reset() {
        io::ErrorKind::ConnectionReset
    } else {
        io::ErrorKind::ConnectionAborted
    };
    io::Error::new(kind, error)
}
