//! Where measured programs run. Whether two programs share a processor changes the latency between them threefold, and
//! the scheduler chooses anew in every round: both ends are held where they are, each on its own if there are two.
//! Called by the demo and the benchmarks.

use std::path::Path;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::pod::Pod;
use crate::process::{Launch, probe_binary};

/// Which end of a measured connection a program is.
#[derive(Clone, Copy, Debug)]
pub enum End {
    Client,
    Server,
}

/// A program in a pod, on the processor of its end.
pub fn pinned(pod: &Pod, end: End, program: &Path) -> Result<Launch> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("reading the allowed processors")?;
    let mut processors = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true));
    let processor = match end {
        End::Client => processors.next_back(),
        End::Server => processors.next(),
    };
    let processor = processor.context("no processor is allowed")?.to_string();
    let launch = pod.command("taskset").args(["--cpu-list", &processor]);
    Ok(launch.arg(program))
}

/// `culvert-probe` in a pod, on the processor of its end.
pub fn pinned_probe(pod: &Pod, end: End) -> Result<Launch> {
    pinned(pod, end, &probe_binary()?)
}
