//! The mesh from a YAML file, for development and tests: read here, laid out in `format`, followed by `watch`.
//!
//! Invariants: a file is taken whole or not at all; size, nesting and aliases are bounded; an error says where in the file.
//! Called by `node`, which runs the watcher, and by the command line to check a file.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use serde_saphyr::{Error as YamlError, MessageFormatter, UserMessageFormatter};

use crate::followed_file::{FileError, read_bounded};
use crate::mesh::{MeshError, MeshResources};

mod annotations;
mod format;
mod scalars;
mod watch;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod watch_tests;

pub use watch::{LocalFileStatus, LocalFileWatcher};

/// The largest file, in bytes. A workload takes some 600.
const MAX_BYTES: u64 = 64 << 20;

/// The most scalars, lists and maps in a file. A workload takes some 40.
const MAX_NODES: usize = 6_000_000;

/// A mesh file.
#[derive(Debug, Clone)]
pub struct LocalFile {
    path: PathBuf,
}

/// Why a mesh file is not in effect.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LocalFileError {
    /// The file cannot be read.
    #[error("cannot read the mesh file {}: {source}; check that it exists and that the agent may read it", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: Arc<io::Error>,
    },
    /// The file is too large.
    #[error("the mesh file {} is larger than {MAX_BYTES} bytes; serve a mesh of that size over xDS", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The text is not a mesh.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// From 1; 0 where the parser cannot tell.
        line: u64,
        /// From 1, in characters; 0 where the parser cannot tell.
        column: u64,
        /// What is wrong and what is expected.
        message: String,
    },
    /// There is nothing in it, as in a file that is just being written.
    #[error("the mesh file {} says nothing; for a mesh without workloads write `workloads: []`", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The resources contradict each other.
    #[error("{}: {source}", path.display())]
    Mesh {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        source: MeshError,
    },
    /// Changes of the file cannot be noticed.
    #[error(
        "cannot watch {} for changes: {errno}; check that the directory exists, and fs.inotify.max_user_instances and max_user_watches",
        directory.display()
    )]
    Watch {
        /// The directory of the file.
        directory: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// The reader itself failed.
    #[error("reading the mesh file {} ended unexpectedly: {reason}; report this with the file", path.display())]
    Internal {
        /// The file.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
}

impl LocalFile {
    /// Nothing is read yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the file. Blocks.
    ///
    /// # Errors
    /// It cannot be read, or is not a mesh in the documented format.
    pub fn load(&self) -> Result<MeshResources, LocalFileError> {
        let bytes = read_bounded(&self.path, MAX_BYTES).map_err(|error| self.refused(error))?;
        self.parse(&bytes)
    }

    /// What cannot be read, as an error of the mesh file.
    fn refused(&self, error: FileError) -> LocalFileError {
        let path = self.path.clone();
        match error {
            FileError::Read(source) => LocalFileError::Read { path, source },
            FileError::TooLarge(_) => LocalFileError::TooLarge { path },
            FileError::Watch { directory, errno } => LocalFileError::Watch { directory, errno },
            FileError::Internal(reason) => LocalFileError::Internal { path, reason },
        }
    }

    fn parse(&self, bytes: &[u8]) -> Result<MeshResources, LocalFileError> {
        let text = std::str::from_utf8(bytes)
            .map_err(|error| self.not_text(bytes, error.valid_up_to()))?;
        let document: format::Document = serde_saphyr::from_str_with_options(text, options())
            .map_err(|error| self.not_mesh(&error))?;
        document
            .into_resources()
            .ok_or_else(|| LocalFileError::Empty {
                path: self.path.clone(),
            })
    }

    fn not_text(&self, bytes: &[u8], valid_up_to: usize) -> LocalFileError {
        let valid = String::from_utf8_lossy(bytes.get(..valid_up_to).unwrap_or_default());
        let last_line = valid.rsplit('\n').next().unwrap_or_default();
        LocalFileError::Text {
            path: self.path.clone(),
            line: valid.matches('\n').count() as u64 + 1,
            column: last_line.chars().count() as u64 + 1,
            message: "not UTF-8; save the file as UTF-8".to_owned(),
        }
    }

    fn not_mesh(&self, error: &YamlError) -> LocalFileError {
        let error = error.without_snippet();
        let location = error.location();
        LocalFileError::Text {
            path: self.path.clone(),
            line: location.map_or(0, |location| location.line()),
            column: location.map_or(0, |location| location.column()),
            message: explain(error),
        }
    }
}

/// The parser's own words, except where the way out is not in them.
fn explain(error: &YamlError) -> String {
    let message = match error {
        YamlError::AliasError { error, .. } => return explain(error),
        YamlError::UnknownAnchor { .. } => {
            "an alias without an anchor; put a text that begins with `*` in quotes".to_owned()
        }
        YamlError::DuplicateMappingKey { key: Some(key), .. } => {
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

/// The longest error, in characters.
const MAX_MESSAGE: usize = 1000;

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
