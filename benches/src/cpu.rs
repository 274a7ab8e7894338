//! Processor time: of a node's cgroup (its pods and its agent), and of the whole machine as a check on it. What interrupts
//! do is charged to whoever they interrupt, which is mostly the measured programs, and to nobody where they interrupt
//! idleness: the machine's figure has that as well, and everything else that ran.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_harness::Node;

/// What had been used at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    node: Duration,
    agent: Duration,
    machine: Duration,
}

/// Seconds between two moments.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// Pods and agent of the node.
    pub node: f64,
    pub agent: f64,
    pub machine: f64,
}

impl Used {
    pub fn now(node: &Node) -> Result<Self> {
        Ok(Self {
            node: of_cgroup(node.cgroup().path())?,
            agent: of_cgroup(&node.cgroup().path().join("agent"))?,
            machine: of_machine()?,
        })
    }

    pub fn since(self, earlier: Self) -> Spent {
        let between = |now: Duration, then: Duration| now.saturating_sub(then).as_secs_f64();
        Spent {
            node: between(self.node, earlier.node),
            agent: between(self.agent, earlier.agent),
            machine: between(self.machine, earlier.machine),
        }
    }
}

fn of_cgroup(cgroup: &Path) -> Result<Duration> {
    let path = cgroup.join("cpu.stat");
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let used = text.lines().find_map(|line| {
        let number = line.strip_prefix("usage_usec ")?;
        number.parse().ok().map(Duration::from_micros)
    });
    used.with_context(|| format!("{} has no usage_usec", path.display()))
}

/// All but idle and stolen time, of all processors.
fn of_machine() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    busy_ticks(&text)
        // The unit of /proc/stat is a hundredth of a second on every architecture we build for.
        .map(|ticks| Duration::from_millis(ticks.saturating_mul(10)))
        .context("/proc/stat: the first line is not `cpu` with its ten numbers")
}

/// user nice system idle iowait irq softirq steal guest guest_nice; guests are in user already.
fn busy_ticks(stat: &str) -> Option<u64> {
    let numbers = stat.lines().next()?.strip_prefix("cpu ")?;
    let numbers: Option<Vec<u64>> = numbers.split_whitespace().map(|n| n.parse().ok()).collect();
    match numbers?.as_slice() {
        [user, nice, system, _idle, _iowait, irq, softirq, ..] => Some(
            [user, nice, system, irq, softirq]
                .into_iter()
                .fold(0, |sum: u64, n| sum.saturating_add(*n)),
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_stolen_time_is_not_used() {
        let stat = "cpu  100 1 20 5000 70 3 6 900 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(busy_ticks(stat), Some(130));
        assert_eq!(busy_ticks("cpu 1 2"), None);
        assert_eq!(busy_ticks("intr 7"), None);
    }
}
