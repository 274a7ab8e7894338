//! `culvert-bench`: what connections between two pods of one node cost with the mesh, against the same pods without it, all ways
//! at once and in turns, in short slices; and what a large mesh costs the agent. Started by `cargo xtask bench`.
//!
//! Standard output has the result alone, a table or one JSON document; standard error tells how far it is.

mod case;
mod control_plane;
mod cpu;
mod figures;
mod hooks;
mod load;
mod machine;
mod page;
mod plan;
mod plot;
mod report;
mod rounds;
mod servers;
mod stage;
mod way;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use serde::Serialize;

use crate::case::Load;
use crate::control_plane::Size;
use crate::plan::Plan;

/// What Culvert costs
#[derive(Parser)]
#[command(name = "culvert-bench")]
struct Arguments {
    /// What to measure
    #[arg(value_enum)]
    scenario: Scenario,
    /// One or two minutes instead of ten
    #[arg(long, conflicts_with = "smoke")]
    quick: bool,
    /// One round of the shortest slices: shows that everything runs, its figures mean nothing
    #[arg(long)]
    smoke: bool,
    /// Only the load that gives this case; the other rows stay empty
    #[arg(long, value_name = "CASE", value_parser = Load::by_name)]
    only: Option<Load>,
    /// One JSON document in place of the table
    #[arg(long)]
    json: bool,
    /// Write the page with the results and its picture into this directory
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "only")]
    write_docs: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Scenario {
    /// Connections between two pods of one node: directly, through the agent, and without the mesh
    SameNode,
    /// A mesh of 100,000 workloads, and single changes to it
    ControlPlane,
}

fn main() -> ExitCode {
    match bench(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("culvert-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> anyhow::Result<()> {
    match arguments.scenario {
        Scenario::SameNode => same_node(arguments),
        Scenario::ControlPlane => control_plane(arguments),
    }
}

fn control_plane(arguments: &Arguments) -> anyhow::Result<()> {
    let size = if arguments.smoke {
        Size::SMOKE
    } else if arguments.quick {
        Size::QUICK
    } else {
        Size::FULL
    };
    let report = control_plane::measure(size)?;
    say(arguments, &report, || report.table())
}

fn same_node(arguments: &Arguments) -> anyhow::Result<()> {
    let plan = if arguments.smoke {
        Plan::SMOKE
    } else if arguments.quick {
        Plan::QUICK
    } else {
        Plan::FULL
    };
    let loads = arguments.only.map_or(Load::ALL.to_vec(), |load| vec![load]);
    let report = report::measure(&plan, &loads)?;
    say(arguments, &report, || report.table())?;
    if let Some(directory) = &arguments.write_docs {
        page::write(directory, &report, plan.flag)?;
    }
    Ok(())
}

/// Prints the result.
fn say(
    arguments: &Arguments,
    report: &impl Serialize,
    table: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let text = if arguments.json {
        serde_json::to_string(report).context("writing the figures as JSON")?
    } else {
        table()
    };
    writeln!(std::io::stdout().lock(), "{text}").context("writing to standard output")
}
