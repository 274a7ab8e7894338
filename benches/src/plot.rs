//! The picture: for each row what the direct way and the agent's own path cost, in times of plain, on a logarithmic axis.
//! Rates are turned over, so that less is better everywhere.

use std::fmt::Write;

use crate::report::{Report, Row};

const WIDTH: f64 = 760.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 64.0;
const LINE: f64 = 26.0;
const BOTTOM: f64 = 50.0;
/// Where the axis begins; it ends at the first of these doublings that holds everything.
const LOWEST: f64 = 0.5;
const MOST_DOUBLINGS: i32 = 12;

/// A row as the picture has it.
struct Cost {
    name: &'static str,
    direct: f64,
    spread: [f64; 2],
    proxy: Option<f64>,
}

impl Cost {
    fn of(row: &Row) -> Option<Self> {
        let cost = |ratio: f64| {
            if row.case.is_rate() {
                1.0 / ratio
            } else {
                ratio
            }
        };
        let [low, high] = row.spread?.map(cost);
        let proxy = row
            .proxy
            .zip(row.plain)
            .map(|(proxy, plain)| cost(proxy / plain));
        Some(Self {
            name: row.case.name(),
            direct: cost(row.ratio_direct?),
            spread: [low.min(high), low.max(high)],
            proxy,
        })
    }
}

/// The SVG.
pub fn svg(report: &Report) -> String {
    let costs: Vec<Cost> = report.rows.iter().filter_map(Cost::of).collect();
    let most = costs
        .iter()
        .flat_map(|cost| [cost.direct, cost.spread[1], cost.proxy.unwrap_or(1.0)])
        .fold(2.0, f64::max);
    let doublings = (1..MOST_DOUBLINGS)
        .find(|n| LOWEST * f64::from(1 << n) >= most)
        .unwrap_or(MOST_DOUBLINGS);
    let x = |cost: f64| {
        let at = (cost.max(LOWEST) / LOWEST).log2() / f64::from(doublings);
        LEFT + at.min(1.0) * (WIDTH - LEFT - RIGHT)
    };
    let bottom = TOP + LINE * costs.len() as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"22\" font-size=\"15\" fill=\"#222222\">Cost between two pods of one node, in times of plain pods</text>\n",
        height = bottom + BOTTOM
    );
    legend(&mut out);
    for n in 0..=doublings {
        let value = LOWEST * f64::from(1 << n);
        let at = x(value);
        let colour = if n == 1 { "#555555" } else { "#dddddd" };
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"{colour}\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555555\">{value}</text>",
            bottom + 18.0
        );
    }
    for (number, cost) in costs.iter().enumerate() {
        let y = TOP + LINE * (number as f64 + 0.5);
        draw(&mut out, cost, y, &x);
    }
    let _ = write!(
        out,
        "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#555555\">less is better; {} rounds, Linux {}, {}</text>\n</svg>\n",
        bottom + 40.0,
        report.extra.rounds,
        escaped(&report.extra.machine.kernel),
        report.extra.machine.date
    );
    out
}

fn draw(out: &mut String, cost: &Cost, y: f64, x: &dyn Fn(f64) -> f64) {
    let [low, high] = cost.spread.map(x);
    let _ = writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#222222\">{}</text>\
         <line x1=\"{low:.1}\" y1=\"{y:.1}\" x2=\"{high:.1}\" y2=\"{y:.1}\" stroke=\"#1b7f4d\" stroke-width=\"3\"/>\
         <circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"5\" fill=\"#1b7f4d\"><title>direct: {:.3}</title></circle>",
        LEFT - 12.0,
        y + 4.5,
        cost.name,
        x(cost.direct),
        cost.direct
    );
    if let Some(proxy) = cost.proxy {
        let _ = writeln!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"9\" height=\"9\" fill=\"#c05621\"><title>through the agent: {proxy:.2}</title></rect>",
            x(proxy) - 4.5,
            y - 4.5
        );
    }
}

fn legend(out: &mut String) {
    let _ = writeln!(
        out,
        "<circle cx=\"{:.1}\" cy=\"42\" r=\"5\" fill=\"#1b7f4d\"/><text x=\"{:.1}\" y=\"46.5\" fill=\"#222222\">direct, with half of the rounds</text>\
         <rect x=\"{:.1}\" y=\"37.5\" width=\"9\" height=\"9\" fill=\"#c05621\"/><text x=\"{:.1}\" y=\"46.5\" fill=\"#222222\">through the agent (HBONE)</text>",
        LEFT + 5.0,
        LEFT + 16.0,
        LEFT + 240.0,
        LEFT + 256.0
    );
}

/// The one text that is not ours.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
