//! `docs/PERFORMANCE.md`: the results, written between two marks; what stands around them is written by hand.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::plot;
use crate::report::{Goal, Report, number, spread};

const BEGIN: &str = "<!-- same-node: begin, written by `cargo xtask bench same-node --plot` -->";
const END: &str = "<!-- same-node: end -->";
const PICTURE: &str = "same-node.svg";

/// Replaces the results on the page, and the picture beside it.
pub fn write(directory: &Path, report: &Report, flag: &str) -> Result<()> {
    let put = |name: &str, text: &str| {
        let path = directory.join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    let page = directory.join("PERFORMANCE.md");
    let text =
        std::fs::read_to_string(&page).with_context(|| format!("reading {}", page.display()))?;
    let text = replaced(&text, &results(report, flag)).with_context(|| {
        format!(
            "{} has no `{BEGIN}` with `{END}` after it: put them where the results belong",
            page.display()
        )
    })?;
    put(PICTURE, &plot::svg(report))?;
    put("PERFORMANCE.md", &text)
}

fn replaced(page: &str, results: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{results}{END}{after}"))
}

fn results(report: &Report, flag: &str) -> String {
    let extra = &report.extra;
    let machine = &extra.machine;
    let mut out = format!(
        "\n`cargo xtask bench same-node{flag} --plot`, {}: {} rounds on {} processors ({}), Linux {}, load average {}.\n\n\
         ![What connections between pods of one node cost]({PICTURE})\n\n\
         | case | unit | plain | direct | through the agent | direct / plain | half of the rounds | goal | short-circuited | / plain | goal |\n\
         | --- | --- | ---: | ---: | ---: | ---: | --- | --- | ---: | ---: | --- |\n",
        machine.date,
        extra.rounds,
        machine.processors,
        machine.processor,
        machine.kernel,
        machine.load_average
    );
    // Writing to a String does not fail.
    for row in report.rows.iter().chain(&extra.beside) {
        let _ = writeln!(
            out,
            "| `{}` | `{}` | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            row.case.name(),
            row.metric,
            number(row.plain),
            number(row.direct),
            number(row.proxy),
            number(row.ratio_direct),
            spread(row.spread),
            goal(&row.direct_goal()),
            number(row.short_circuit),
            number(row.ratio_short_circuit),
            goal(&row.short_goal()),
        );
    }
    out += "\nSwitched on against off, on the direct way:\n\n| what | unit | on | off | on / off | half of the rounds |\n\
            | --- | --- | ---: | ---: | ---: | --- |\n";
    for (name, switch) in report.switches() {
        let _ = writeln!(
            out,
            "| {name} | `{}` | {} | {} | {} | {} |",
            switch.metric,
            number(switch.on),
            number(switch.off),
            number(switch.ratio),
            spread(switch.spread)
        );
    }
    out += "\nThe kernel part's programs on the direct way, by the kernel's run-time statistics:\n\n\
            | during | program | calls | ns per call |\n| --- | --- | --- | ---: |\n";
    for hook in &extra.hooks.programs {
        let _ = writeln!(
            out,
            "| `{}` | `{}` | {:.2} per {} | {:.0} |",
            hook.load, hook.program, hook.calls_per_operation, hook.operation, hook.ns_per_call
        );
    }
    out += "\n`connect4` in meshes of two sizes, in turns:\n\n\
            | workloads | policies | ns per connect | connections/s while the kernel counts |\n| ---: | ---: | ---: | ---: |\n";
    for cost in &extra.hooks.connect {
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} |",
            cost.workloads,
            cost.policies,
            number(cost.ns_per_connect),
            number(cost.connections_per_s)
        );
    }
    out.push('\n');
    out
}

fn goal(goal: &Goal) -> String {
    let missed = if goal.reached == Some(false) {
        " (missed)"
    } else {
        ""
    };
    format!("{}{missed}", goal.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stands_between_the_marks_is_replaced() {
        let page = format!("by hand\n{BEGIN}\nold\n{END}\nby hand too\n");
        let new = replaced(&page, "new\n").unwrap();
        assert_eq!(new, format!("by hand\n{BEGIN}\nnew\n{END}\nby hand too\n"));
        assert_eq!(replaced("no marks", "new\n"), None);
    }
}
