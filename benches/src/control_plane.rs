//! What a large mesh costs the agent: a real one takes 100,000 workloads over delta xDS, then single changes.
//!
//! Times are from a push to its acknowledgement, which the agent sends when the push is in force: transfer, TLS and decoding are in them.
//! Then requests go through the same agent while nothing changes, while one change follows the other, and while all is pushed anew.

mod mesh;
mod server;
mod traffic;

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use culvert_harness::{Agent, AgentOptions, Fabric, wait_until};
use serde::Serialize;

use crate::machine::Machine;
use server::Server;
use traffic::Traffic;

const PATIENCE: Duration = Duration::from_secs(60);
/// Of requests beside something else.
const LENGTH: Duration = Duration::from_secs(2);

/// How much of it.
#[derive(Clone, Copy)]
pub struct Size {
    pub workloads: u32,
    pub changes: u32,
}

impl Size {
    pub const FULL: Self = Self {
        workloads: 100_000,
        changes: 2_000,
    };
    pub const QUICK: Self = Self {
        workloads: 100_000,
        changes: 200,
    };
    pub const SMOKE: Self = Self {
        workloads: 1_000,
        changes: 20,
    };
}

/// One figure.
#[derive(Debug, Serialize)]
pub struct Figure {
    pub case: &'static str,
    pub unit: &'static str,
    pub value: f64,
    /// At most.
    pub goal: Option<f64>,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub workloads: u32,
    pub changes: u32,
    pub rows: Vec<Figure>,
    pub machine: Machine,
}

/// Measures with one agent.
pub fn measure(size: Size) -> Result<Report> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let mut server = Server::start(&node, size.workloads)?;
    let traffic = Traffic::new(&node)?;
    let mut options = AgentOptions::default();
    options.env.extend(server.variables());
    options
        .env
        .insert("CULVERT_DIRECT".to_owned(), "false".to_owned());
    let agent = node.start_agent(options)?;
    server.asked(PATIENCE)?;
    let before = memory(&agent, "VmRSS")?;
    let first = server.push_all(0, &traffic.pods(), PATIENCE)?;
    agent.ready()?;
    let mut changes = Vec::new();
    for number in 0..size.changes {
        changes.push(server.change(number, PATIENCE)?.as_secs_f64() * 1e3);
    }
    // What a push took for a moment is given back soon after it is in force.
    let after = memory(&agent, "VmRSS")?;
    let peak = memory(&agent, "VmHWM")?;
    traffic.enrol(&agent)?;
    let (quiet, ()) = traffic.beside(LENGTH, || Ok(()))?;
    let (changing, more) = traffic.beside(LENGTH, || {
        let until = Instant::now() + LENGTH;
        let mut number = size.changes;
        while Instant::now() < until {
            server.change(number, PATIENCE)?;
            number += 1;
        }
        Ok(number - size.changes)
    })?;
    let (pushed, _) = traffic.beside(LENGTH, || {
        server.push_all(size.changes + more, &traffic.pods(), PATIENCE)
    })?;
    let all = u64::from(size.workloads) + traffic.pods().len() as u64;
    let known = wait_until(PATIENCE, "all changes", || {
        let status = agent.cli(["status", "--json"])?.json()?;
        Ok(status.get("workloads").and_then(serde_json::Value::as_u64))
    })?;
    if known != all {
        bail!("the agent knows {known} workloads of {all}");
    }
    changes.sort_unstable_by(f64::total_cmp);
    let at = |part: usize| changes.get(changes.len() * part / 100).copied();
    let figure = |case, unit, value, goal| Figure {
        case,
        unit,
        value,
        goal,
    };
    let per_second = f64::from(more) / LENGTH.as_secs_f64();
    Ok(Report {
        workloads: size.workloads,
        changes: size.changes,
        rows: vec![
            figure("first_push", "s", first.as_secs_f64(), Some(2.0)),
            figure("memory_before", "MB", before, None),
            figure("memory_after", "MB", after, Some(150.0)),
            figure("memory_peak", "MB", peak, Some(150.0)),
            figure("change_p50", "ms", at(50).context("no change")?, Some(1.0)),
            figure("change_p99", "ms", at(99).context("no change")?, None),
            figure("quiet_rr_p50", "us", quiet.p50, None),
            figure("quiet_rr_p99", "us", quiet.p99, None),
            figure("changes_per_s", "1/s", per_second, None),
            figure("changes_rr_p50", "us", changing.p50, None),
            figure("changes_rr_p99", "us", changing.p99, None),
            figure("push_rr_p50", "us", pushed.p50, None),
            figure("push_rr_p99", "us", pushed.p99, None),
        ],
        machine: Machine::describe(),
    })
}

/// Of the agent's process, in MB (10^6 bytes).
fn memory(agent: &Agent, field: &str) -> Result<f64> {
    let path = format!("/proc/{}/status", agent.process().pid());
    let status = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim_start_matches(':').split_whitespace().next());
    let kib: f64 = kib
        .with_context(|| format!("no {field} in {path}"))?
        .parse()?;
    Ok(kib * 1024.0 / 1e6)
}

impl Report {
    pub fn table(&self) -> String {
        let mut out = format!(
            "{} workloads, {} changes\n{:<16}{:<6}{:>10}  goal\n",
            self.workloads, self.changes, "case", "unit", "value"
        );
        for row in &self.rows {
            let goal = row.goal.map_or_else(String::new, |goal| {
                let mark = if row.value <= goal { '✓' } else { '✗' };
                format!("≤ {goal} {mark}")
            });
            // Writing to a String does not fail.
            let _ = writeln!(
                out,
                "{:<16}{:<6}{:>10.3}  {goal}",
                row.case, row.unit, row.value
            );
        }
        out
    }
}
