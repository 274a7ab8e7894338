//! How large agents and their tables are, and what they complained of.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use culvert_abi::{Address, Endpoint, Pod as PodEntry, Verdict, VerdictKey};
use culvert_harness::{Agent, Node, log::Log};
use serde_json::{Value, json};

use crate::kernel_tables::table;

/// By how much an agent's memory may be larger than in the middle, in KiB. Freed memory comes back in pieces.
const MORE_MEMORY: u64 = 16 << 10;
/// The same of descriptors: tunnels come and go with the certificates.
const MORE_DESCRIPTORS: u64 = 32;
/// The same of threads: those for what takes a while end when there was nothing to do for some seconds.
const MORE_THREADS: u64 = 8;
/// The same of verdicts: those of pods that have gone are removed in time.
const MORE_VERDICTS: u64 = 256;

/// One agent and its kernel part.
#[derive(Clone, Debug)]
struct Size {
    memory_kib: u64,
    descriptors: u64,
    threads: u64,
    pods: u64,
    endpoints: u64,
    verdicts: u64,
}

/// Both agents.
#[derive(Clone, Debug)]
pub struct Health(Vec<Size>);

impl Size {
    fn of(agent: &Agent, node: &Node) -> Result<Self> {
        let process = format!("/proc/{}", agent.process().pid());
        let status = std::fs::read_to_string(format!("{process}/status"))?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let line = line.with_context(|| format!("{name} in {process}/status"))?;
            let number = line.split_whitespace().next().context("a number")?;
            Ok(number.parse()?)
        };
        let count = |number: usize| number as u64;
        Ok(Self {
            memory_kib: field("VmRSS:")?,
            descriptors: count(std::fs::read_dir(format!("{process}/fd"))?.count()),
            threads: field("Threads:")?,
            pods: count(table::<u64, PodEntry>(node, "PODS")?.keys().count()),
            endpoints: count(
                table::<Address, Endpoint>(node, "ENDPOINTS")?
                    .keys()
                    .count(),
            ),
            verdicts: count(
                table::<VerdictKey, Verdict>(node, "VERDICTS")?
                    .keys()
                    .count(),
            ),
        })
    }

    fn to_json(&self) -> Value {
        json!({
            "memory_kib": self.memory_kib,
            "descriptors": self.descriptors,
            "threads": self.threads,
            "pods": self.pods,
            "endpoints": self.endpoints,
            "verdicts": self.verdicts,
        })
    }
}

impl Health {
    pub fn of(agents: [(&Agent, &Node); 2]) -> Result<Self> {
        let sizes = agents.map(|(agent, node)| Size::of(agent, node));
        Ok(Self(sizes.into_iter().collect::<Result<_>>()?))
    }

    pub fn to_json(&self) -> Value {
        self.0.iter().map(Size::to_json).collect()
    }

    /// What may not have grown has not.
    pub fn judge(&self, before: &Self) {
        for (now, then) in self.0.iter().zip(&before.0) {
            assert!(
                now.memory_kib <= then.memory_kib + MORE_MEMORY
                    && now.descriptors <= then.descriptors + MORE_DESCRIPTORS
                    && now.verdicts <= then.verdicts + MORE_VERDICTS
                    && now.threads <= then.threads + MORE_THREADS
                    && now.pods == then.pods
                    && now.endpoints == then.endpoints,
                "{then:?} became {now:?}"
            );
        }
    }
}

/// Lines of an agent's log that are no good news: errors and panics as they are, and how often which warning came.
pub fn complaints(log: &Log, errors: &mut Vec<String>, warnings: &mut BTreeMap<String, u64>) {
    for line in log.lines() {
        let mut words = line.text.splitn(4, ' ');
        let (level, message) = (words.nth(1), words.nth(1).unwrap_or_default());
        if level == Some("error") || line.text.contains("panicked") {
            errors.push(line.text);
        } else if level == Some("warn") {
            // Without the fields.
            let words = message.split(' ').take_while(|word| !word.contains('='));
            let words = words.collect::<Vec<_>>().join(" ");
            *warnings.entry(words).or_default() += 1;
        }
    }
}
