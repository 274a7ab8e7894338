//! The log: everything traced, as lines on standard output, filtered as RUST_LOG says. One stream for access log and
//! diagnostics, as container runtimes expect it; standard error is left to what fails before logging starts.
//! Set up once by `culvert node`. Spans are not shown.

use std::fmt::Debug;
use std::time::{Duration, SystemTime};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, reload};

use super::access_log::AccessLog;
use super::line::{Line, Value};
use super::log_levels::LogLevels;
use super::writer::{LineSink, LogWriter};
use crate::config::{LogFilter, LogFormat};

/// How long the end of the process waits for the log.
const FLUSH: Duration = Duration::from_secs(1);

/// What can go wrong in setting up the log.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// A filter that is not one.
    #[error(
        "the log filter `{0}` is not valid: expected directives such as `info` or `warn,access=info`"
    )]
    Filter(String),
    /// No thread for it.
    #[error("cannot start the log's thread: {0}; raise the limit on processes")]
    Thread(std::io::Error),
    /// Set up twice.
    #[error("logging is already set up in this process")]
    Twice,
}

/// Keeps the log going; when dropped, what was logged is written out.
#[must_use = "the log's last lines are written when this is dropped"]
pub struct LogGuard {
    writer: LogWriter,
    format: LogFormat,
    levels: LogLevels,
}

impl LogGuard {
    /// What is logged, to be changed.
    pub fn levels(&self) -> LogLevels {
        self.levels.clone()
    }

    /// Where connections are logged.
    pub fn access_log(&self) -> AccessLog {
        AccessLog::new(self.writer.clone(), self.format)
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.writer.flush(FLUSH);
    }
}

/// Starts logging to standard output.
///
/// # Errors
/// See [`LoggingError`].
pub fn start(filter: &LogFilter, format: LogFormat) -> Result<LogGuard, LoggingError> {
    let writer = LogWriter::start(std::io::stdout()).map_err(LoggingError::Thread)?;
    let (subscriber, levels) = subscriber(filter, format, writer.clone())?;
    subscriber.try_init().map_err(|_| LoggingError::Twice)?;
    Ok(LogGuard {
        writer,
        format,
        levels,
    })
}

/// The same to any sink.
pub(super) fn subscriber(
    filter: &LogFilter,
    format: LogFormat,
    sink: impl LineSink,
) -> Result<(impl Subscriber + Send + Sync + 'static, LogLevels), LoggingError> {
    let invalid = |_| LoggingError::Filter(filter.as_str().to_owned());
    let directives = EnvFilter::builder()
        .parse(filter.as_str())
        .map_err(invalid)?;
    let (directives, handle) = reload::Layer::new(directives);
    let subscriber = tracing_subscriber::registry()
        .with(directives)
        .with(Lines { format, sink });
    Ok((subscriber, LogLevels::new(handle, filter.clone())))
}

/// Turns events into lines.
struct Lines<S> {
    format: LogFormat,
    sink: S,
}

impl<S: LineSink, C: Subscriber> Layer<C> for Lines<S> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, C>) {
        let metadata = event.metadata();
        let mut line = Line {
            time: SystemTime::now(),
            level: level(*metadata.level()),
            target: metadata.target().to_owned(),
            message: String::new(),
            fields: Vec::with_capacity(24),
        };
        event.record(&mut Fields(&mut line));
        self.sink.line(line.render(self.format));
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

struct Fields<'a>(&'a mut Line);

impl Fields<'_> {
    fn add(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::Text(text) | Value::Plain(text)) => self.0.message = text,
            // Events of the `log` crate carry their target as a field.
            ("log.target", Value::Text(text) | Value::Plain(text)) => self.0.target = text,
            ("log.module_path" | "log.file" | "log.line", _) => {}
            (name, value) => self.0.fields.push((name, value)),
        }
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field, Value::Plain(format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, Value::Text(value.to_owned()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, Value::Literal(value.to_string()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, Value::Literal(value.to_string()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, Value::Literal(value.to_string()));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.add(field, Value::Text(value.to_string()));
    }
}

/// A sink for tests, which keeps the lines.
#[cfg(test)]
#[derive(Clone, Default)]
pub(super) struct Kept(pub std::sync::Arc<std::sync::Mutex<Vec<String>>>);

#[cfg(test)]
impl LineSink for Kept {
    fn line(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(filter: &str, format: LogFormat, log: impl FnOnce()) -> Vec<String> {
        let kept = Kept::default();
        let filter = LogFilter::parse(filter).unwrap();
        let (subscriber, _) = subscriber(&filter, format, kept.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, log);
        let lines = kept.0.lock().unwrap();
        lines.clone()
    }

    #[test]
    fn messages_with_hostile_values_stay_one_line() {
        let hostile = "x\n2026\tinfo\taccess\tfake";
        let lines = logged("info", LogFormat::Text, || {
            tracing::warn!(peer = hostile, odd = %hostile, ratio = 0.5, "bad: {hostile}");
        });
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].matches('\n').count(), 1);
        assert!(lines[0].contains("\twarn\t"));
        assert!(lines[0].contains("peer=\"x\\n2026\\tinfo"));
        assert!(lines[0].contains("odd=\"x\\n2026"));
        assert!(lines[0].contains("ratio=0.5"));
    }

    #[test]
    fn the_filter_decides() {
        let log = || {
            tracing::info!(target: "access", "shown");
            tracing::info!(target: "other", "hidden");
        };
        let lines = logged("warn,access=info", LogFormat::Text, log);
        assert_eq!(lines.len(), 1);
        assert!(lines[0].contains("shown"));
    }
}
