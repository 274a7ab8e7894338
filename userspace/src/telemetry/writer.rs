//! Log lines on their way out: a bounded queue and one thread that writes. Invariant: logging never waits for whoever
//! reads the log; when it does not keep up, lines are dropped, counted, and the gap is noted in the log itself.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// Lines that may wait; with access-log lines of 500 bytes, 4 MiB.
const QUEUE: usize = 8192;

/// Where rendered lines go.
pub(super) trait LineSink: Send + Sync + 'static {
    /// Takes one line with its newline.
    fn line(&self, line: String);
}

enum Message {
    Line(String),
    /// Everything before it has been written once this sender is dropped.
    Flush(#[allow(dead_code, reason = "dropping it is the answer")] SyncSender<()>),
}

/// The near end of the queue.
#[derive(Clone)]
pub(super) struct LogWriter {
    queue: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

impl LogWriter {
    /// Starts the writing thread.
    pub fn start(to: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (queue, lines) = sync_channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let counter = lost.clone();
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&lines, to, &counter))?;
        Ok(Self { queue, lost })
    }

    /// Waits until what was logged so far is written, at most for `deadline`.
    pub fn flush(&self, deadline: Duration) {
        let (done, wait) = sync_channel(0);
        if self.queue.try_send(Message::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(deadline);
        }
    }

    /// How many lines were dropped.
    pub fn lost(&self) -> Arc<AtomicU64> {
        self.lost.clone()
    }
}

impl LineSink for LogWriter {
    fn line(&self, line: String) {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.queue.try_send(Message::Line(line))
        {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn write_lines(lines: &Receiver<Message>, mut to: impl Write, lost: &AtomicU64) {
    let mut reported = 0;
    while let Ok(message) = lines.recv() {
        // A log that cannot be written (closed pipe, full disk) has no better place to be reported.
        let _ = match message {
            Message::Line(line) => to.write_all(line.as_bytes()),
            Message::Flush(_) => to.flush(),
        };
        let now = lost.load(Ordering::Relaxed);
        if now != reported {
            let _ = writeln!(
                to,
                "[{} log lines lost: the log is not read fast enough]",
                now - reported
            );
            reported = now;
        }
        let _ = to.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Slow {
        gate: Arc<Mutex<()>>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _open = self.gate.lock().unwrap();
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_stands_still_loses_lines_and_is_told() {
        let slow = Slow::default();
        let writer = LogWriter::start(slow.clone()).unwrap();
        let closed = slow.gate.lock().unwrap();
        for _ in 0..QUEUE + 100 {
            writer.line("x\n".to_owned());
        }
        let lost = writer.lost().load(Ordering::Relaxed);
        assert!((99..=100).contains(&lost), "{lost}");
        drop(closed);
        while writer
            .queue
            .try_send(Message::Line("last\n".to_owned()))
            .is_err()
        {
            std::thread::yield_now();
        }
        writer.flush(Duration::from_secs(10));
        let written = String::from_utf8(slow.written.lock().unwrap().clone()).unwrap();
        assert!(
            written.contains(&format!("[{lost} log lines lost")),
            "{lost}"
        );
        assert!(written.contains("last\n"));
    }
}
