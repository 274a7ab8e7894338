//! A TCP socket as a side of a relay.
//!
//! Invariants: an idle socket holds a few kilobytes of buffer at most; a reset leaves no other descriptor of the socket open, or the
//! kernel would send an end instead.

use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWrite, Interest};
use tokio::net::TcpStream;

use super::Side;
use crate::kernel::sys;

/// First, and while idle largest, read buffer.
const SMALLEST: usize = 4 * 1024;
const LARGEST: usize = 64 * 1024;
/// A read into less room than this is not worth a system call.
const ROOM: usize = 1024;

/// Ends when the socket has an error to tell.
type Watch = Pin<Box<dyn Future<Output = ()> + Send>>;

pub struct TcpSide {
    stream: TcpStream,
    buffer: BytesMut,
    size: usize,
    watch: Option<Watch>,
    is_reset: bool,
}

impl TcpSide {
    pub fn new(stream: TcpStream) -> Self {
        // Until the connection has ended in order, whatever closes the socket cuts the stream, be it the death of this process:
        // the peer must see a reset then, not an end. Fails only on a socket that is gone already.
        let _ = stream.set_zero_linger();
        Self {
            stream,
            buffer: BytesMut::new(),
            size: SMALLEST,
            watch: None,
            is_reset: false,
        }
    }

    fn failure(&self) -> io::Error {
        match self.stream.take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => io::ErrorKind::ConnectionReset.into(),
        }
    }
}

impl Side for TcpSide {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        if self.buffer.capacity() < ROOM {
            // No buffer until there is something to put into it.
            ready!(self.stream.poll_read_ready(cx)?);
            self.buffer.reserve(self.size);
        }
        let room = self.buffer.capacity();
        let read = pin!(self.stream.read_buf(&mut self.buffer)).poll(cx);
        match read {
            Poll::Ready(Ok(0)) => Poll::Ready(Ok(None)),
            Poll::Ready(Ok(bytes)) => {
                if bytes == room {
                    self.size = self.size.saturating_mul(2).min(LARGEST);
                }
                Poll::Ready(Ok(Some(self.buffer.split().freeze())))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                if self.size > SMALLEST {
                    self.size = SMALLEST;
                    self.buffer = BytesMut::new();
                }
                Poll::Pending
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &mut Bytes) -> Poll<io::Result<()>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes)?);
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        bytes.advance(written.min(bytes.len()));
        Poll::Ready(Ok(()))
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_failed(&mut self, cx: &mut Context<'_>, _ended: bool) -> Poll<io::Error> {
        if self.watch.is_none() {
            // A registration of its own: the stream's wakes its task for reads and writes only while those are polled.
            let copy = self.stream.as_fd().try_clone_to_owned();
            match copy.and_then(|copy| TcpStream::from_std(copy.into())) {
                Ok(copy) => {
                    self.watch = Some(Box::pin(
                        async move { drop(copy.ready(Interest::ERROR).await) },
                    ))
                }
                Err(error) => return Poll::Ready(error),
            }
        }
        match self.watch.as_mut().map(|watch| watch.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => {
                self.watch = None;
                Poll::Ready(self.failure())
            }
            _ => Poll::Pending,
        }
    }

    fn reset(&mut self) {
        // It lingers for no time since its beginning.
        self.watch = None;
        self.is_reset = true;
    }

    fn hasten(&mut self) {
        if self.is_reset {
            // Fails only on a socket that is gone already.
            let _ = sys::disconnect(&self.stream);
        }
    }

    fn release(&mut self) {
        self.watch = None;
        let _ = SockRef::from(&self.stream).set_linger(None);
    }
}
