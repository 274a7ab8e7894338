//! A named network namespace under /run/netns, so that `ip netns exec` reaches it too.
//! Removal is `cleanup`'s, by name: a `Netns` is only a handle.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};

use crate::{ip, sys};

/// Where iproute2 keeps its named namespaces.
pub(crate) const DIRECTORY: &str = "/run/netns";

/// A network namespace.
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    /// Makes a namespace.
    pub(crate) fn create(name: String) -> Result<Self> {
        ip::batch(None, &[format!("netns add {name}")])?;
        let netns = Self {
            path: Path::new(DIRECTORY).join(&name),
            name,
        };
        netns
            .enter(settle)
            .and_then(|settled| settled)
            .with_context(|| format!("preparing namespace {}", netns.name))?;
        Ok(netns)
    }

    /// The name `ip -n` takes.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn open(&self) -> Result<File> {
        File::open(&self.path)
            .with_context(|| format!("opening network namespace {}", self.path.display()))
    }

    /// Runs `work` on a thread inside the namespace. Sockets made there stay in it, wherever they are used later.
    /// The cgroup is the caller's own: what a cgroup program must see belongs into a process ([`crate::Pod::command`]).
    /// Per-process views such as /proc/net show the caller's namespace; read /proc/thread-self/net.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = self.open()?;
        std::thread::scope(|scope| {
            let worker = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET)?;
                Ok::<T, nix::Error>(work())
            });
            match worker.join() {
                Ok(outcome) => outcome
                    .with_context(|| format!("entering namespace {}: are you root?", self.name)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Reads a network sysctl, for example `net.ipv4.ip_forward`.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = sysctl_path(key)?;
        let text = self.enter(|| std::fs::read_to_string(&path))?;
        Ok(text
            .with_context(|| format!("reading sysctl {key} in {}", self.name))?
            .trim()
            .to_owned())
    }

    /// Sets a network sysctl.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key)?;
        self.enter(|| std::fs::write(&path, value))?
            .with_context(|| format!("setting sysctl {key}={value} in {}", self.name))
    }

    /// The namespace's cookie: what BPF programs know it by.
    pub fn cookie(&self) -> Result<u64> {
        self.enter(|| {
            let socket = std::net::UdpSocket::bind(("0.0.0.0", 0))?;
            sys::netns_cookie(socket.as_fd())
        })?
        .with_context(|| format!("reading the cookie of namespace {}", self.name))
    }
}

/// Sysctls a new namespace copies from the machine and that would make tests differ between machines, and one that makes them wait.
fn settle() -> Result<()> {
    std::fs::write(sysctl_path("net.ipv4.ip_forward")?, "0").context("turning forwarding off")?;
    // Link-local addresses are ready with their link, not a second or two later: tests compare routing tables.
    let detection = sysctl_path("net.ipv6.conf.default.accept_dad")?;
    match std::fs::write(detection, "0") {
        // A kernel without IPv6.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.context("turning the detection of duplicate addresses off"),
    }
}

fn sysctl_path(key: &str) -> Result<PathBuf> {
    let plain =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/');
    ensure!(
        key.starts_with("net.") && key.bytes().all(plain) && !key.contains(".."),
        "`{key}` is not a network sysctl"
    );
    Ok(Path::new("/proc/sys").join(key.replace('.', "/")))
}

/// Removes a named namespace. One that is no longer mounted (left from before a reboot) loses its file.
pub(crate) fn delete(name: &str) -> Result<()> {
    let path = Path::new(DIRECTORY).join(name);
    // EINVAL: not a mount point.
    match umount2(&path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(error) => {
            return Err(error).with_context(|| format!("unmounting namespace {}", path.display()));
        }
    }
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}
