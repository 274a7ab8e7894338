//! Removing what a run made: cgroups with their processes, namespaces, pinned BPF objects, files.
//!
//! Three ways lead here, all by name and none by memory: [`Fabric`](crate::Fabric)'s drop; a supervisor process (a few
//! lines of shell that wait for the end of a pipe this process holds, so SIGKILL is covered too); and [`clean_stale`]
//! for what neither could remove.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::run::RunId;
use crate::{cgroup, netns};

/// Where bpffs is mounted.
pub const BPFFS: &str = "/sys/fs/bpf";
/// Below it a fabric keeps its files: root's alone, and short enough for the path of a unix socket.
pub(crate) const RUN: &str = "/run";

const KILL_TIMEOUT: Duration = Duration::from_secs(10);
const SUPERVISOR: &str = include_str!("supervise.sh");

/// Mounts bpffs where it belongs, if it is not there.
pub(crate) fn ensure_bpffs() -> Result<()> {
    // Two threads that both find it missing would mount it twice, one hiding the other.
    static MOUNTING: Mutex<()> = Mutex::new(());
    let _mounting = MOUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let kind = statfs(BPFFS)
        .with_context(|| format!("{BPFFS}: does this kernel have BPF, and is sysfs mounted?"))?;
    if kind.filesystem_type() != BPF_FS_MAGIC {
        mount(
            Some("bpf"),
            BPFFS,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mounting bpffs on {BPFFS}: are you root?"))?;
    }
    Ok(())
}

/// Starts this process's supervisor, once. Dropping the pipe's end is all it waits for, and only our death does that.
pub(crate) fn supervise(run: &RunId) -> Result<()> {
    static PIPE: Mutex<Option<ChildStdin>> = Mutex::new(None);
    let mut pipe = PIPE.lock().unwrap_or_else(PoisonError::into_inner);
    if pipe.is_some() {
        return Ok(());
    }
    let mut command = Command::new("/bin/sh");
    command
        .args([
            "-c",
            SUPERVISOR,
            "culvert-test-supervisor",
            &run.owner_prefix(),
        ])
        .arg(cgroup::root()?)
        .args([BPFFS, RUN])
        .current_dir("/")
        // Out of the terminal's group: what interrupts the tests must not interrupt the cleaning.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command
        .spawn()
        .context("starting the supervisor with /bin/sh")?;
    *pipe = child.stdin.take();
    Ok(())
}

/// Removes everything of one run. Goes on after an error, and reports them together.
pub(crate) fn remove_run(run: &RunId) -> Result<()> {
    let mut errors = Vec::new();
    let mut attempt = |outcome: Result<()>| errors.extend(outcome.err());
    // Programs first: they hold the rest.
    attempt(
        cgroup::root()
            .and_then(|root| cgroup::remove_tree(&root.join(run.directory()), KILL_TIMEOUT)),
    );
    for name in names_in(netns::DIRECTORY) {
        if RunId::of_netns(&name).as_ref() == Some(run) {
            attempt(netns::delete(&name));
        }
    }
    attempt(remove_directory(&Path::new(BPFFS).join(run.directory())));
    attempt(remove_directory(&Path::new(RUN).join(run.directory())));
    if errors.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = errors.iter().map(|error| format!("{error:#}")).collect();
    Err(anyhow!(
        "removing test run {run}: {}; `cargo xtask clean` tries again",
        list.join("; ")
    ))
}

/// Removes what dead processes left behind, and returns the runs that were removed. Runs whose process lives stay.
pub fn clean_stale() -> Result<Vec<RunId>> {
    let mut runs: BTreeSet<RunId> = names_in(netns::DIRECTORY)
        .filter_map(|name| RunId::of_netns(&name))
        .collect();
    let root = cgroup::root()?;
    for directory in [root.as_path(), Path::new(BPFFS), Path::new(RUN)] {
        runs.extend(names_in(directory).filter_map(|name| RunId::of_directory(&name)));
    }
    runs.retain(|run| !run.owner_alive());
    let failed: Vec<String> = runs
        .iter()
        .filter_map(|run| remove_run(run).err())
        .map(|error| format!("{error:#}"))
        .collect();
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(runs.into_iter().collect())
}

fn names_in(directory: impl AsRef<Path>) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str().map(str::to_owned))
}

/// Removes a directory of ours; its name is checked once more, since this deletes recursively as root.
fn remove_directory(path: &Path) -> Result<()> {
    if path
        .file_name()
        .and_then(OsStr::to_str)
        .and_then(RunId::of_directory)
        .is_none()
    {
        bail!("{} is not a directory of a test run", path.display());
    }
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}
