//! What programs said, line by line, and the comparison of two such accounts. Called by `stage` and by every program.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Result, bail, ensure};

use crate::stage::Mode;

/// How many lines that differ an error shows.
const SHOWN: usize = 20;

/// Lines in the order in which they were said, each under the name of a case.
#[derive(Debug, Default)]
pub struct Transcript(Vec<(String, String)>);

impl Transcript {
    /// Adds what `case` said, a line at a time.
    pub fn say(&mut self, case: &str, text: impl fmt::Display) {
        let text = text.to_string();
        let lines = text
            .lines()
            .map(|line| (case.to_owned(), line.trim_end().to_owned()));
        self.0.extend(lines);
    }

    fn cases(&self) -> BTreeSet<&str> {
        self.0.iter().map(|(case, _)| case.as_str()).collect()
    }

    fn of(&self, case: &str) -> Vec<&str> {
        let lines = self.0.iter().filter(|(name, _)| name == case);
        lines.map(|(_, line)| line.as_str()).collect()
    }
}

impl fmt::Display for Transcript {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|(case, line)| writeln!(out, "{case}: {line}"))
    }
}

/// Cases that are known, and documented, to go otherwise where a short-circuit is asked for. Nothing differs by default.
fn known_to_differ(mode: Mode) -> &'static [&'static str] {
    match mode {
        Mode::Off | Mode::Default | Mode::On => &[],
    }
}

/// Demands that two accounts are the same; those of cases known to differ must differ.
pub fn same(plain: &Transcript, direct: &Transcript, mode: Mode) -> Result<()> {
    ensure!(!plain.0.is_empty(), "the programs said nothing");
    let mut differences = Vec::new();
    for case in plain.cases().union(&direct.cases()) {
        let (without, with) = (plain.of(case), direct.of(case));
        let known = known_to_differ(mode).contains(case);
        if known && without == with {
            differences.push(format!("{case}: is known to differ, and does not"));
        }
        if known || without == with {
            continue;
        }
        for at in 0..without.len().max(with.len()) {
            let line = |lines: &[&str]| {
                lines
                    .get(at)
                    .map_or("(nothing)".to_owned(), |line| (*line).to_owned())
            };
            let (without, with) = (line(&without), line(&with));
            if without != with {
                differences.push(format!(
                    "{case}, line {at}:\n  plain  {without}\n  direct {with}"
                ));
            }
        }
    }
    if !differences.is_empty() {
        let count = differences.len();
        differences.truncate(SHOWN);
        bail!("{count} line(s) differ:\n{}", differences.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lines: &[(&str, &str)]) -> Transcript {
        let mut told = Transcript::default();
        for (case, line) in lines {
            told.say(case, line);
        }
        told
    }

    #[test]
    fn the_same_lines_are_the_same() -> Result<()> {
        let lines = [("a", "1\n2"), ("b", "3")];
        same(&told(&lines), &told(&lines), Mode::On)
    }

    #[test]
    fn another_line_a_missing_one_and_one_more_are_found() {
        let plain = told(&[("a", "1\n2")]);
        for other in ["1\n3", "1", "1\n2\n3"] {
            assert!(
                same(&plain, &told(&[("a", other)]), Mode::Default).is_err(),
                "{other}"
            );
        }
        assert!(same(&told(&[]), &told(&[]), Mode::Default).is_err());
    }
}
