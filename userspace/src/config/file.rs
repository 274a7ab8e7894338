//! The configuration file: a flat YAML mapping of settings, read into keys and texts with their positions.
//! What a text means is decided elsewhere, so that one pass reports every error. Bounded in size and in YAML tricks.

use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use serde_saphyr::Spanned;

use super::error::{ConfigError, Origin};

/// A configuration file is a page or two; more than this is a mistake.
const MAX_BYTES: u64 = 1 << 20;

/// One `key: value` of the file.
#[derive(Debug)]
pub(super) struct Entry {
    pub key: Spanned<String>,
    pub value: Spanned<String>,
}

/// Reads and parses the file.
pub(super) fn read(path: &Path) -> Result<Vec<Entry>, ConfigError> {
    let unreadable = |reason: String| ConfigError::Unreadable {
        path: path.to_owned(),
        reason,
    };
    let text = read_bounded(path).map_err(unreadable)?;
    parse(path, &text)
}

/// Parses the text of the file; `path` is for messages.
pub(super) fn parse(path: &Path, text: &str) -> Result<Vec<Entry>, ConfigError> {
    // An empty document, or one of comments only, sets nothing.
    let says_something = |line: &str| !line.trim().is_empty() && !line.trim().starts_with('#');
    if !text.lines().any(says_something) {
        return Ok(Vec::new());
    }
    serde_saphyr::from_str::<Entries>(text)
        .map(|entries| entries.0)
        .map_err(|error| {
            let error = error.without_snippet();
            let (line, column) = error
                .location()
                .map_or((0, 0), |at| (at.line(), at.column()));
            ConfigError::Malformed {
                origin: Origin::File {
                    path: path.to_owned(),
                    line,
                    column,
                },
                reason: one_line(&error.to_string()),
            }
        })
}

fn read_bounded(path: &Path) -> Result<String, String> {
    // Asked before opening: opening a FIFO would wait for a writer.
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("not a regular file".to_owned());
    }
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("larger than {MAX_BYTES} bytes"));
    }
    String::from_utf8(bytes).map_err(|_| "not UTF-8 text".to_owned())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

struct Entries(Vec<Entry>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;

        impl<'de> Visitor<'de> for Pairs {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`setting: value` pairs")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some((key, value)) = map.next_entry()? {
                    entries.push(Entry { key, value });
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Pairs)
    }
}
