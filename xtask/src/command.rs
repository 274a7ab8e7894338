//! Running other programs: visibly or quietly, always without a standard input, and never with output on ours unless it
//! is the task's result (`demo --json` promises one document and nothing else). Called by every task.

use std::{
    env,
    io::{self, Write as _},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

/// Tells on standard error what is about to be done, and why.
pub fn step(what: &str, why: &str) {
    let _ = writeln!(io::stderr(), "==> {what}: {why}");
}

/// Runs a program that keeps the user informed itself; what it prints goes to standard error.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let shown = show(command);
    let status = command
        .stdin(Stdio::null())
        .stdout(io::stderr())
        .status()
        .with_context(|| format!("cannot start `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed ({status}); what it printed is above");
    }
    Ok(())
}

/// Runs a program whose output matters only if it fails.
pub fn run_quietly(command: &mut Command) -> anyhow::Result<()> {
    let shown = show(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{shown}`"))?;
    if !output.status.success() {
        let mut stderr = io::stderr().lock();
        let _ = stderr
            .write_all(&output.stdout)
            .and_then(|()| stderr.write_all(&output.stderr));
        bail!(
            "`{shown}` failed ({}); what it printed is above",
            output.status
        );
    }
    Ok(())
}

/// Standard output of a program that succeeded; `None` also if it is not there.
pub fn ask(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A program of this machine, also where root's PATH lacks the directories for root.
pub fn find(name: &str) -> anyhow::Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    directories
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("`{name}` is not on this machine: install it"))
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
