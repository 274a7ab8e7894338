//! cgroup v2: where it is mounted, and subtrees that are made, joined, killed and removed. Called by `fabric` and `node`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::patience::stretch;

/// The mount point of cgroup v2, wherever the distribution puts it.
pub fn root() -> Result<PathBuf> {
    let mounts =
        std::fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    find_root(&mounts).context("no cgroup v2 is mounted: `mount -t cgroup2 none /sys/fs/cgroup` (or beside v1, on a directory of its own)")
}

fn find_root(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        (source.split(' ').next()? == "cgroup2").then_some(())?;
        let point = mount.split(' ').nth(4)?;
        // mountinfo writes a space as an octal escape, the only one likely in a mount point.
        Some(PathBuf::from(point.replace("\\040", " ")))
    })
}

/// A cgroup of ours.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup. The one above it must exist: a late comer may not bring back a subtree that was removed.
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        std::fs::create_dir(&path)
            .with_context(|| format!("making cgroup {}: are you root?", path.display()))?;
        Ok(Self { path })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id, as `bpf_get_current_cgroup_id` returns it.
    pub fn id(&self) -> Result<u64> {
        Ok(std::fs::metadata(&self.path)
            .with_context(|| format!("cgroup {}", self.path.display()))?
            .ino())
    }

    /// The processes directly in it.
    pub fn members(&self) -> Result<Vec<u32>> {
        let path = self.path.join("cgroup.procs");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// The file through which a process joins.
    pub(crate) fn procs(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new()
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))
    }
}

/// Kills every process in the subtree, waits for their end, and removes it. A subtree that is not there is fine, also if
/// somebody else removes it meanwhile.
pub(crate) fn remove_tree(path: &Path, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + stretch(timeout);
    let outcome = std::fs::write(path.join("cgroup.kill"), "1")
        .with_context(|| format!("killing the processes of cgroup {}", path.display()))
        .and_then(|()| wait_empty(path, deadline))
        .and_then(|()| remove_directories(path));
    if path.exists() { outcome } else { Ok(()) }
}

/// `cgroup.events` reports a change of `populated` as POLLPRI.
fn wait_empty(path: &Path, deadline: Instant) -> Result<()> {
    let path = path.join("cgroup.events");
    let mut file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    loop {
        let mut events = String::new();
        file.rewind()?;
        file.read_to_string(&mut events)
            .with_context(|| format!("reading {}", path.display()))?;
        if events.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!(
                "{}: processes are still there after they were killed",
                path.display()
            );
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(file.as_fd(), PollFlags::POLLPRI)],
            timeout,
        ) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error).context("waiting for a cgroup to empty"),
        }
    }
}

fn remove_directories(path: &Path) -> Result<()> {
    let entries =
        std::fs::read_dir(path).with_context(|| format!("listing cgroup {}", path.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_directories(&entry.path())?;
        }
    }
    std::fs::remove_dir(path).with_context(|| format!("removing cgroup {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn v2_is_found_beside_v1_and_alone() {
        let hybrid = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:3 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            find_root(hybrid),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        let unified =
            "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(find_root(unified), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(
            find_root("32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"),
            None
        );
    }
}
