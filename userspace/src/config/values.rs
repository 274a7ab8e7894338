//! From text to the types of the settings. Pure; every parser refuses what it does not fully understand.
//! Called by the configuration for values of all three layers, so that a value means the same in each.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::control_channel::TokenSource;
use crate::mesh::ShortCircuitMode;

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Tab-separated columns, then `key=value`.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// A log filter in the syntax of `RUST_LOG`, known to be valid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LogFilter(String);

impl LogFilter {
    /// Accepts directives such as `info` or `warn,access=info`.
    pub fn parse(text: &str) -> Option<Self> {
        let valid =
            !text.trim().is_empty() && tracing_subscriber::EnvFilter::builder().parse(text).is_ok();
        valid.then(|| Self(text.to_owned()))
    }

    /// The directives.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The largest token, in bytes.
const MOST_TOKEN: u64 = 64 << 10;

/// The token for istiod: a file that is read for every call, or the token itself. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub enum AuthToken {
    /// A file with the token.
    File(PathBuf),
    /// A file that may not be there: then no token is shown.
    Usual(PathBuf),
    /// The token.
    Inline(String),
}

impl AuthToken {
    /// What is shown in place of a token.
    pub const SHOWN: &'static str = "<set>";
    /// Where Istio's DaemonSets mount it.
    pub const USUAL: &'static str = "./var/run/secrets/tokens/istio-token";

    /// A text beginning with `/`, `./` or `../` is a path; a token in JWT form never does.
    pub fn parse(text: &str) -> Option<Self> {
        let is_path = ["/", "./", "../"]
            .iter()
            .any(|start| text.starts_with(start));
        if text == Self::SHOWN || text.chars().any(char::is_control) || text.is_empty() {
            None
        } else if text == Self::USUAL {
            Some(Self::Usual(PathBuf::from(text)))
        } else if is_path {
            Some(Self::File(PathBuf::from(text)))
        } else {
            Some(Self::Inline(text.to_owned()))
        }
    }
}

impl TokenSource for AuthToken {
    fn token(&self) -> Result<Option<String>, String> {
        let (path, needed) = match self {
            Self::Inline(token) => return Ok(Some(token.clone())),
            Self::File(path) => (path, true),
            Self::Usual(path) => (path, false),
        };
        let failed = |error: std::io::Error| format!("{}: {error}", path.display());
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(error) if !needed && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(failed(error)),
        };
        let mut text = String::new();
        file.take(MOST_TOKEN)
            .read_to_string(&mut text)
            .map_err(failed)?;
        let token = text.trim();
        if token.is_empty() || token.chars().any(char::is_control) {
            return Err(format!("{} holds no token", path.display()));
        }
        Ok(Some(token.to_owned()))
    }
}

impl std::fmt::Debug for AuthToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) | Self::Usual(path) => write!(f, "File({})", path.display()),
            Self::Inline(_) => f.write_str(Self::SHOWN),
        }
    }
}

impl Serialize for AuthToken {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::File(path) | Self::Usual(path) => path.serialize(serializer),
            Self::Inline(_) => serializer.serialize_str(Self::SHOWN),
        }
    }
}

/// A name or address that a certificate can have.
pub fn host(text: &str) -> Option<String> {
    let name = rustls::pki_types::ServerName::try_from(text).ok()?;
    Some(name.to_str().into_owned())
}

/// A duration: `86400s`, `24h`, `1h30m`, `500ms`, or a plain number of seconds.
pub fn duration(text: &str) -> Option<Duration> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().map(Duration::from_secs);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at_checked(digits)?;
        let letters = after.bytes().take_while(u8::is_ascii_lowercase).count();
        let (unit, after) = after.split_at_checked(letters)?;
        let number: u64 = number.parse().ok()?;
        let part = match unit {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number.checked_mul(60)?),
            "h" => Duration::from_secs(number.checked_mul(3600)?),
            "d" => Duration::from_secs(number.checked_mul(86_400)?),
            _ => return None,
        };
        total = total.checked_add(part)?;
        rest = after;
    }
    (!text.is_empty()).then_some(total)
}

/// A duration as it is printed and read back: seconds, or milliseconds where it has a fraction.
pub fn show_duration(value: &Duration) -> String {
    if value.subsec_nanos() == 0 {
        format!("{}s", value.as_secs())
    } else {
        format!("{}ms", value.as_millis())
    }
}

/// For serde's `serialize_with`.
pub(super) fn serialize_duration<S: Serializer>(
    value: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&show_duration(value))
}

/// A duration between two others, both included.
pub(super) fn duration_within(text: &str, least: u64, most: u64) -> Option<Duration> {
    let range = Duration::from_secs(least)..=Duration::from_secs(most);
    duration(text).filter(|value| range.contains(value))
}

/// A whole number, decimal or hexadecimal with `0x`, within a range.
pub(super) fn number_within(text: &str, least: u32, most: u32) -> Option<u32> {
    let value = match text.strip_prefix("0x") {
        Some(digits) if !digits.starts_with('+') => u32::from_str_radix(digits, 16).ok()?,
        Some(_) => return None,
        None if text.starts_with('+') => return None,
        None => text.parse().ok()?,
    };
    (least..=most).contains(&value).then_some(value)
}

/// `true` or `false`.
pub(super) fn boolean(text: &str) -> Option<bool> {
    text.parse().ok()
}

/// `text` or `json`.
pub(super) fn log_format(text: &str) -> Option<LogFormat> {
    match text {
        "text" | "plain" => Some(LogFormat::Text),
        "json" => Some(LogFormat::Json),
        _ => None,
    }
}

/// `off`, `auto` or `on`.
pub(super) fn short_circuit(text: &str) -> Option<ShortCircuitMode> {
    text.parse().ok()
}

/// For serde's `serialize_with`.
pub(super) fn serialize_short_circuit<S: Serializer>(
    mode: &ShortCircuitMode,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(mode)
}

/// A text that says something.
pub(super) fn text(text: &str) -> Option<String> {
    (!text.trim().is_empty()).then(|| text.to_owned())
}

/// A path; relative ones are allowed, they are relative to the working directory.
pub(super) fn path(text: &str) -> Option<PathBuf> {
    (!text.is_empty() && !text.contains('\0')).then(|| PathBuf::from(text))
}

/// A path from the root.
pub(super) fn absolute_path(text: &str) -> Option<PathBuf> {
    path(text).filter(|path| Path::new(path).is_absolute())
}

/// A name as Kubernetes gives them: letters, digits, `.`, `-`, `_`, at most 253.
pub(super) fn name(text: &str) -> Option<String> {
    let fits = (1..=253).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    fits.then(|| text.to_owned())
}

/// A name, or nothing.
pub(super) fn optional_name(text: &str) -> Option<String> {
    if text.is_empty() {
        Some(String::new())
    } else {
        name(text)
    }
}

/// A SPIFFE trust domain or DNS name: lower case, digits, `.`, `-`, `_`.
pub(super) fn domain(text: &str) -> Option<String> {
    name(text).filter(|domain| {
        !domain.bytes().any(|byte| byte.is_ascii_uppercase())
            && !domain.starts_with('.')
            && !domain.ends_with('.')
    })
}

/// An IP address.
pub(super) fn ip(text: &str) -> Option<IpAddr> {
    text.parse().ok()
}

/// `ip:port`.
pub(super) fn address(text: &str) -> Option<SocketAddr> {
    text.parse().ok()
}

/// `ip:port` that no other machine can reach.
pub(super) fn loopback_address(text: &str) -> Option<SocketAddr> {
    address(text).filter(|address| address.ip().is_loopback())
}
