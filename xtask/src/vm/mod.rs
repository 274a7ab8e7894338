//! `cargo xtask vm`: boots older kernels under emulation and runs the tests of the kernel part inside them, with the programs
//! that this machine built. Version numbers decide nothing in Culvert, kernels do: an older verifier is asked here.
//!
//! A guest is a kernel and one archive ([`initramfs`]); its console is its only output. Also called by `test`.

mod cpio;
pub mod emulator;
mod guest;
mod initramfs;
mod kernel;

use std::{
    collections::VecDeque,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, bail};
use serde_json::Value;

use self::initramfs::{Initramfs, Programs};
pub use self::kernel::{Image, Kernel, provide};
use crate::{
    arguments::VmOptions,
    command::{ask, step},
    setup,
    tally::Tally,
    test, workspace,
};

/// The test program of the kernel part.
const TESTS: &str = "kernel";
/// As many as a guest has processors.
const THREADS: &str = "2";
/// A guest runs as much at a time as one of our processors does, so that there is one for each. More of them than this need more
/// memory than most machines have.
const MOST_GUESTS: usize = 8;
/// Parts of one kernel's tests for each guest that runs at a time: the last ones to end shall not keep the others waiting for long.
const PARTS_EACH: usize = 2;
/// Fewer tests than this are not worth the time that another guest takes to boot.
const LEAST_TESTS: usize = 8;
/// How the tests' harness begins the line in which it says that a kernel lacks something.
const LACKS: &str = "not on this kernel: ";

/// Which tests run on a kernel.
pub struct Selection<'a> {
    pub kernel: Kernel,
    /// Those whose names contain one of these; all where there is none.
    pub filters: &'a [String],
}

/// What one guest does.
struct Part<'a> {
    image: &'a Image,
    number: usize,
    /// Whole names.
    tests: Vec<String>,
}

pub fn vm(options: &VmOptions) -> anyhow::Result<()> {
    workspace::build()?;
    let mut tally = Tally::default();
    let kernels = options
        .kernel
        .map_or(Kernel::ALL.to_vec(), |kernel| vec![kernel]);
    let selections: Vec<Selection> = kernels
        .into_iter()
        .map(|kernel| Selection {
            kernel,
            filters: &options.filters,
        })
        .collect();
    let passed = on(&selections, &[], &mut tally)?;
    test::report(tally.finish(), passed, &options.filters)
}

/// Runs tests on other kernels, after a build, in as many guests at a time as there are processors; says whether all was well. What
/// fails in one guest does not keep the next from being asked.
///
/// Tests whose names contain one of `left_out` do not run.
pub fn on(selections: &[Selection], left_out: &[&str], tally: &mut Tally) -> anyhow::Result<bool> {
    let tests = test_program()?;
    let selected: Vec<Vec<String>> = selections
        .iter()
        .map(|selection| list(&tests, selection.filters, left_out))
        .collect::<anyhow::Result<_>>()?;
    if selected.iter().all(Vec::is_empty) {
        return Ok(true);
    }
    let kernels: Vec<Kernel> = selections.iter().map(|one| one.kernel).collect();
    let images = setup::setup_for_guests(&kernels)?;
    let programs = Programs {
        agent: workspace::program("culvert")?,
        probe: workspace::program("culvert-probe")?,
        tests,
    };
    let at_once = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(MOST_GUESTS);
    let mut parts = VecDeque::new();
    for (image, tests) in images.iter().zip(selected) {
        initramfs::remove_stale(&image.kernel.directory())?;
        step(
            &format!("boot Linux {}", image.release),
            &format!(
                "{} tests of the kernel part, under emulation, in {at_once} machines at a time",
                tests.len()
            ),
        );
        let shares = divide(&tests, at_once * PARTS_EACH);
        parts.extend(shares.into_iter().enumerate().map(|(index, tests)| Part {
            image,
            number: index + 1,
            tests,
        }));
    }
    let parts = Mutex::new(parts);
    let next = || {
        parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    let run_some = || {
        let mut results = Vec::new();
        while let Some(part) = next() {
            results.push(run(&part, &programs));
        }
        results
    };
    let results: Vec<(Tally, bool)> = thread::scope(|scope| {
        let guests: Vec<_> = (0..at_once).map(|_| scope.spawn(run_some)).collect();
        guests
            .into_iter()
            .flat_map(|guest| {
                guest
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    });
    let mut passed = true;
    for (read, succeeded) in results {
        tally.add(read);
        passed &= succeeded;
    }
    Ok(passed)
}

/// Neighbours in the list are alike, so that each part gets some of all kinds.
fn divide(tests: &[String], most: usize) -> Vec<Vec<String>> {
    let number = tests.len().div_ceil(LEAST_TESTS).min(most.max(1));
    let share = |first| tests.iter().skip(first).step_by(number).cloned().collect();
    (0..number).map(share).collect()
}

fn run(part: &Part, programs: &Programs) -> (Tally, bool) {
    let name = format!("{}.{}", part.image.kernel.name(), part.number);
    let mut tally = Tally::default();
    let mut lacks = Vec::new();
    // A reader that went away does not end the tests.
    let say = |text: &str| {
        let _ = writeln!(io::stdout().lock(), "{text}");
    };
    let arguments: Vec<String> = ["--test-threads", THREADS, "--exact"]
        .map(str::to_owned)
        .into_iter()
        .chain(part.tests.iter().cloned())
        .collect();
    let status =
        Initramfs::write(part.image, programs, part.number, &arguments).and_then(|initramfs| {
            guest::run(part.image, initramfs.path(), |line| {
                tally.read(line);
                if let Some((_, what)) = line.split_once(LACKS) {
                    lacks.push(what.to_owned());
                }
                say(&format!("{name} | {line}"));
            })
        });
    for what in &lacks {
        say(&format!("Linux {name} lacks: {what}"));
    }
    let passed = match status {
        Ok(status) => status == 0,
        Err(error) => {
            step(&format!("Linux {name} failed"), &format!("{error:#}"));
            false
        }
    };
    (tally, passed)
}

/// The program that `cargo test` runs. Selected as [`workspace::build`] selects: `cargo test --test` counts the features of
/// dependencies otherwise, and would build one of its own.
fn test_program() -> anyhow::Result<PathBuf> {
    let mut command = workspace::cargo();
    command.arg("build").args(workspace::SELECTION).args([
        "--bins",
        "--test",
        TESTS,
        "--message-format",
        "json-render-diagnostics",
    ]);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo build")?;
    if !output.status.success() {
        bail!("the tests do not build; cargo's message is above");
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    messages
        .lines()
        .find_map(executable)
        .with_context(|| format!("cargo built no test program `{TESTS}`"))
}

/// The program in one of cargo's messages, if it is the one.
fn executable(message: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    let is_it =
        message.pointer("/target/name")? == TESTS && message.pointer("/profile/test")? == true;
    is_it.then(|| message.get("executable")?.as_str().map(PathBuf::from))?
}

/// The tests whose names contain one of `filters`, and none of `left_out`.
fn list(tests: &Path, filters: &[String], left_out: &[&str]) -> anyhow::Result<Vec<String>> {
    let listed = ask(Command::new(tests)
        .args(["--list", "--format", "terse"])
        .args(filters)
        .args(left_out.iter().flat_map(|name| ["--skip", name])))
    .with_context(|| format!("{} does not list its tests", tests.display()))?;
    let names = listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"));
    Ok(names.map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_program_is_found_among_cargos_messages() {
        let program =
            r#"{"target":{"name":"kernel"},"profile":{"test":true},"executable":"/t/kernel-1"}"#;
        assert_eq!(executable(program), Some("/t/kernel-1".into()));
        for other in [
            r#"{"target":{"name":"kernel"},"profile":{"test":false},"executable":"/t/kernel-1"}"#,
            r#"{"target":{"name":"proxy"},"profile":{"test":true},"executable":"/t/proxy-1"}"#,
            r#"{"target":{"name":"kernel"},"profile":{"test":true},"executable":null}"#,
            r#"{"reason":"build-finished","success":true}"#,
            "warning: not JSON",
        ] {
            assert_eq!(executable(other), None, "{other}");
        }
    }

    #[test]
    fn every_test_is_in_one_part() {
        let tests: Vec<String> = (0..50).map(|number| number.to_string()).collect();
        for most in [0, 1, 2, 4, 100] {
            let parts = divide(&tests, most);
            assert!(parts.len() <= most.clamp(1, 7), "{most}");
            let sizes: Vec<usize> = parts.iter().map(Vec::len).collect();
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
            let mut all: Vec<String> = parts.into_iter().flatten().collect();
            all.sort_by_key(|name| name.parse::<u32>().unwrap());
            assert_eq!(all, tests);
        }
        assert_eq!(divide(&["one".to_owned()], 4), [["one"]]);
        assert!(divide(&[], 4).is_empty());
    }

    #[test]
    fn lacks_are_recognised_as_the_harness_writes_them() {
        let harness = include_str!("../../../tests/harness/src/lacks.rs");
        assert!(harness.contains(&format!("\"{LACKS}\"")));
    }
}
