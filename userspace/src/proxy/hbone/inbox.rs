//! Bytes received on a stream and not yet read. Small frames are packed together, so that a byte costs about a byte.
//!
//! Bounded by the stream's flow-control window: capacity is released when bytes leave, not when they enter.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Frames below this are copied; a larger one keeps its own buffer.
const SMALL: usize = 1024;
const PACKED: usize = 16 * 1024;

#[derive(Debug, Default)]
pub(super) struct Inbox {
    chunks: VecDeque<Bytes>,
    tail: BytesMut,
}

impl Inbox {
    pub(super) fn push(&mut self, frame: Bytes) {
        if frame.len() >= SMALL {
            self.seal();
            self.chunks.push_back(frame);
            return;
        }
        self.tail.extend_from_slice(&frame);
        if self.tail.len() >= PACKED {
            self.seal();
        }
    }

    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let front = self.chunks.pop_front();
        front.or_else(|| (!self.tail.is_empty()).then(|| self.tail.split().freeze()))
    }

    /// Puts back what a reader had no room for.
    pub(super) fn unread(&mut self, rest: Bytes) {
        if !rest.is_empty() {
            self.chunks.push_front(rest);
        }
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_the_order_they_went_in() {
        let mut inbox = Inbox::default();
        let mut expected = Vec::new();
        for (index, size) in [1, 2, 5000, 3, 0, 1024, 1023, 20_000, 1]
            .into_iter()
            .enumerate()
        {
            let frame = vec![u8::try_from(index).unwrap(); size];
            expected.extend_from_slice(&frame);
            inbox.push(frame.into());
        }
        let mut got = Vec::new();
        while let Some(mut chunk) = inbox.pop() {
            got.extend_from_slice(&chunk.split_to(chunk.len().min(7)));
            inbox.unread(chunk);
        }
        assert_eq!(got, expected);
    }

    #[test]
    fn many_small_frames_are_few_chunks() {
        let mut inbox = Inbox::default();
        for _ in 0..100_000 {
            inbox.push(Bytes::from_static(b"x"));
        }
        assert!(inbox.chunks.len() < 10);
    }
}
