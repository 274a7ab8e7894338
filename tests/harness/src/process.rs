//! Programs inside a pod or a node: started in its namespace and cgroup, their output kept, ended with their handle.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use serde_json::Value;

use crate::cgroup::Cgroup;
use crate::log::{Log, Mark, Stream};
use crate::netns::Netns;
use crate::patience::stretch;
use crate::sys;
use crate::wait;

/// How long a killed program may take to be gone.
const KILLED: Duration = Duration::from_secs(5);
/// How long the output of a program that has ended may take to arrive.
const DRAIN: Duration = Duration::from_secs(1);

/// A program about to be started.
#[derive(Debug)]
pub struct Launch {
    command: Command,
    label: String,
    netns: Netns,
    cgroup: Cgroup,
    stdin: bool,
}

impl Launch {
    pub(crate) fn new(program: &Path, place: &str, netns: &Netns, cgroup: &Cgroup) -> Self {
        let name = program
            .file_name()
            .unwrap_or(program.as_os_str())
            .to_string_lossy();
        let label = format!("{name} in {place}");
        Self {
            command: Command::new(program),
            label,
            netns: netns.clone(),
            cgroup: cgroup.clone(),
            stdin: false,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Sets environment variables.
    pub fn envs<K: AsRef<OsStr>, V: AsRef<OsStr>>(
        mut self,
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        self.command.envs(variables);
        self
    }

    /// Removes an inherited environment variable.
    pub fn env_remove(mut self, key: impl AsRef<OsStr>) -> Self {
        self.command.env_remove(key);
        self
    }

    /// Starts it in this directory instead of the caller's.
    pub fn directory(mut self, directory: impl AsRef<Path>) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Gives the program a pipe to read from ([`Proc::send_line`]) instead of nothing.
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// Starts it.
    pub fn spawn(mut self) -> Result<Proc> {
        sys::join_before_exec(&mut self.command, self.cgroup.procs()?, self.netns.open()?);
        let stdin = if self.stdin {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        // A group of its own: children are killed with it, and the terminal's SIGINT is left to the test.
        self.command
            .process_group(0)
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = self
            .command
            .spawn()
            .with_context(|| format!("starting {}: does the program exist?", self.label))?;
        Ok(Proc::watch(self.label, child))
    }

    /// Starts it and waits for its end.
    pub fn run(self, timeout: Duration) -> Result<Finished> {
        let process = self.spawn()?;
        let status = process.wait(timeout)?;
        Ok(Finished {
            label: process.label.clone(),
            status,
            stdout: process.log.text(Stream::Out),
            stderr: process.log.text(Stream::Err),
        })
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    label: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Finished {
    /// Its output, if it succeeded.
    pub fn success(self) -> Result<String> {
        ensure!(
            self.status.success(),
            "{}: {}: {}",
            self.label,
            self.status,
            self.stderr.trim()
        );
        Ok(self.stdout)
    }

    /// Its last line of output as JSON, whatever its exit status: how `culvert-probe` reports.
    pub fn json(&self) -> Result<Value> {
        let last = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| {
            format!(
                "{}: {}: `{last:.200}` is not JSON; {}",
                self.label,
                self.status,
                self.stderr.trim()
            )
        })
    }
}

/// A running program. Dropping it kills it and the children in its process group; a panic shows the end of its log.
#[derive(Debug)]
pub struct Proc {
    label: String,
    pid: Pid,
    log: Log,
    stdin: Mutex<Option<ChildStdin>>,
    end: Arc<End>,
}

#[derive(Debug, Default)]
struct End {
    /// Set under the lock in which the child is reaped, so that whoever sees `None` may still use its pid.
    status: Mutex<Option<ExitStatus>>,
    ended: Condvar,
}

impl End {
    fn status(&self) -> MutexGuard<'_, Option<ExitStatus>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Proc {
    fn watch(label: String, mut child: Child) -> Self {
        // A pid fits: pid_max is 2^22 at most.
        let pid = Pid::from_raw(child.id().cast_signed());
        let log = Log::default();
        if let Some(stdout) = child.stdout.take() {
            log.follow(Stream::Out, stdout);
        }
        if let Some(stderr) = child.stderr.take() {
            log.follow(Stream::Err, stderr);
        }
        let stdin = Mutex::new(child.stdin.take());
        let end = Arc::new(End::default());
        let reaper = end.clone();
        std::thread::spawn(move || {
            while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
                == Err(nix::Error::EINTR)
            {}
            let mut status = reaper.status();
            // Only a child that somebody else reaped has no status left to give.
            *status = Some(child.wait().unwrap_or(ExitStatus::from_raw(0xff00)));
            reaper.ended.notify_all();
        });
        Self {
            label,
            pid,
            log,
            stdin,
            end,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().cast_unsigned()
    }

    /// What it has printed.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Waits for a line that contains `needle`, among those already printed too, and returns it.
    pub fn wait_for_line(&self, needle: &str, timeout: Duration) -> Result<String> {
        self.wait_for_line_after(Mark::default(), needle, timeout)
    }

    /// The same, among the lines after a [`Log::mark`].
    pub fn wait_for_line_after(
        &self,
        mark: Mark,
        needle: &str,
        timeout: Duration,
    ) -> Result<String> {
        let pick = |line: &crate::log::Line| line.text.contains(needle).then(|| line.text.clone());
        self.log
            .wait_for(mark, timeout, &format!("`{needle}`"), pick)
            .with_context(|| self.label.clone())
    }

    /// Waits for a line of JSON whose `event` is `name`: how `culvert-probe` tells what happens.
    pub fn wait_for_event(&self, name: &str, timeout: Duration) -> Result<Value> {
        self.wait_for_event_after(Mark::default(), name, timeout)
    }

    /// The same, among the lines after a [`Log::mark`].
    pub fn wait_for_event_after(&self, mark: Mark, name: &str, timeout: Duration) -> Result<Value> {
        let pick = |line: &crate::log::Line| {
            let value: Value = serde_json::from_str(&line.text).ok()?;
            (value.get("event")?.as_str()? == name).then_some(value)
        };
        self.log
            .wait_for(mark, timeout, &format!("event `{name}`"), pick)
            .with_context(|| self.label.clone())
    }

    /// The events called `name` so far.
    pub fn events(&self, name: &str) -> Vec<Value> {
        let values = self
            .log
            .lines()
            .into_iter()
            .filter_map(|line| serde_json::from_str::<Value>(&line.text).ok());
        values
            .filter(|value| value.get("event").and_then(Value::as_str) == Some(name))
            .collect()
    }

    /// Writes a line to its standard input ([`Launch::stdin`]).
    pub fn send_line(&self, line: &str) -> Result<()> {
        let mut stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
        let pipe = stdin
            .as_mut()
            .with_context(|| format!("{} has no standard input", self.label))?;
        pipe.write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("writing to {}", self.label))
    }

    /// Ends its standard input.
    pub fn close_stdin(&self) {
        self.stdin
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// Sends a signal to it and its process group. One that has ended is left alone.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        let status = self.end.status();
        if status.is_none() {
            killpg(self.pid, signal)
                .with_context(|| format!("sending {signal} to {}", self.label))?;
        }
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&self, timeout: Duration) -> Result<ExitStatus> {
        let timeout = stretch(timeout);
        let running = |status: &mut Option<ExitStatus>| status.is_none();
        let waited = self
            .end
            .ended
            .wait_timeout_while(self.end.status(), timeout, running);
        let status = *waited.unwrap_or_else(PoisonError::into_inner).0;
        let Some(status) = status else {
            bail!(
                "{} still runs after {timeout:?}; its log's end:\n{}",
                self.label,
                self.log.tail()
            );
        };
        self.log.wait_end(stretch(DRAIN));
        Ok(status)
    }

    /// How it ended, if it has.
    pub fn status(&self) -> Option<ExitStatus> {
        *self.end.status()
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        // Nothing to do about a failure: the end of the fabric kills by cgroup. Waiting, so that ports are free again.
        let _ = self.kill(Signal::SIGKILL);
        let running = |status: &mut Option<ExitStatus>| status.is_none();
        drop(
            self.end
                .ended
                .wait_timeout_while(self.end.status(), stretch(KILLED), running),
        );
        if std::thread::panicking() || wait::was_in_vain() {
            eprintln!("--- the end of {}'s log:\n{}", self.label, self.log.tail());
        }
    }
}

/// The `culvert` program: `CULVERT_BINARY`, or the one built beside the running test.
pub fn culvert_binary() -> Result<PathBuf> {
    find_binary("CULVERT_BINARY", "culvert", "cargo build -p culvert")
}

/// The `culvert-probe` program: `CULVERT_PROBE`, or the one built beside the running test.
pub fn probe_binary() -> Result<PathBuf> {
    find_binary(
        "CULVERT_PROBE",
        "culvert-probe",
        "cargo build -p culvert-harness",
    )
}

fn find_binary(variable: &str, name: &str, build: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        ensure!(
            path.is_file(),
            "{variable}={}: no such file",
            path.display()
        );
        return Ok(path);
    }
    // A test runs in target/<profile>/deps, programs in target/<profile>.
    let own = std::env::current_exe().context("finding this program's own path")?;
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!(
            "`{name}` is not beside {}: run `{build}` or set {variable}",
            own.display()
        )
    })
}
