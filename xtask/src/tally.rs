//! Counts the results of several test programs from what they print. Pure; called by `test`.

/// What was read so far.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub ignored: u64,
    /// Test programs that began and never gave a result: killed, aborted, or ended by a test.
    pub unfinished: u64,
    failed: u64,
    running: bool,
}

impl Tally {
    /// Reads one line of output.
    pub fn read(&mut self, line: &str) {
        if is_header(line) {
            self.close();
            self.running = true;
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            self.running = false;
            self.passed += count(counts, "passed");
            self.failed += count(counts, "failed");
            self.ignored += count(counts, "ignored");
        }
    }

    /// After the last line.
    pub fn finish(mut self) -> Self {
        self.close();
        self
    }

    /// With what another one has read, to its last line.
    pub fn add(&mut self, other: Self) {
        let other = other.finish();
        self.passed += other.passed;
        self.ignored += other.ignored;
        self.unfinished += other.unfinished;
        self.failed += other.failed;
    }

    /// Tests that failed, and one for every program that ended without a result.
    pub fn failed(&self) -> u64 {
        self.failed + self.unfinished
    }

    /// Tests that were run.
    pub fn total(&self) -> u64 {
        self.passed + self.failed()
    }

    fn close(&mut self) {
        self.unfinished += u64::from(self.running);
        self.running = false;
    }
}

/// `running 12 tests`
fn is_header(line: &str) -> bool {
    let Some((number, noun)) = line
        .strip_prefix("running ")
        .and_then(|rest| rest.split_once(' '))
    else {
        return false;
    };
    number.parse::<u64>().is_ok() && matches!(noun, "test" | "tests")
}

/// The number before a word in `ok. 3 passed; 0 failed; …`
fn count(counts: &str, word: &str) -> u64 {
    let number = counts
        .split([';', '.'])
        .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok());
    number.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(lines: &[&str]) -> Tally {
        let mut tally = Tally::default();
        for line in lines {
            tally.read(line);
        }
        tally.finish()
    }

    const GOOD: &str = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s";
    const BAD: &str = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s";

    #[test]
    fn results_of_all_programs_are_added() {
        let tally = tally(&[
            "running 4 tests",
            "test a ... ok",
            GOOD,
            "",
            "running 3 tests",
            BAD,
        ]);
        assert_eq!(
            (
                tally.passed,
                tally.failed(),
                tally.ignored,
                tally.unfinished
            ),
            (4, 2, 1, 0)
        );
    }

    #[test]
    fn program_that_dies_counts_as_a_failure() {
        let middle = tally(&["running 9 tests", "test a ... ok", "running 4 tests", GOOD]);
        assert_eq!((middle.passed, middle.failed()), (3, 1));
        let last = tally(&["running 4 tests", GOOD, "running 1 test"]);
        assert_eq!((last.passed, last.failed()), (3, 1));
    }

    #[test]
    fn other_lines_count_for_nothing() {
        let tally = tally(&[
            "running late tests",
            "running 3 tests in a row",
            "result: 9 passed",
            " test result: 1 passed",
        ]);
        assert_eq!(tally, Tally::default());
    }
}
