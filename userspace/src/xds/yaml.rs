//! Reading YAML that comes from outside: bounded, and with errors that say where in the file.
//!
//! Used by the mesh file and the annotations file.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_saphyr::{Error, MessageFormatter, UserMessageFormatter};

/// The most scalars, lists and maps in a file. A workload takes some 40.
const MAX_NODES: usize = 6_000_000;

/// The longest error, in characters.
const MAX_MESSAGE: usize = 1000;

/// A text that is not what it should be.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}:{line}:{column}: {message}", path.display())]
pub struct YamlError {
    /// The file.
    pub path: PathBuf,
    /// From 1; 0 where the parser cannot tell.
    pub line: u64,
    /// From 1, in characters; 0 where the parser cannot tell.
    pub column: u64,
    /// What is wrong and what is expected.
    pub message: String,
}

/// Reads what is in a file.
///
/// # Errors
/// It is not UTF-8, not YAML, too deep or too much, or not a `T`.
pub fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, YamlError> {
    let text =
        std::str::from_utf8(bytes).map_err(|error| not_text(path, bytes, error.valid_up_to()))?;
    serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
        let error = error.without_snippet();
        let location = error.location();
        YamlError {
            path: path.to_owned(),
            line: location.map_or(0, |location| location.line()),
            column: location.map_or(0, |location| location.column()),
            message: explain(error),
        }
    })
}

fn not_text(path: &Path, bytes: &[u8], valid_up_to: usize) -> YamlError {
    let valid = String::from_utf8_lossy(bytes.get(..valid_up_to).unwrap_or_default());
    let last_line = valid.rsplit('\n').next().unwrap_or_default();
    YamlError {
        path: path.to_owned(),
        line: valid.matches('\n').count() as u64 + 1,
        column: last_line.chars().count() as u64 + 1,
        message: "not UTF-8; save the file as UTF-8".to_owned(),
    }
}

/// The parser's own words, except where the way out is not in them.
fn explain(error: &Error) -> String {
    let message = match error {
        Error::AliasError { error, .. } => return explain(error),
        Error::UnknownAnchor { .. } => {
            "an alias without an anchor; put a text that begins with `*` in quotes".to_owned()
        }
        Error::DuplicateMappingKey { key: Some(key), .. } => {
            format!("{key} occurs twice here; remove one")
        }
        other => UserMessageFormatter.format_message(other).into_owned(),
    };
    // What is quoted from the file must not write its own lines into a log or colours onto a terminal.
    message
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .take(MAX_MESSAGE)
        .collect()
}

fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: MAX_NODES * 2,
            max_nodes: MAX_NODES,
            max_documents: 1,
            max_depth: 32,
            // Anchors are for people; a file with thousands of them comes from no person.
            max_anchors: 1_000,
            max_aliases: 10_000,
            max_recorded_anchor_events: 100_000,
            max_recorded_anchor_bytes: 1 << 20,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
            max_replay_stack_depth: 8,
        },
        strict_booleans: true,
    }
}
