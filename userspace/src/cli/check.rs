//! `culvert check`: whether this node's kernel can do what the agent needs. Needs no agent, and changes nothing.

use std::io::Write;

use serde::Serialize;

use super::{CheckArgs, CliError, table};
use crate::kernel::{Kernel, Verdicts};

/// What is printed as JSON.
#[derive(Serialize)]
struct Answer<'a> {
    /// The kernel takes every program.
    kernel: bool,
    short_circuit: Choice<'a>,
}

/// Where flows may be short-circuited on this kernel.
#[derive(Serialize)]
struct Choice<'a> {
    /// Where a pod or a port has it `on`.
    on: bool,
    /// Where they leave it to the agent.
    auto: bool,
    /// Why not where it is `on`.
    reason: Option<String>,
    rows: &'a [crate::kernel::Verdict],
}

/// Tries this kernel out and tells what was found.
///
/// # Errors
/// [`CliError::Kernel`] if the agent could not run here.
pub fn check(args: &CheckArgs, out: &mut impl Write) -> Result<(), CliError> {
    let tried = Kernel::try_out()?;
    if args.json {
        let answer = Answer {
            kernel: true,
            short_circuit: choice(&tried),
        };
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
    } else {
        out.write_all(text(&tried).as_bytes())?;
    }
    out.flush()?;
    Ok(())
}

fn choice(tried: &Result<Verdicts, String>) -> Choice<'_> {
    match tried {
        Ok(verdicts) => Choice {
            on: verdicts.forbids().is_none(),
            auto: verdicts.nothing_differs(),
            reason: verdicts.forbids(),
            rows: &verdicts.0,
        },
        Err(reason) => Choice {
            on: false,
            auto: false,
            reason: Some(reason.clone()),
            rows: &[],
        },
    }
}

fn text(tried: &Result<Verdicts, String>) -> String {
    let choice = choice(tried);
    let mut out = "kernel part: loads\n".to_owned();
    let reason = choice.reason.as_deref().unwrap_or_default();
    out.push_str(&match (choice.on, choice.auto) {
        (_, true) => "short-circuit: on where it is `on` or `auto`: no program can tell\n".to_owned(),
        (true, false) => {
            "short-circuit: off where it is `auto`, because programs could tell; `on` is for pods whose programs do none of what differs\n"
                .to_owned()
        }
        (false, false) => table::clean(&format!("short-circuit: off everywhere: {reason}")) + "\n",
    });
    let rows = choice.rows.iter().map(|verdict| {
        let differs = verdict.differs.as_deref();
        let mut row = vec![
            verdict.row.name().to_owned(),
            if differs.is_some() { "differs" } else { "same" }.to_owned(),
            verdict.row.question().to_owned(),
        ];
        row.extend(differs.map(|how| table::clean(&format!("({how})"))));
        row
    });
    out + &table::columns(&rows.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Row, Verdict};

    fn found(differs: &[Row]) -> Result<Verdicts, String> {
        let verdict = |row: &Row| Verdict {
            row: *row,
            differs: differs.contains(row).then(|| "otherwise".to_owned()),
        };
        Ok(Verdicts(Row::ALL.iter().map(verdict).collect()))
    }

    #[test]
    fn what_may_be_short_circuited_follows_from_the_rows() {
        let cases = [
            (found(&[]), (true, true)),
            (found(&[Row::Splice]), (true, false)),
            (found(&[Row::Order]), (false, false)),
            (found(&[Row::Memory, Row::Urgent]), (false, false)),
            (Err("no BTF".to_owned()), (false, false)),
        ];
        for (tried, expected) in cases {
            let found = choice(&tried);
            assert_eq!((found.on, found.auto), expected, "{tried:?}");
            assert_eq!(found.reason.is_some(), !found.on, "{tried:?}");
        }
    }

    #[test]
    fn each_row_is_named_with_what_differs() {
        let said = text(&found(&[Row::Splice]));
        assert!(said.contains("off where it is `auto`"), "{said}");
        for row in Row::ALL {
            assert!(said.contains(row.question()), "{said}");
        }
        assert!(said.contains("(otherwise)"), "{said}");
        assert!(text(&Err("no BTF".to_owned())).contains("off everywhere: no BTF"));
    }
}
