//! Cargo and the programs it builds. There is one profile and one set of features for test, demo and CI, so that nothing
//! is built twice. Called by every task that builds.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use xtask::ebpf;

use crate::{command::run, setup};

/// Packages and features of every build; see [`build`] for what else must agree.
pub const SELECTION: [&str; 3] = ["--workspace", "--features", "culvert/test-knobs"];

/// Programs that tests and demo start, by the variable under which the harness looks for them.
const PROGRAMS: [(&str, &str); 2] = [
    ("CULVERT_BINARY", "culvert"),
    ("CULVERT_PROBE", "culvert-probe"),
];

/// The cargo that runs us, in the repository, without what it told us about ourselves.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command.current_dir(ebpf::repository());
    if let Some(directory) = target_directory_setting() {
        command.env("CARGO_TARGET_DIR", directory);
    }
    command
}

/// Setup, then everything that tests and demo start.
pub fn build() -> anyhow::Result<()> {
    setup::setup()?;
    // Naming one test makes cargo count the features that development dependencies ask for. Without it `cargo test` would
    // build half of the dependencies, and the agent, a second time with a few features more.
    run(cargo()
        .arg("build")
        .args(SELECTION)
        .args(["--bins", "--test", "selftest"]))
}

/// A program of the workspace, built by [`build`].
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let path = target_directory().join("debug").join(name);
    if !path.is_file() {
        bail!(
            "{} is not there although the build succeeded: does cargo build somewhere else?",
            path.display()
        );
    }
    Ok(path)
}

/// Tells the harness which programs to start.
pub fn name_programs(command: &mut Command) -> anyhow::Result<()> {
    for (variable, name) in PROGRAMS {
        command.env(variable, program(name)?);
    }
    Ok(())
}

/// Removes what dead test runs left behind; says on standard error what that was.
pub fn clean_stale_runs() -> anyhow::Result<()> {
    run(&mut Command::new(program("culvert-clean")?))
        .context("cannot remove what an earlier test run left behind")
}

/// Where everything that is built goes.
pub fn target_directory() -> PathBuf {
    target_directory_setting().unwrap_or_else(|| ebpf::repository().join("target"))
}

/// Absolute, since it is relative to where cargo was called.
fn target_directory_setting() -> Option<PathBuf> {
    let setting = env::var_os("CARGO_TARGET_DIR").filter(|setting| !setting.is_empty())?;
    std::path::absolute(Path::new(&setting)).ok()
}
