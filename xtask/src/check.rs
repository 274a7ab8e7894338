//! `cargo xtask check`: formatting, lints, dependencies. Goes on after a failure and names all of them at the end.

use anyhow::{Context as _, bail};
use xtask::ebpf;

use crate::{
    command::{ask, run, step},
    setup, workspace,
};

type Check = (&'static str, &'static str, fn() -> anyhow::Result<()>);

const CHECKS: [Check; 6] = [
    (
        "formatting",
        "rustfmt.toml, agent and eBPF programs",
        formatting,
    ),
    (
        "clippy",
        "warnings are errors, in all code with the test knobs",
        clippy,
    ),
    (
        "clippy of the release features",
        "what ships is built without the test knobs",
        clippy_release,
    ),
    ("eBPF warnings", "are errors as well", ebpf_warnings),
    (
        "dependencies of the agent",
        "bans, licences, sources (deny.toml)",
        || deny("Cargo.toml"),
    ),
    (
        "dependencies of the eBPF programs",
        "bans, licences, sources (deny.toml)",
        || deny("ebpf-programs/Cargo.toml"),
    ),
];

pub fn check() -> anyhow::Result<()> {
    setup::setup_for_check()?;
    require_component("fmt", "rustfmt")?;
    require_component("clippy", "clippy")?;
    let mut failed = Vec::new();
    for (name, why, check) in CHECKS {
        step(name, why);
        if let Err(error) = check() {
            step(&format!("{name} failed"), &format!("{error:#}"));
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!(
            "{} of {} checks failed: {}",
            failed.len(),
            CHECKS.len(),
            failed.join(", ")
        );
    }
    step("all checks passed", "formatting, lints, dependencies");
    Ok(())
}

fn require_component(subcommand: &str, component: &str) -> anyhow::Result<()> {
    ask(workspace::cargo().args([subcommand, "--version"])).with_context(|| {
        format!("`cargo {subcommand}` is not installed: `rustup component add {component}`")
    })?;
    Ok(())
}

fn formatting() -> anyhow::Result<()> {
    let agent = run(workspace::cargo().args(["fmt", "--all", "--check"]));
    let kernel = run(workspace::cargo()
        .current_dir(ebpf::source())
        .args(["fmt", "--check"]));
    if agent.is_err() || kernel.is_err() {
        bail!("`cargo fmt --all`, and the same in ebpf-programs, mends it");
    }
    Ok(())
}

fn clippy() -> anyhow::Result<()> {
    let flags = ["--locked", "--all-targets", "--", "--deny", "warnings"];
    run(workspace::cargo()
        .arg("clippy")
        .args(workspace::SELECTION)
        .args(flags))
}

/// The agent alone: the tests' package turns the knobs on for all that is built with it.
fn clippy_release() -> anyhow::Result<()> {
    run(workspace::cargo().args([
        "clippy",
        "--locked",
        "--package",
        "culvert",
        "--",
        "--deny",
        "warnings",
    ]))
}

/// Not clippy: one that matches the compiler of the eBPF target (Debian's) is packaged nowhere.
fn ebpf_warnings() -> anyhow::Result<()> {
    ebpf::deny_warnings()
}

fn deny(manifest: &str) -> anyhow::Result<()> {
    let place = [
        "deny",
        "--locked",
        "--manifest-path",
        manifest,
        "--config",
        "deny.toml",
    ];
    run(workspace::cargo()
        .args(place)
        .args(["check", "bans", "licenses", "sources"]))
}
