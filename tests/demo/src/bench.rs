//! `cargo xtask bench`: the same measurement as the demonstration's, for longer, with the spread of its ratios. Peers are
//! the same pods without the mesh, in turns.

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::figures::{Figures, quartiles};
use crate::stage::Stage;
use crate::{measure, pairs};

const ROUNDS: usize = 60;
const QUICK_ROUNDS: usize = 12;
const LONGEST: Duration = Duration::from_secs(120);

/// One figure of one path.
#[derive(Debug, Serialize)]
pub struct Row {
    /// `rr_1k`: requests and answers of 1 KiB; `stream`: one stream.
    pub case: &'static str,
    pub metric: &'static str,
    pub path: &'static str,
    /// Without the mesh.
    pub plain: Option<f64>,
    pub mesh: Option<f64>,
    /// The median of the rounds' ratios, mesh to plain.
    pub ratio: Option<f64>,
    /// Half of the rounds' ratios lie between these.
    pub spread: Option<[f64; 2]>,
    pub rounds: usize,
}

type Figure = fn(&Figures) -> Option<f64>;

/// Measures both paths.
pub fn run(quick: bool) -> Result<Vec<Row>> {
    let figures: [(&str, &str, Figure); 3] = [
        ("rr_1k", "p50_us", |figures| figures.p50_us),
        ("rr_1k", "p99_us", |figures| figures.p99_us),
        ("stream", "gbit_s", |figures| figures.gbit_s),
    ];
    let plain = Stage::plain()?;
    let meshed = Stage::meshed()?;
    measure::learn(&meshed)?;
    let mut rows = Vec::new();
    for pair in pairs::of().iter().filter(|pair| pair.allowed) {
        let most = if quick { QUICK_ROUNDS } else { ROUNDS };
        let rounds = measure::rounds(pair, &plain, &meshed, most, LONGEST)?;
        let (mesh, without) = (
            Figures::median(&rounds.with),
            Figures::median(&rounds.without),
        );
        let ratio = Figures::median(&rounds.ratios);
        for (case, metric, figure) in figures {
            rows.push(Row {
                case,
                metric,
                path: pairs::way(pair.to),
                plain: figure(&without),
                mesh: figure(&mesh),
                ratio: figure(&ratio),
                spread: quartiles(rounds.ratios.iter().filter_map(figure)),
                rounds: rounds.ratios.len(),
            });
        }
    }
    Ok(rows)
}

/// `{"rows":[…]}`
pub fn json(rows: &[Row]) -> Result<String> {
    serde_json::to_string(&serde_json::json!({ "rows": rows })).context("writing the figures")
}

pub fn table(rows: &[Row]) -> String {
    let mut out = format!(
        "{:<8}{:<8}{:<8}{:>12}{:>12}{:>9}   half of the ratios\n",
        "case", "path", "metric", "plain", "mesh", "ratio"
    );
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    };
    for row in rows {
        let spread = row.spread.map_or_else(
            || "-".to_owned(),
            |[low, high]| format!("{low:.3} to {high:.3} of {} rounds", row.rounds),
        );
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "{:<8}{:<8}{:<8}{:>12}{:>12}{:>9}   {spread}",
            row.case,
            row.path,
            row.metric,
            number(row.plain, 2),
            number(row.mesh, 2),
            number(row.ratio, 3),
        );
    }
    out
}
