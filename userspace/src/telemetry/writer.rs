//! Log lines on their way out: a bounded queue and one thread that writes. Invariant: logging never waits for whoever
//! reads the log; when it does not keep up, lines are dropped, counted, and the gap is noted in the log itself.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::time::Duration;

use super::access_log::AccessLine;
use crate::config::LogFormat;

/// Lines that may wait; with access-log lines of 500 bytes, 8 MiB.
const QUEUE: usize = 16_384;
/// Bytes written at once: as many as a pipe holds.
const WRITE: usize = 64 << 10;

/// Where rendered lines go.
pub(super) trait LineSink: Send + Sync + 'static {
    /// Takes one line with its newline.
    fn line(&self, line: String);
}

enum Message {
    Line(String),
    /// Rendered by the writing thread: who reports connections has better things to do.
    Access(Vec<AccessLine>, LogFormat),
    /// Everything before it has been written once this sender is dropped.
    Flush(#[allow(dead_code, reason = "dropping it is the answer")] SyncSender<()>),
}

#[derive(Default)]
struct Counts {
    waiting: AtomicUsize,
    lost: Arc<AtomicU64>,
}

/// The near end of the queue.
#[derive(Clone)]
pub(super) struct LogWriter {
    queue: Sender<Message>,
    counts: Arc<Counts>,
}

impl LogWriter {
    /// Starts the writing thread.
    pub fn start(to: impl Write + Send + 'static) -> std::io::Result<Self> {
        // Its bound is `QUEUE`, counted in lines.
        let (queue, messages) = channel();
        let counts = Arc::new(Counts::default());
        let counter = counts.clone();
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_lines(&messages, to, &counter))?;
        Ok(Self { queue, counts })
    }

    /// Takes lines of the access log, as many as there is room for.
    pub fn access(&self, mut lines: Vec<AccessLine>, format: LogFormat) {
        lines.truncate(self.room_for(lines.len()));
        if !lines.is_empty() {
            self.send(lines.len(), Message::Access(lines, format));
        }
    }

    /// Waits until what was logged so far is written, at most for `deadline`.
    pub fn flush(&self, deadline: Duration) {
        let (done, wait) = sync_channel(0);
        if self.queue.send(Message::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(deadline);
        }
    }

    /// How many lines were dropped.
    pub fn lost(&self) -> Arc<AtomicU64> {
        self.counts.lost.clone()
    }

    /// Takes room in the queue; what there is none for is lost.
    fn room_for(&self, lines: usize) -> usize {
        let before = self.counts.waiting.fetch_add(lines, Ordering::Relaxed);
        let taken = lines.min(QUEUE.saturating_sub(before));
        self.give_back(lines - taken);
        taken
    }

    fn give_back(&self, lines: usize) {
        if lines > 0 {
            self.counts.waiting.fetch_sub(lines, Ordering::Relaxed);
            self.counts.lost.fetch_add(lines as u64, Ordering::Relaxed);
        }
    }

    fn send(&self, lines: usize, message: Message) {
        if self.queue.send(message).is_err() {
            self.give_back(lines);
        }
    }
}

impl LineSink for LogWriter {
    fn line(&self, line: String) {
        if self.room_for(1) == 1 {
            self.send(1, Message::Line(line));
        }
    }
}

fn write_lines(messages: &Receiver<Message>, to: impl Write, counts: &Counts) {
    let mut pen = Pen {
        to,
        text: String::with_capacity(WRITE + 4096),
        lines: 0,
        reported: 0,
        counts,
    };
    loop {
        let message = match messages.try_recv() {
            Ok(message) => message,
            Err(TryRecvError::Disconnected) => return pen.write(),
            Err(TryRecvError::Empty) => {
                // Whoever reads the log sees the last line at once; the next one is waited for.
                pen.write();
                match messages.recv() {
                    Ok(message) => message,
                    Err(_) => return,
                }
            }
        };
        match message {
            Message::Line(line) => pen.line(|text| text.push_str(&line)),
            Message::Access(lines, format) => {
                for line in lines {
                    pen.line(|text| line.render(format, text));
                }
            }
            Message::Flush(done) => {
                pen.write();
                drop(done);
            }
        }
    }
}

struct Pen<'a, W> {
    to: W,
    text: String,
    /// Lines in `text`.
    lines: usize,
    /// Of the lost ones.
    reported: u64,
    counts: &'a Counts,
}

impl<W: Write> Pen<'_, W> {
    fn line(&mut self, add: impl FnOnce(&mut String)) {
        add(&mut self.text);
        self.lines += 1;
        if self.text.len() >= WRITE {
            self.write();
        }
    }

    /// A log that cannot be written (closed pipe, full disk) has no better place to be reported.
    fn write(&mut self) {
        let _ = self.to.write_all(self.text.as_bytes());
        self.text.clear();
        self.counts.waiting.fetch_sub(self.lines, Ordering::Relaxed);
        self.lines = 0;
        let lost = self.counts.lost.load(Ordering::Relaxed);
        if lost != self.reported {
            let _ = writeln!(
                self.to,
                "[{} log lines lost: the log is not read fast enough]",
                lost - self.reported
            );
            self.reported = lost;
        }
        let _ = self.to.flush();
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
        assert_eq!(writer.lost().load(Ordering::Relaxed), 100);
        let more = (0..7).map(|_| AccessLine::default()).collect();
        writer.access(more, LogFormat::Text);
        assert_eq!(writer.lost().load(Ordering::Relaxed), 107);
        drop(closed);
        writer.flush(Duration::from_secs(10));
        writer.line("last\n".to_owned());
        writer.flush(Duration::from_secs(10));
        let written = String::from_utf8(slow.written.lock().unwrap().clone()).unwrap();
        assert_eq!(written.matches("x\n").count(), QUEUE);
        assert!(written.contains("[107 log lines lost"));
        assert!(written.ends_with("last\n"));
    }

    #[test]
    fn lines_keep_their_order_whoever_renders_them() {
        let slow = Slow::default();
        let writer = LogWriter::start(slow.clone()).unwrap();
        writer.line("first\n".to_owned());
        writer.access(vec![AccessLine::default()], LogFormat::Text);
        writer.line("third\n".to_owned());
        writer.flush(Duration::from_secs(10));
        let written = String::from_utf8(slow.written.lock().unwrap().clone()).unwrap();
        let lines: Vec<_> = written.lines().collect();
        assert!(lines[0] == "first" && lines[2] == "third", "{written}");
        assert!(lines[1].contains("connection complete"), "{written}");
    }
}
