//! `cargo xtask test`: every test of the workspace, and one closing line over all test programs.

use std::{
    env,
    io::{self, BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use crate::{
    arguments::TestOptions,
    command::step,
    packages::{self, Need},
    tally::Tally,
    vm::{self, Kernel, Selection},
    workspace,
};

const THREADS: &str = "RUST_TEST_THREADS";

/// Tests that only `cargo xtask vm` and `cargo xtask test --long` run under emulation: those that make much load, which take minutes
/// each there, and twins, since that a test can fail is shown on this machine's kernel.
const LEFT_OUT: [&str; 13] = [
    "twin_",
    "changes::",
    "churn::",
    "crowd::",
    "full_tables::",
    "greed::",
    "disruption::",
    "life::",
    "many_flows::",
    "services::shares",
    "come_and_go",
    "telemetry::",
    "two_thousand",
];

/// Long tests that take what others need to pass: each runs by itself, after all the others.
const ALONE: &str = "five_hundred_";

/// What is tried on the oldest kernel each time: that its verifier takes the programs, and that connections go their ways.
const OLDEST: &str = "addresses::";

pub fn test(options: &TestOptions) -> anyhow::Result<()> {
    // The benchmark is tested as well.
    packages::provide(&[Need::Load, Need::Programs])?;
    workspace::build()?;
    workspace::clean_stale_runs()?;
    let mut tally = Tally::default();
    let mut succeeded = if options.long && options.filters.is_empty() {
        let others = on_this_kernel(&["--include-ignored", "--skip", ALONE], &mut tally)?;
        let alone = ["--include-ignored", ALONE, "--test-threads", "1"];
        on_this_kernel(&alone, &mut tally)? && others
    } else {
        let filters = options.filters.iter().map(String::as_str);
        let all = options.long.then_some("--include-ignored").into_iter();
        on_this_kernel(&filters.chain(all).collect::<Vec<_>>(), &mut tally)?
    };
    let left_out = if options.long || !options.filters.is_empty() {
        &[][..]
    } else {
        &LEFT_OUT
    };
    if !options.host {
        let oldest = [OLDEST.to_owned()];
        let mut selections = vec![Selection {
            kernel: Kernel::V6_12,
            filters: &options.filters,
        }];
        if options.filters.is_empty() {
            selections.push(Selection {
                kernel: Kernel::V6_1,
                filters: &oldest,
            });
        }
        succeeded &= vm::on(&selections, left_out, &mut tally).unwrap_or_else(|error| {
            step("no other kernel was tested", &format!("{error:#}"));
            false
        });
    }
    if tally.ignored > 0 && !options.long {
        println!(
            "{} long test(s) left out; `cargo xtask test --long` runs them",
            tally.ignored
        );
    }
    report(tally.finish(), succeeded, &options.filters)
}

/// Runs the tests that these arguments of a test program select; says whether cargo itself was content.
fn on_this_kernel(arguments: &[&str], tally: &mut Tally) -> anyhow::Result<bool> {
    let mut command = workspace::cargo();
    workspace::name_programs(&mut command)?;
    command
        .arg("test")
        .args(workspace::SELECTION)
        .arg("--no-fail-fast")
        .arg("--")
        .args(arguments);
    if env::var_os(THREADS).is_none() {
        command.env(THREADS, threads().to_string());
    }
    watch(&mut command, tally)
}

/// Tests in namespaces mostly wait; a few more of them than processors do not disturb each other's deadlines.
fn threads() -> usize {
    let processors = std::thread::available_parallelism().map_or(2, usize::from);
    (2 * processors).clamp(2, 8)
}

/// Runs cargo, passes its output on and counts; says whether cargo itself was content.
fn watch(command: &mut Command, tally: &mut Tally) -> anyhow::Result<bool> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start cargo test")?;
    let output = child
        .stdout
        .take()
        .context("cargo test has no output to read")?;
    // Bytes, since a test may print anything.
    for line in BufReader::new(output).split(b'\n') {
        let mut line = line.context("cannot read what cargo test prints")?;
        tally.read(&String::from_utf8_lossy(&line));
        line.push(b'\n');
        // A reader that went away does not end the tests.
        let _ = io::stdout().write_all(&line);
    }
    let status = child.wait().context("cannot wait for cargo test")?;
    Ok(status.success())
}

/// The closing line, and the exit status with it. Also called by `vm`.
pub fn report(tally: Tally, succeeded: bool, filters: &[String]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    let mut say = |line: String| {
        let _ = writeln!(stdout, "{line}");
    };
    if tally.unfinished > 0 {
        say(format!(
            "{} test program(s) ended without a result, counted as failed",
            tally.unfinished
        ));
    }
    if tally.total() == 0 {
        if succeeded {
            bail!("no test has a name that contains {}", filters.join(" or "));
        }
        bail!("the tests did not run; cargo's message is above");
    }
    // cargo may fail for a reason that no test printed: a test program that did not build or start.
    let failed = if succeeded {
        tally.failed()
    } else {
        tally.failed().max(1)
    };
    say(format!("{} passed, {failed} failed", tally.passed));
    // The closing line says it all: nothing may come after it.
    if failed > 0 {
        drop(stdout);
        std::process::exit(1);
    }
    Ok(())
}
