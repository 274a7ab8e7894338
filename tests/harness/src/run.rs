//! The run id: names everything a fabric makes and tells who owns it.
//!
//! It is `<pid>_<start time>_<n>` in base 36: a process can be told dead although its pid is used again, and several
//! fabrics of one process differ. No dots (bpffs refuses them) and no dashes (they separate the parts of a name).

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

const NETNS: &str = "cv-";
const DIRECTORY: &str = "culvert-test-";

/// The id of one fabric.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId {
    pid: u64,
    start: u64,
    number: u64,
}

impl RunId {
    /// A new id, owned by this process.
    pub(crate) fn fresh() -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let pid = u64::from(std::process::id());
        let start = start_time(pid)
            .context("reading this process's start time from /proc: is /proc mounted?")?;
        Ok(Self {
            pid,
            start,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        })
    }

    /// What the names of all fabrics of one process begin with.
    pub(crate) fn owner_prefix(&self) -> String {
        format!("{}_{}_", base36(self.pid), base36(self.start))
    }

    /// Whether the process that owns this run still exists.
    pub fn owner_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start)
    }

    /// The name of a network namespace of this run.
    pub(crate) fn netns(&self, part: &str) -> String {
        format!("{NETNS}{self}-{part}")
    }

    /// The name of this run's directory, the same under cgroup root, bpffs and /run.
    pub fn directory(&self) -> String {
        format!("{DIRECTORY}{self}")
    }

    /// The run a network namespace belongs to, if its name is one of ours.
    pub(crate) fn of_netns(name: &str) -> Option<Self> {
        let (run, _) = name.strip_prefix(NETNS)?.split_once('-')?;
        Self::parse(run)
    }

    /// The run a directory belongs to, if its name is one of ours.
    pub(crate) fn of_directory(name: &str) -> Option<Self> {
        Self::parse(name.strip_prefix(DIRECTORY)?)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text
            .split('_')
            .map(|part| u64::from_str_radix(part, 36).ok());
        let run = Self {
            pid: parts.next()??,
            start: parts.next()??,
            number: parts.next()??,
        };
        // Only the spelling we write ourselves is ours to remove.
        (parts.next().is_none() && run.to_string() == text).then_some(run)
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}{}", self.owner_prefix(), base36(self.number))
    }
}

/// When a process began, in clock ticks since boot (proc(5), `/proc/pid/stat`, field 22); `None` if there is none.
fn start_time(pid: u64) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name, field 2, may hold spaces and parentheses: count from the last one.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

fn base36(mut number: u64) -> String {
    let mut digits = Vec::new();
    loop {
        digits.extend(char::from_digit((number % 36) as u32, 36));
        number /= 36;
        if number == 0 {
            return digits.into_iter().rev().collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_run() {
        let run = RunId::fresh().unwrap();
        assert_eq!(RunId::of_netns(&run.netns("n1-client")), Some(run.clone()));
        assert_eq!(RunId::of_directory(&run.directory()), Some(run.clone()));
        assert!(run.owner_alive());
    }

    #[test]
    fn foreign_names_are_not_ours() {
        for name in [
            "cv-",
            "cv-1_2-x",
            "cv-1_2_3_4-x",
            "cv-01_2_3-x",
            "cv-1_2_3",
            "eth-1_2_3-x",
            "cv-+1_2_3-x",
            "cv-A_2_3-x",
        ] {
            assert_eq!(RunId::of_netns(name), None, "{name}");
        }
    }

    #[test]
    fn reused_pid_is_not_the_owner() {
        let run = RunId::fresh().unwrap();
        assert!(
            !RunId {
                start: run.start + 1,
                ..run
            }
            .owner_alive()
        );
    }
}
