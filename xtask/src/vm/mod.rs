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
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
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
/// As many as the guest has processors.
const THREADS: &str = "2";
/// How a guest's kernel dies where one emulated processor goes on with code that another one has patched: it meets the breakpoint that
/// stood there meanwhile. That it is the emulator's is likely and not proven.
const STALE_CODE: &str = "Oops: int3";
/// How the tests' harness begins the line in which it says that a kernel lacks something.
const LACKS: &str = "not on this kernel: ";

pub fn vm(options: &VmOptions) -> anyhow::Result<()> {
    workspace::build()?;
    let mut tally = Tally::default();
    let kernels = options
        .kernel
        .map_or(Kernel::ALL.to_vec(), |kernel| vec![kernel]);
    let passed = on(&kernels, &options.filters, &[], &mut tally)?;
    test::report(tally.finish(), passed, &options.filters)
}

/// Runs the tests whose names contain one of `filters` on each of the kernels, after a build; says whether all was well.
/// What fails on one kernel does not keep the next from being asked.
///
/// Tests whose names contain one of `left_out` do not run.
pub fn on(
    kernels: &[Kernel],
    filters: &[String],
    left_out: &[&str],
    tally: &mut Tally,
) -> anyhow::Result<bool> {
    let tests = test_program()?;
    if !has_any(&tests, filters)? {
        return Ok(true);
    }
    let images = setup::setup_for_guests(kernels)?;
    let programs = Programs {
        agent: workspace::program("culvert")?,
        probe: workspace::program("culvert-probe")?,
        tests,
        arguments: ["--test-threads", THREADS]
            .map(str::to_owned)
            .into_iter()
            .chain(filters.iter().cloned())
            .chain(
                left_out
                    .iter()
                    .flat_map(|name| ["--skip".to_owned(), (*name).to_owned()]),
            )
            .collect(),
    };
    let mut passed = true;
    for image in &images {
        match run(image, &programs, tally) {
            Ok(succeeded) => passed &= succeeded,
            Err(error) => {
                step(
                    &format!("Linux {} failed", image.kernel.name()),
                    &format!("{error:#}"),
                );
                passed = false;
            }
        }
    }
    Ok(passed)
}

fn run(image: &Image, programs: &Programs, tally: &mut Tally) -> anyhow::Result<bool> {
    let name = image.kernel.name();
    step(
        &format!("boot Linux {}", image.release),
        "the tests of the kernel part, under emulation: some minutes for all of them",
    );
    let initramfs = Initramfs::write(image, programs)?;
    let mut lacks = Vec::new();
    let mut stdout = io::stdout().lock();
    let mut any_failed = false;
    let mut attempt = |tally: &mut Tally, any_failed: &mut bool| {
        guest::run(image, initramfs.path(), |line| {
            tally.read(line);
            *any_failed |= line.ends_with("... FAILED");
            if let Some((_, what)) = line.split_once(LACKS) {
                lacks.push(what.to_owned());
            }
            // A reader that went away does not end the tests.
            let _ = writeln!(stdout, "{name} | {line}");
        })
    };
    let mut read = Tally::default();
    let mut status = attempt(&mut read, &mut any_failed);
    // What a test has found is not asked a second time.
    if !any_failed
        && status
            .as_ref()
            .is_err_and(|error| format!("{error:#}").contains(STALE_CODE))
    {
        step(
            &format!("boot Linux {name} again"),
            "its kernel met a breakpoint of its own patching, which is taken for the emulator's doing",
        );
        read = Tally::default();
        status = attempt(&mut read, &mut any_failed);
    }
    tally.add(read);
    let status = status?;
    for what in &lacks {
        let _ = writeln!(stdout, "Linux {name} lacks: {what}");
    }
    Ok(status == 0)
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

/// A guest that has nothing to run would take its time all the same.
fn has_any(tests: &Path, filters: &[String]) -> anyhow::Result<bool> {
    let list = ask(Command::new(tests)
        .args(["--list", "--format", "terse"])
        .args(filters))
    .with_context(|| format!("{} does not list its tests", tests.display()))?;
    Ok(list.lines().any(|line| line.ends_with(": test")))
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
    fn lacks_are_recognised_as_the_harness_writes_them() {
        let harness = include_str!("../../../tests/harness/src/lacks.rs");
        assert!(harness.contains(&format!("\"{LACKS}\"")));
    }
}
