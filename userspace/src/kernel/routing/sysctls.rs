//! The network sysctls of a pod that the agent changes while the pod is enrolled, and changes back. To be called on a thread in
//! the pod's namespace, by `routing`.

use std::{fs, io};

use super::{RedirectMode, RoutingSettings};

/// Data in a SYN is accepted (`TFO_SERVER_ENABLE`).
const FAST_OPEN_SERVER: u32 = 2;

const SYSCTLS: [(&str, Change); 4] = [
    // The application's end of a connection takes the mark of the agent's SYN, so that its answers come back.
    ("/proc/sys/net/ipv4/tcp_fwmark_accept", Change::On),
    // So does a reset for a port on which nobody listens.
    ("/proc/sys/net/ipv4/fwmark_reflect", Change::On),
    ("/proc/sys/net/ipv6/fwmark_reflect", Change::OnWithIpv6),
    // An application would be given what a SYN carries before anybody knows whose it is.
    ("/proc/sys/net/ipv4/tcp_fastopen", Change::NoFastOpen),
];

/// How many of them are changed, from the first on.
pub(super) fn number(redirect: RedirectMode) -> usize {
    match redirect {
        RedirectMode::Ebpf => SYSCTLS.len(),
        // Only what open connections need.
        RedirectMode::Iptables => 1,
    }
}

#[derive(Clone, Copy)]
enum Change {
    On,
    /// The same, where the kernel has IPv6.
    OnWithIpv6,
    NoFastOpen,
}

/// Changes those that are needed; pushes what was there, in order, empty where nothing was changed.
pub(super) fn set(settings: RoutingSettings, previous: &mut Vec<String>) -> Result<(), String> {
    for (path, change) in SYSCTLS.into_iter().take(number(settings.redirect)) {
        let old = match (fs::read_to_string(path), change) {
            (Ok(old), _) => old.trim().to_owned(),
            (Err(error), Change::OnWithIpv6) if error.kind() == io::ErrorKind::NotFound => {
                previous.push(String::new());
                continue;
            }
            (Err(error), _) => return Err(format!("read {path}: {error}")),
        };
        let new = match change {
            Change::On | Change::OnWithIpv6 => Some("1".to_owned()),
            Change::NoFastOpen if settings.keep_fast_open => None,
            Change::NoFastOpen => without_server(&old)
                .ok_or_else(|| format!("read {path}: `{old}` is not a number of bits"))?,
        };
        if let Some(new) = new {
            fs::write(path, new).map_err(|error| format!("write {path}: {error}"))?;
            previous.push(old);
        } else {
            previous.push(String::new());
        }
    }
    Ok(())
}

/// Changes back whatever can be.
pub(super) fn restore(previous: &[String]) -> Result<(), String> {
    restore_those(previous, |_| true)
}

/// Changes back what only new connections depend on.
pub(super) fn restore_for_new(previous: &[String]) -> Result<(), String> {
    restore_those(previous, |change| matches!(change, Change::NoFastOpen))
}

fn restore_those(previous: &[String], which: impl Fn(Change) -> bool) -> Result<(), String> {
    let mut result = Ok(());
    for ((path, change), value) in SYSCTLS.iter().zip(previous) {
        if value.is_empty() || !which(*change) {
            continue;
        }
        if let Err(error) = fs::write(path, value) {
            result = Err(format!("restore {path}: {error}"));
        }
    }
    result
}

/// The value without the server's bit; the inner `None` when it has none.
fn without_server(value: &str) -> Option<Option<String>> {
    let bits: u32 = value.parse().ok()?;
    let off = bits & !FAST_OPEN_SERVER;
    Some((off != bits).then(|| off.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_server_s_bit_of_fast_open_is_cleared() {
        for (old, new) in [("3", "1"), ("1027", "1025"), ("2", "0")] {
            assert_eq!(without_server(old), Some(Some(new.to_owned())), "{old}");
        }
        for old in ["0", "1", "4"] {
            assert_eq!(without_server(old), Some(None), "{old}");
        }
        for old in ["", "x", "-1", "0x2"] {
            assert_eq!(without_server(old), None, "{old}");
        }
    }
}
