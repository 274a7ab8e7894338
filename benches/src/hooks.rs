//! What the kernel part's programs cost by the kernel's own count, in slices of their own: counting costs too, so it is on
//! only while they last. The kernel stops when the descriptor is closed, also if this program is killed.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use serde::Serialize;

use crate::case::{Case, Load};
use crate::load;
use crate::plan::Plan;
use crate::stage::{Stage, Station};
use crate::way::Way;

/// Alternations between the small mesh and the big one.
const TURNS: usize = 4;

/// A program counts for a load if it runs once in so many operations.
const SELDOM: f64 = 20.0;

/// What one program did during one load.
#[derive(Debug, Serialize)]
pub struct Hook {
    pub program: String,
    pub load: &'static str,
    /// What `calls_per_operation` counts by.
    pub operation: &'static str,
    pub calls_per_operation: f64,
    pub ns_per_call: f64,
}

/// The programs at connect, in a mesh of some size.
#[derive(Debug, Serialize)]
pub struct ConnectCost {
    pub workloads: usize,
    pub policies: usize,
    /// `connect4`, while the kernel counts.
    pub ns_per_connect: Option<f64>,
    pub connections_per_s: Option<f64>,
}

#[derive(Debug, Serialize)]
pub struct Hooks {
    pub programs: Vec<Hook>,
    pub connect: Vec<ConnectCost>,
}

/// Runs and time by program name, since boot, of all programs of that name.
type Counts = BTreeMap<String, (u64, Duration)>;

pub fn measure(stage: &Stage, plan: &Plan) -> Result<Hooks> {
    let counting = enable_stats(Stats::RunTime)
        .context("letting the kernel count what its programs cost (Linux 5.8 and root)")?;
    let mut programs = Vec::new();
    let direct = station(stage, Way::Direct)?;
    for load in [Load::Connections, Load::RR_1K, Load::STREAM_128K] {
        let (seen, operations, _) = counted(load, direct, plan, 0)?;
        for (program, (runs, time)) in seen {
            // What runs more seldom is the slice's one connection, or somebody else's.
            if runs as f64 >= operations / SELDOM {
                programs.push(Hook {
                    program,
                    load: load.name(),
                    operation: load.operation(),
                    calls_per_operation: runs as f64 / operations,
                    ns_per_call: time.as_nanos() as f64 / runs as f64,
                });
            }
        }
    }
    let small = connect_cost(stage, plan)?;
    drop(counting);
    Ok(Hooks {
        programs,
        connect: small,
    })
}

/// The small mesh and the big one in turns.
fn connect_cost(stage: &Stage, plan: &Plan) -> Result<Vec<ConnectCost>> {
    let (workloads, policies) = plan.big_mesh;
    let meshes = [
        (Way::Direct, (2, 1)),
        (Way::Big, (workloads + 2, policies + 1)),
    ];
    let mut sums = [(0, Duration::ZERO, 0.0); 2];
    for turn in 0..TURNS {
        for ((way, _), sum) in meshes.iter().zip(&mut sums) {
            let station = station(stage, *way)?;
            let (seen, _, rate) = counted(Load::Connections, station, plan, turn)?;
            let (runs, time) = seen.get("connect4").copied().unwrap_or_default();
            sum.0 += runs;
            sum.1 += time;
            sum.2 += rate / TURNS as f64;
        }
    }
    let costs = meshes.iter().zip(sums);
    Ok(costs
        .map(
            |((_, (workloads, policies)), (runs, time, rate))| ConnectCost {
                workloads: *workloads,
                policies: *policies,
                ns_per_connect: (runs > 0).then(|| time.as_nanos() as f64 / runs as f64),
                connections_per_s: (rate > 0.0).then_some(rate),
            },
        )
        .collect())
}

fn station(stage: &Stage, way: Way) -> Result<&Station> {
    let station = stage.station(way);
    station.with_context(|| format!("the way `{}` is not set up", way.name()))
}

/// What ran during one slice, how many operations those were, and connections per second.
fn counted(load: Load, station: &Station, plan: &Plan, round: usize) -> Result<(Counts, f64, f64)> {
    let before = counts()?;
    let slice = load::run(load, station, plan.hook_slice, plan, round)?;
    let mut seen = Counts::new();
    for (name, (runs, time)) in counts()? {
        let (ran, took) = before.get(&name).copied().unwrap_or_default();
        if runs > ran {
            seen.insert(name, (runs - ran, time.saturating_sub(took)));
        }
    }
    let rate = slice
        .figures
        .iter()
        .find_map(|(case, value)| (*case == Case::ConnBare).then_some(*value));
    Ok((seen, slice.operations, rate.unwrap_or(0.0)))
}

fn counts() -> Result<Counts> {
    let mut counts = Counts::new();
    for program in loaded_programs() {
        let program = program.context("listing the loaded eBPF programs")?;
        let name = program.name_as_str().unwrap_or("?").to_owned();
        let (runs, time) = counts.entry(name).or_default();
        *runs += program.run_count();
        *time += program.run_time();
    }
    Ok(counts)
}
