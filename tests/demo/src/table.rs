//! The report for people: one table, the checks, and where to look next.

use crate::figures::Figures;
use crate::pairs::Pair;
use crate::report::Report;

/// Printed before the work begins.
pub const HEADER: &str = "\
Culvert: two nodes on this machine, and the same pods once more without the mesh.

    node 1: client, server-a, intruder          node 2: server-b

The policy lets `client` reach both servers and `intruder` neither. Connections on a node are direct, admitted by the
kernel; those between the nodes go through mutual TLS (hbone). Figures are medians of rounds in turns.
";

const COLUMNS: [&str; 7] = [
    "pair",
    "path",
    "requests/s",
    "p50",
    "p99",
    "throughput",
    "identity seen by the server",
];
/// Those that hold text; the others are figures, and stand to the right.
const LEFT: [usize; 3] = [0, 1, 6];

type Row = [String; 7];

/// The table and the checks.
pub fn render(report: &Report) -> String {
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    rows.extend(report.pairs.iter().flat_map(rows_of));
    let mut out = format!("\n{}\n", aligned(&rows));
    match report.revocation_ms {
        Some(took) => {
            out += &format!("An open connection is cut {took:.1} ms after its policy changes.\n\n")
        }
        None => out += "The policy change did not cut the open connection.\n\n",
    }
    for check in &report.checks {
        let sign = if check.ok { '✓' } else { '✗' };
        out += &format!("{sign} {}\n    {}\n", check.name, check.detail);
    }
    let failed = report.checks.iter().filter(|check| !check.ok).count();
    out += &match failed {
        0 => "\nEverything holds. ".to_owned(),
        failed => format!("\n{failed} of {} checks failed. ", report.checks.len()),
    };
    out + "Where to look next: docs/ARCHITECTURE.md, the way of a connection through the code; `--json`, the same as data."
}

fn rows_of(pair: &Pair) -> Vec<Row> {
    let name = format!("{} → {}", pair.from, pair.to);
    let path = pair.path.as_deref().unwrap_or("-");
    let identity = pair.identity.clone().unwrap_or_default();
    let without = row(
        "  without the mesh",
        "plaintext",
        &pair.plain,
        String::new(),
    );
    if !pair.allowed {
        let outcome = pair.outcome.as_deref().unwrap_or("-");
        let refused = row(&name, path, &pair.figures, format!("refused: {outcome}"));
        return vec![refused, without];
    }
    let times = |ratio| unit(ratio, 2, " ×");
    let ratios = [
        "  ratio".to_owned(),
        String::new(),
        times(pair.ratios.rps),
        times(pair.ratios.p50_us),
        times(pair.ratios.p99_us),
        times(pair.ratios.gbit_s),
        String::new(),
    ];
    vec![row(&name, path, &pair.figures, identity), without, ratios]
}

fn row(name: &str, path: &str, figures: &Figures, last: String) -> Row {
    [
        name.to_owned(),
        path.to_owned(),
        unit(figures.rps, 0, ""),
        unit(figures.p50_us, 1, " µs"),
        unit(figures.p99_us, 1, " µs"),
        unit(figures.gbit_s, 2, " Gbit/s"),
        last,
    ]
}

fn unit(figure: Option<f64>, digits: usize, unit: &str) -> String {
    figure.map_or_else(
        || "-".to_owned(),
        |figure| format!("{figure:.digits$}{unit}"),
    )
}

fn aligned(rows: &[Row]) -> String {
    let mut widths = [0; COLUMNS.len()];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &Row| {
        let cells = row
            .iter()
            .zip(widths)
            .enumerate()
            .map(|(column, (cell, width))| {
                if LEFT.contains(&column) {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            });
        let cells: Vec<String> = cells.collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_their_cells_hold() {
        let mut pair = crate::pairs::of().remove(0);
        pair.figures.p50_us = Some(1234.56);
        pair.plain.p50_us = Some(617.28);
        pair.ratios = pair.figures.ratio(&pair.plain);
        let mut rows = vec![COLUMNS.map(str::to_owned)];
        rows.extend(rows_of(&pair));
        let text = aligned(&rows);
        let ends: Vec<Option<usize>> = ["p50", "1234.6 µs", "617.3 µs", "2.00 ×"]
            .iter()
            .zip(text.lines())
            .map(|(cell, line)| {
                let at = line.find(cell)?;
                line.get(..at + cell.len()).map(|line| line.chars().count())
            })
            .collect();
        assert!(
            ends.iter().all(|end| end.is_some() && end == &ends[0]),
            "{text}"
        );
    }
}
