//! What is logged, changed while the agent runs, in the words that ztunnel's `/logging` takes.
//!
//! Invariants: a change is taken whole or not at all; what is in force is never longer than [`MOST`]. Made by `logging`, asked by `node`
//! for `admin::http`.

use tracing_subscriber::reload::Handle;
use tracing_subscriber::{EnvFilter, Registry};

use crate::config::LogFilter;

/// Bytes of the directives in force.
const MOST: usize = 4096;
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// The directives in force. Cheap to clone.
#[derive(Clone)]
pub struct LogLevels {
    handle: Handle<EnvFilter, Registry>,
    configured: LogFilter,
}

/// Why levels stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LevelError {
    /// Not a level, nor a module with one.
    #[error(
        "{0:?} is not a level: expected error, warn, info, debug, trace or off, or module:level, several separated by commas"
    )]
    Directive(String),
    /// More than anybody needs.
    #[error("there would be more than {MOST} bytes of directives; send reset first")]
    TooMuch,
    /// The log has ended.
    #[error("the log is not there any more")]
    Gone,
}

impl LogLevels {
    pub(super) fn new(handle: Handle<EnvFilter, Registry>, configured: LogFilter) -> Self {
        Self { handle, configured }
    }

    /// The directives in force, such as `info` or `warn,access=info`.
    pub fn current(&self) -> String {
        self.handle
            .with_current(ToString::to_string)
            .unwrap_or_default()
    }

    /// Adds `levels` to what is in force or, with `reset`, to what the configuration says, and returns what is in force then.
    ///
    /// # Errors
    /// Nothing was changed then.
    pub fn change(&self, levels: &str, reset: bool) -> Result<String, LevelError> {
        let mut all = match reset {
            true => self.configured.as_str().to_owned(),
            false => self.current(),
        };
        for word in levels.split(',').map(str::trim) {
            if !word.is_empty() {
                all.push(',');
                all.push_str(&directive(word)?);
            }
        }
        if all.len() > MOST {
            return Err(LevelError::TooMuch);
        }
        let filter = EnvFilter::builder().parse(&all);
        let filter = filter.map_err(|_| LevelError::Directive(shown(levels)))?;
        self.handle.reload(filter).map_err(|_| LevelError::Gone)?;
        Ok(self.current())
    }
}

/// `debug`, `module:debug` or `module=debug`, as the filter takes it.
fn directive(word: &str) -> Result<String, LevelError> {
    let wrong = || LevelError::Directive(shown(word));
    let (module, level) = match word.rsplit_once(['=', ':']) {
        Some((module, level)) => (Some(module), level),
        None => (None, word),
    };
    let level = level.to_ascii_lowercase();
    if !LEVELS.contains(&&*level) {
        return Err(wrong());
    }
    let Some(module) = module else {
        return Ok(level);
    };
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_-:".contains(c);
    if module.is_empty() || module.ends_with(':') || !module.chars().all(is_name) {
        return Err(wrong());
    }
    Ok(format!("{module}={level}"))
}

fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    fn levels(configured: &str) -> (LogLevels, impl tracing::Subscriber) {
        let filter = EnvFilter::builder().parse(configured).unwrap();
        let (layer, handle) = tracing_subscriber::reload::Layer::new(filter);
        let configured = LogFilter::parse(configured).unwrap();
        let subscriber = tracing_subscriber::registry().with(layer);
        (LogLevels::new(handle, configured), subscriber)
    }

    #[test]
    fn levels_are_added_and_reset() {
        let (levels, _subscriber) = levels("info");
        assert_eq!(levels.current(), "info");
        assert_eq!(levels.change("DEBUG", false).unwrap(), "debug");
        let both = levels
            .change("culvert::xds:trace,access=off", false)
            .unwrap();
        for part in ["culvert::xds=trace", "access=off", "debug"] {
            assert!(both.split(',').any(|one| one == part), "{both}");
        }
        assert_eq!(levels.change("", false).unwrap(), both);
        assert_eq!(levels.change("", true).unwrap(), "info");
    }

    #[test]
    fn what_is_no_level_changes_nothing() {
        let (levels, _subscriber) = levels("warn");
        for wrong in [
            "loud",
            "xds:",
            ":debug",
            "a::debug",
            "info,loud",
            "[span{field=x}]=debug",
            "a b=info",
            "=",
        ] {
            let refused = levels.change(wrong, false);
            assert!(matches!(refused, Err(LevelError::Directive(_))), "{wrong}");
        }
        let many: String = (0..1000).map(|at| format!("m{at}:info,")).collect();
        assert_eq!(levels.change(&many, false), Err(LevelError::TooMuch));
        assert_eq!(levels.current(), "warn");
    }
}
