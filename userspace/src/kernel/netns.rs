//! Network namespaces: opening, naming, and doing something inside one.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::sys::statfs::{FsType, fstatfs};
use socket2::{Domain, Socket, Type};

use super::{KernelError, sys};

/// The kernel's name for a namespace: unlike its inode or path, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsCookie(pub u64);

impl std::fmt::Display for NetnsCookie {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(formatter)
    }
}

/// The file system that namespaces are files of (linux/magic.h); nix does not name it.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// A network namespace, held open.
#[derive(Debug)]
pub struct Netns {
    file: File,
    cookie: NetnsCookie,
    inode: u64,
}

impl Netns {
    /// Opens a namespace by the path of its file, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let failed = |source| KernelError::File {
            doing: "open network namespace",
            path: path.to_owned(),
            source,
        };
        // Not following into devices or FIFOs: opening one of those could block.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(KernelError::NotNetns {
                path: path.to_owned(),
            });
        }
        let file = File::open(path).map_err(failed)?;
        if !sys::is_network_namespace(&file) {
            return Err(KernelError::NotNetns {
                path: path.to_owned(),
            });
        }
        Self::of(file)
    }

    /// Takes over a descriptor that somebody sent.
    ///
    /// # Errors
    /// It may be of anything: what is not a network namespace is closed.
    pub fn received(descriptor: OwnedFd) -> Result<Self, KernelError> {
        // The file system first: of another file the question for its kind may mean something else.
        let of_namespaces = fstatfs(&descriptor).is_ok_and(|fs| fs.filesystem_type() == NSFS_MAGIC);
        if !of_namespaces || !sys::is_network_namespace(&descriptor) {
            return Err(KernelError::NotReceivedNetns);
        }
        Self::of(File::from(descriptor))
    }

    /// Finds a namespace of which only its numbers are remembered: where namespaces have names, and among those of all processes.
    pub fn find(inode: u64, cookie: NetnsCookie) -> Result<Self, KernelError> {
        places()
            .filter(|path| std::fs::metadata(path).is_ok_and(|file| file.ino() == inode))
            .find_map(|path| {
                Self::open(&path)
                    .ok()
                    .filter(|netns| netns.cookie == cookie)
            })
            .ok_or(KernelError::LostNetns { inode })
    }

    fn of(file: File) -> Result<Self, KernelError> {
        let failed = |source| KernelError::Netns {
            doing: "read the cookie",
            source,
        };
        let inode = file.metadata().map_err(failed)?.ino();
        let cookie = within(file.as_fd(), || -> io::Result<u64> {
            sys::netns_cookie(Socket::new(Domain::IPV4, Type::DGRAM, None)?)
        })
        .and_then(|cookie| cookie)
        .map_err(failed)?;
        Ok(Self {
            file,
            cookie: NetnsCookie(cookie),
            inode,
        })
    }

    /// Whether there is a device in it other than the loopback device: when a pod ends, its own are taken away, and only who holds the
    /// namespace open keeps it in being.
    pub fn has_devices(&self) -> io::Result<bool> {
        let devices = self.run(nix::net::if_::if_nameindex)??;
        Ok(devices.iter().any(|device| device.name() != c"lo"))
    }

    /// Whether a process in it has a TCP socket: without one no connection can be under way.
    pub fn has_tcp_sockets(&self) -> io::Result<bool> {
        self.run(|| {
            // "TCP: inuse 3 orphan 0 ..." and "TCP6: inuse 1"; a kernel without IPv6 has no second list.
            let in_use = |list: &str| {
                let list = std::fs::read_to_string(list).unwrap_or_default();
                let counts = list.lines().filter(|line| line.starts_with("TCP"));
                let counts = counts.filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok());
                counts.sum::<u64>()
            };
            let lists = [
                "/proc/thread-self/net/sockstat",
                "/proc/thread-self/net/sockstat6",
            ];
            lists.into_iter().map(in_use).sum::<u64>() > 0
        })
    }

    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `work` on this thread inside the namespace. `work` must not await: the thread is elsewhere meanwhile.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        within(self.file.as_fd(), work)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Where a namespace may be found by its file.
fn places() -> impl Iterator<Item = PathBuf> {
    let entries = |directory: &str| std::fs::read_dir(directory).into_iter().flatten().flatten();
    let named = entries("/run/netns").map(|entry| entry.path());
    let processes = entries("/proc").map(|entry| entry.path().join("ns/net"));
    named.chain(processes)
}

fn within<T>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> T) -> io::Result<T> {
    let home = home()?;
    sys::enter_network_namespace(namespace)?;
    let guard = Return(home);
    let result = work();
    drop(guard);
    Ok(result)
}

/// The namespace the agent was started in.
fn home() -> io::Result<&'static File> {
    static HOME: OnceLock<File> = OnceLock::new();
    if let Some(home) = HOME.get() {
        return Ok(home);
    }
    let file = File::open("/proc/self/ns/net")?;
    Ok(HOME.get_or_init(|| file))
}

/// Brings the thread home, also when `work` panics.
struct Return(&'static File);

impl Drop for Return {
    fn drop(&mut self) {
        if let Err(error) = sys::enter_network_namespace(self.0) {
            // A thread lost in a pod's namespace would open sockets there on behalf of others.
            tracing::error!(%error, "cannot return from a pod's network namespace");
            std::process::abort();
        }
    }
}
