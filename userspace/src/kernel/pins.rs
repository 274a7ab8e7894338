//! Where the kernel part lives on when the agent does not: the layout of the pin directory.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use culvert_abi::LAYOUT_VERSION;

use super::{
    KernelError, NetnsCookie,
    sys::{self, LinkInfo},
};

/// `BPF_FS_MAGIC` of the kernel's magic.h.
const BPFFS_MAGIC: i64 = 0xcafe_4a11;

/// Every map of the kernel part, by its name in the object.
pub const MAPS: [&str; 24] = [
    "CONFIG",
    "PODS",
    "ENDPOINTS",
    "VERDICTS",
    "SERVICES",
    "SLOTS",
    "CLAIMS",
    "QUOTAS",
    "FLOWS",
    "LOST",
    "LISTENERS",
    "ISOLATED_CLIENTS",
    "ISOLATED_SERVERS",
    "EVENTS",
    "ALARMS",
    "COUNTERS",
    "SOCKETS",
    "SHORT_SOCKETS",
    "SHORT_ENDS",
    "SHORT_FLOWS",
    "SHORT_ENDED",
    "SHORT_NAMES",
    "UNFIT",
    "CANDIDATES",
];

/// What a layout's directory has, hooks before the maps they need.
pub const PARTS: [&str; 3] = ["links", "pods", "maps"];

/// Directories of a BPF file system that [`find`] looks into, and how deep.
const MOST_DIRECTORIES: usize = 4096;
const DEEPEST: usize = 6;

/// `<pin dir>/v<layout version>/{maps,links,pods}`.
#[derive(Clone, Debug)]
pub struct Pins {
    directory: PathBuf,
    root: PathBuf,
}

impl Pins {
    /// The pins of this version's layout, there or not.
    pub fn of(pin_dir: &Path) -> Self {
        Self {
            directory: pin_dir.to_owned(),
            root: pin_dir.join(format!("v{LAYOUT_VERSION}")),
        }
    }

    /// Whether the directory is, or would be, on a BPF file system and holds no other version's pins.
    pub fn check(&self) -> Result<(), KernelError> {
        check_file_system(&self.directory)?;
        if let Some(found) = self.other_layout()? {
            return Err(KernelError::OtherLayout {
                pin_dir: self.directory.clone(),
                found,
                own: LAYOUT_VERSION,
            });
        }
        Ok(())
    }

    /// Makes the directories that are missing.
    pub fn create(&self) -> Result<(), KernelError> {
        self.check()?;
        for part in PARTS {
            let directory = self.root.join(part);
            fs::create_dir_all(&directory).map_err(failed("create pin directory", &directory))?;
        }
        Ok(())
    }

    /// The version of another layout that has pins here.
    fn other_layout(&self) -> Result<Option<u32>, KernelError> {
        Ok(layouts(&self.directory)?
            .into_iter()
            .find(|(version, path)| *version != LAYOUT_VERSION && !pins_below(path).is_empty())
            .map(|(version, _)| version))
    }

    /// The directory that the operator names.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// That of this layout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of the maps.
    pub fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    /// The directory whose lock tells that an agent lives.
    pub fn living(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// Removes the directories that are empty, also the one that the operator named.
    pub fn remove_empty(&self) {
        for part in PARTS {
            let _ = fs::remove_dir(self.root.join(part));
        }
        let _ = fs::remove_dir(&self.root);
        let _ = fs::remove_dir(&self.directory);
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.root.join("maps").join(name)
    }

    pub fn link(&self, name: &str) -> PathBuf {
        self.root.join("links").join(name)
    }

    pub fn pod(&self, cookie: NetnsCookie) -> PathBuf {
        self.root.join("pods").join(cookie.to_string())
    }

    /// The namespaces that have a pinned `inbound`.
    pub fn pods(&self) -> Vec<NetnsCookie> {
        let Ok(entries) = fs::read_dir(self.root.join("pods")) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(NetnsCookie))
            .collect()
    }

    /// Whether a pinned link is attached to nothing any more, because its target is gone.
    pub fn is_detached(path: &Path) -> bool {
        link(path).is_some_and(|info| info.target == 0)
    }

    /// Forgets a pin; without another reference the kernel detaches what it names.
    pub fn remove(path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// What the kernel says of a pinned link.
pub fn link(path: &Path) -> Option<LinkInfo> {
    sys::object_get(path).and_then(sys::link_info).ok()
}

/// The layouts in a pin directory, by version; none if it is not there.
pub fn layouts(pin_dir: &Path) -> Result<Vec<(u32, PathBuf)>, KernelError> {
    let entries = match fs::read_dir(pin_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("read pin directory", pin_dir)(error)),
    };
    let mut found: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let version = entry
                .file_name()
                .to_str()?
                .strip_prefix('v')?
                .parse()
                .ok()?;
            Some((version, entry.path()))
        })
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// Everything that is pinned in the directory of a layout, hooks first.
pub fn pins_below(layout: &Path) -> Vec<PathBuf> {
    PARTS
        .iter()
        .filter_map(|part| fs::read_dir(layout.join(part)).ok())
        .flat_map(|entries| entries.flatten().map(|entry| entry.path()))
        .collect()
}

/// The pin directory, anywhere on the BPF file system of `near`, that holds this link of `socket_ops`.
pub fn find(near: &Path, id: u32) -> Option<PathBuf> {
    let file_system = near
        .ancestors()
        .take_while(|path| !path.exists() || is_bpf(path))
        .last()?;
    let mut waiting = vec![(file_system.to_owned(), 0)];
    let mut seen = 0;
    while let Some((path, depth)) = waiting.pop() {
        seen += 1;
        if seen > MOST_DIRECTORIES {
            return None;
        }
        if link(&path.join("links/socket_ops")).is_some_and(|info| info.id == id) {
            return path.parent().map(Path::to_owned);
        }
        if depth < DEEPEST
            && let Ok(entries) = fs::read_dir(&path)
        {
            let directories = entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            waiting.extend(directories.map(|entry| (entry.path(), depth + 1)));
        }
    }
    None
}

/// Says so where a pin directory is not, or would not be, on a BPF file system.
fn check_file_system(pin_dir: &Path) -> Result<(), KernelError> {
    let existing = pin_dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    if is_bpf(existing) {
        Ok(())
    } else {
        Err(KernelError::NotBpffs {
            path: pin_dir.to_owned(),
        })
    }
}

fn is_bpf(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|found| found.filesystem_type().0 == BPFFS_MAGIC)
}

pub fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KernelError {
    let path = path.to_owned();
    move |source| KernelError::File {
        doing,
        path,
        source,
    }
}
