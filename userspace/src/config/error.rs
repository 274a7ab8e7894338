//! What can be wrong with a configuration. Every error names the setting, its value, where it came from and the mend;
//! all of them are reported together, so that one run shows all there is to fix.

use std::fmt;
use std::path::PathBuf;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The configuration file; line and column count from 1, 0 where the parser does not know.
    File {
        /// The file.
        path: PathBuf,
        /// Line.
        line: u64,
        /// Column, in characters.
        column: u64,
    },
    /// An environment variable.
    Variable(&'static str),
    /// A command-line flag, without its dashes.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Variable(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A value that the setting does not take.
    #[error("{key}: {value} ({origin}) is not valid: expected {expected}")]
    Value {
        /// The setting.
        key: &'static str,
        /// The value, quoted and shortened; `<secret>` for secrets.
        value: String,
        /// Where it came from.
        origin: Origin,
        /// What would be valid.
        expected: String,
    },
    /// A key in the file that is no setting.
    #[error("{key} ({origin}) is not a setting{}", nearest.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default())]
    UnknownKey {
        /// The key as written, quoted.
        key: String,
        /// Where it stands.
        origin: Origin,
        /// The closest setting, if one is close.
        nearest: Option<&'static str>,
    },
    /// An environment variable with bytes that are not Unicode.
    #[error("{key}: {origin} is not Unicode text: expected {expected}")]
    NotUnicode {
        /// The setting.
        key: &'static str,
        /// The variable.
        origin: Origin,
        /// What would be valid.
        expected: String,
    },
    /// A variable of a family, such as `XDS_HEADER_*`.
    #[error("environment variable {name} is not {expected}; mend or unset it")]
    Prefixed {
        /// The variable.
        name: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// Two settings of which there can be one.
    #[error("{one} and {other} are both set; unset {variable} or {other_variable}")]
    Contradiction {
        /// One of them.
        one: &'static str,
        /// Its variable.
        variable: &'static str,
        /// The other.
        other: &'static str,
        /// Its variable.
        other_variable: &'static str,
    },
    /// A setting that has no value and no default on this machine.
    #[error("{key} is not set and {reason}; {mend}")]
    Missing {
        /// The setting.
        key: &'static str,
        /// Why there is no default.
        reason: &'static str,
        /// What to do.
        mend: String,
    },
    /// The configuration file cannot be read.
    #[error("configuration file {}: {reason}; give a readable YAML file with --config, or leave the flag out", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The configuration file is not a YAML mapping of settings.
    #[error("{origin}: not a mapping of settings: {reason}")]
    Malformed {
        /// Where the parser stopped.
        origin: Origin,
        /// What it said.
        reason: String,
    },
    /// Test knobs were asked of a build that has none.
    #[error(
        "testKnobs ({origin}): this build has no test knobs; unset it, or build with `--features test-knobs` (never for production)"
    )]
    NoKnobs {
        /// Where they were asked for.
        origin: Origin,
    },
}

/// Everything that is wrong with a configuration; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [only] => write!(f, "configuration: {only}"),
            all => {
                write!(f, "configuration: {} errors", all.len())?;
                all.iter().try_for_each(|error| write!(f, "\n  - {error}"))
            }
        }
    }
}

impl std::error::Error for ConfigErrors {}

/// A value from outside as it may appear in a message: quoted, control characters escaped, at most 80 characters.
pub(super) fn quoted(value: &str) -> String {
    let value = without_credentials(value);
    let shown: String = value.chars().take(80).collect();
    let dots = if shown.len() < value.len() { "…" } else { "" };
    format!("{shown:?}{dots}")
}

/// An address may have been written with a user's name and password before the host.
fn without_credentials(value: &str) -> std::borrow::Cow<'_, str> {
    let start = value.find("://").map_or(0, |at| at + "://".len());
    let hidden = value.split_at_checked(start).and_then(|(scheme, rest)| {
        let authority = rest.split(['/', '?', '#']).next()?;
        let (credentials, _) = authority.rsplit_once('@')?;
        let host = rest.get(credentials.len()..)?;
        let is_address = !scheme.is_empty() || credentials.contains(':');
        is_address.then(|| format!("{scheme}<secret>{host}"))
    });
    hidden.map_or(value.into(), Into::into)
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn credentials_in_an_address_are_not_shown() {
        for (value, shown) in [
            (
                "https://me:secret@host:1/a@b",
                "https://<secret>@host:1/a@b",
            ),
            ("https://a@b@host", "https://<secret>@host"),
            ("https://host:1/@", "https://host:1/@"),
            ("mail@host", "mail@host"),
            ("me:secret@host:1", "<secret>@host:1"),
            ("https://é@", "https://<secret>@"),
        ] {
            assert_eq!(quoted(value), format!("{shown:?}"));
        }
    }
}
