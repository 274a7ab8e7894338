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

/// Cases that are known, and documented, to go otherwise where a short-circuit is asked for, by the beginnings of their names.
/// Nothing differs by default.
const MUST_DIFFER: &[&str] = &[
    // Urgent data comes among the rest, and nobody is told of it.
    "urgent, nonblocking, used",
    "urgent_in_line, nonblocking, used",
    // Reads as the short-circuit's queue has them: without SO_PEEK_OFF, TCP_INQ, and MSG_TRUNC's throwing away.
    "peek_offset, nonblocking, used",
    "inquiries, nonblocking, used",
    "trunc_throws_away, nonblocking, used",
    // Nothing is sent without a copy, and nobody told that it was.
    "zero_copy, nonblocking, used",
    // Who closes without having read ends with a FIN.
    "closed_with_bytes_unread, nonblocking, used",
    "closed_with_bytes_unread_and_read_late, nonblocking, used",
    // A reset is told twice.
    "aborted, nonblocking, used",
    "aborted, nonblocking at first, used",
    // A read that was woken up for nothing says so, even on a socket that blocks by now.
    "signals, nonblocking at first, used",
];
/// Those that do so by chance, or on some kernels.
const MAY_DIFFER: &[&str] = &[
    // FIONREAD knows of redirected bytes alone, or on older kernels of all others: who trusts it waits for what is there.
    "fionread, nonblocking, used",
    "fionread, nonblocking at first, used",
    "peek, nonblocking, used",
    "peek, nonblocking at first, used",
    "trunc_throws_away, nonblocking at first, used",
    "urgent, nonblocking at first, used",
    "read_by_edges, nonblocking",
    "read_by_edges, nonblocking at first, used",
    // As above, where it depends on who is faster.
    "blocked_recv_of_an_aborted, nonblocking at first, used",
    "blocked_send_to_one_who_closes, nonblocking at first, used",
    "two_threads_read, nonblocking at first, used",
    // A read ends where what was redirected ends.
    "half_closed_by_the_reader_and_closed_by_the_writer, nonblocking, used",
    // nginx uses FIONREAD for what is put there, also by way of a proxy. The first such flow may be short-circuited by then, and is reset.
    "put",
    "put by copy",
    "kept",
    // Splice does not see what is redirected.
    "echo by splice",
    "relay by splice",
    "large by splice",
    "put by splice",
    "many by splice",
    "connections by splice",
    "wrk by splice",
    "splice_what_is_there, nonblocking, used",
    "splice_a_megabyte, nonblocking, used",
    "nothing_to_splice, nonblocking, used",
];

fn is_known(known: &[&str], mode: Mode, case: &str) -> bool {
    let begins = |start: &&str| {
        let rest = case.strip_prefix(start);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(", "))
    };
    mode == Mode::On && known.iter().any(begins)
}

/// Demands that two accounts are the same; those of cases known to differ must differ.
pub fn same(plain: &Transcript, direct: &Transcript, mode: Mode) -> Result<()> {
    ensure!(!plain.0.is_empty(), "the programs said nothing");
    let mut differences = Vec::new();
    for case in plain.cases().union(&direct.cases()) {
        let (without, with) = (plain.of(case), direct.of(case));
        let must_differ = is_known(MUST_DIFFER, mode, case);
        if must_differ && without == with {
            differences.push(format!("{case}: is known to differ, and does not"));
        }
        if must_differ || without == with || is_known(MAY_DIFFER, mode, case) {
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

    #[test]
    fn what_is_known_to_differ_must_with_the_short_circuit_and_may_not_without() {
        let case = format!("{}, client reads", MUST_DIFFER[0]);
        let (plain, other) = (told(&[(&case, "1")]), told(&[(&case, "2")]));
        assert!(same(&plain, &other, Mode::On).is_ok());
        assert!(same(&plain, &plain, Mode::On).is_err());
        assert!(same(&plain, &other, Mode::Default).is_err());
        assert!(same(&plain, &plain, Mode::Default).is_ok());
    }

    #[test]
    fn what_may_differ_need_not_and_a_longer_name_is_another_case() {
        let known = MAY_DIFFER[0];
        let longer = format!("{known} too");
        for (case, may) in [(known, true), (longer.as_str(), false)] {
            let (plain, other) = (told(&[(case, "1")]), told(&[(case, "2")]));
            assert_eq!(same(&plain, &other, Mode::On).is_ok(), may, "{case}");
            assert!(same(&plain, &plain, Mode::On).is_ok());
        }
    }
}
