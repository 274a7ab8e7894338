//! `culvert-demo`: shows on one machine what Culvert does, and proves it. Two nodes and four pods stand twice, with the
//! mesh and without it, so that every figure has its twin from the same minute. Started by `cargo xtask demo`.
//!
//! Exit status: 0 if every check holds, 1 if one does not or the demonstration could not be carried out.

mod checks;
mod figures;
mod intruder;
mod measure;
mod pairs;
mod proofs;
mod report;
mod revocation;
mod run;
mod stage;
mod table;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;

/// Two nodes with pods that talk through Culvert: what it does, how fast, and the proof
#[derive(Parser)]
#[command(name = "culvert-demo")]
struct Arguments {
    /// One JSON document on standard output in place of the table
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match demonstrate(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("culvert-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demonstrate(arguments: &Arguments) -> anyhow::Result<bool> {
    if !arguments.json {
        show(table::HEADER)?;
    }
    let report = run::run()?;
    let text = if arguments.json {
        report.json()?
    } else {
        table::render(&report)
    };
    show(&text)?;
    Ok(report.holds())
}

fn show(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").context("writing to standard output")
}
