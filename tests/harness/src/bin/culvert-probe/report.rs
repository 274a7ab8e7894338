//! How every probe reports: one JSON object per line, flushed at once, and errors by the name a man page gives them.

use std::io::{self, ErrorKind, Write};

use nix::errno::Errno;
use serde_json::Value;

/// Prints one line. Nobody reading it any more ends the program.
pub fn line(value: &Value) {
    let mut out = io::stdout().lock();
    if writeln!(out, "{value}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// `ECONNREFUSED` and the like; `TIMEOUT` for a deadline of ours, `EOF` for an early end.
pub fn name(error: &io::Error) -> String {
    match (error.kind(), error.raw_os_error()) {
        (ErrorKind::WouldBlock, _) | (ErrorKind::TimedOut, None) => "TIMEOUT".to_owned(),
        (ErrorKind::UnexpectedEof, _) => "EOF".to_owned(),
        (_, Some(number)) => format!("{:?}", Errno::from_raw(number)),
        (kind, None) => kind.to_string(),
    }
}

/// `ok`, or the error's name.
pub fn outcome<T>(result: &io::Result<T>) -> String {
    result.as_ref().map_or_else(name, |_| "ok".to_owned())
}

/// Bytes as lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
