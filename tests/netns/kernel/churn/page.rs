//! `docs/RELIABILITY.md`: the result of a run, written between two marks; what stands around them is written by hand.

use std::{fmt::Write as _, path::Path};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use time::OffsetDateTime;

const BEGIN: &str = "<!-- churn: begin, written by the test -->";
const END: &str = "<!-- churn: end -->";

/// What it ran on.
pub struct Machine {
    kernel: String,
    processor: String,
    processors: usize,
    date: String,
}

impl Machine {
    /// What cannot be read is `unknown`.
    pub fn describe() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let information = read("/proc/cpuinfo");
        let model = information.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "model name").then(|| value.trim().to_owned())
        });
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: model.unwrap_or_else(|| "unknown".to_owned()),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            date: OffsetDateTime::now_utc().date().to_string(),
        }
    }

    pub fn to_json(&self) -> Value {
        json!({
            "kernel": self.kernel,
            "processor": self.processor,
            "processors": self.processors,
            "date": self.date,
        })
    }
}

/// Replaces the result on the page.
pub fn write(directory: &Path, report: &Value) -> Result<()> {
    let path = directory.join("RELIABILITY.md");
    let page =
        std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let marks = page
        .split_once(BEGIN)
        .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = marks
        .with_context(|| format!("{} has no `{BEGIN}` with `{END}` after it", path.display()))?;
    let text = format!("{before}{BEGIN}\n{}{END}{after}", result(report));
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

fn result(report: &Value) -> String {
    let machine = &report["machine"];
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let mut out = format!(
        "\n{}: {} s with the seed {}, on {} processors ({}), Linux {}. Certificates lived {} s; {} were issued.\n\n\
         | connections | had to succeed, did | had to fail, did | not judged | failed | admitted |\n\
         | --- | ---: | ---: | ---: | ---: | ---: |\n",
        word(&machine["date"]),
        report["seconds"],
        report["seed"],
        machine["processors"],
        word(&machine["processor"]),
        word(&machine["kernel"]),
        report["certificate_seconds"],
        report["certificates"],
    );
    // Writing to a String does not fail.
    for (kind, counts) in report["connections"].as_object().into_iter().flatten() {
        let _ = writeln!(
            out,
            "| {kind} | {} | {} | {} | {} | {} |",
            counts["allowed"],
            counts["denied"],
            counts["unjudged"],
            counts["failures"],
            counts["admitted"],
        );
    }
    let _ = writeln!(
        out,
        "\nStreams that stayed open exchanged {} times, without a byte lost.\n\n| change | times |\n| --- | ---: |",
        report["streams"]
    );
    for (kind, times) in report["changes"].as_object().into_iter().flatten() {
        let _ = writeln!(out, "| {kind} | {times} |");
    }
    out += "\n| agent | when | memory, KiB | descriptors | threads | pods | endpoints | verdicts |\n\
            | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n";
    for (key, when) in [("before", "in the middle"), ("after", "at the end")] {
        for (number, size) in report[key].as_array().into_iter().flatten().enumerate() {
            let _ = writeln!(
                out,
                "| {} | {when} | {} | {} | {} | {} | {} | {} |",
                number + 1,
                size["memory_kib"],
                size["descriptors"],
                size["threads"],
                size["pods"],
                size["endpoints"],
                size["verdicts"],
            );
        }
    }
    out.push('\n');
    out
}
