//! Where the kernel part lives on when the agent does not: the layout of the pin directory.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use culvert_abi::LAYOUT_VERSION;

use super::{KernelError, NetnsCookie, sys};

/// `BPF_FS_MAGIC` of the kernel's magic.h.
const BPFFS_MAGIC: i64 = 0xcafe_4a11;

/// Every map of the kernel part, by its name in the object.
pub const MAPS: [&str; 13] = [
    "CONFIG",
    "PODS",
    "ENDPOINTS",
    "VERDICTS",
    "CLAIMS",
    "QUOTAS",
    "FLOWS",
    "LISTENERS",
    "ISOLATED",
    "EVENTS",
    "ALARMS",
    "COUNTERS",
    "SOCKETS",
];

/// `<pin dir>/v<layout version>/{maps,links,pods}`.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    pub fn create(pin_dir: &Path) -> Result<Self, KernelError> {
        let pins = Self {
            root: pin_dir.join(format!("v{LAYOUT_VERSION}")),
        };
        for directory in [
            pins.root.join("maps"),
            pins.root.join("links"),
            pins.root.join("pods"),
        ] {
            fs::create_dir_all(&directory).map_err(|source| KernelError::File {
                doing: "create pin directory",
                path: directory.clone(),
                source,
            })?;
        }
        let found = nix::sys::statfs::statfs(&pins.root).map_err(|error| KernelError::File {
            doing: "examine pin directory",
            path: pins.root.clone(),
            source: error.into(),
        })?;
        if found.filesystem_type().0 != BPFFS_MAGIC {
            let _ = fs::remove_dir_all(&pins.root);
            return Err(KernelError::NotBpffs {
                path: pin_dir.to_owned(),
            });
        }
        Ok(pins)
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

    /// Gives an attached link a new program, if it is pinned here and attached to `target`; else says so.
    pub fn replace_program(path: &Path, target: u64, program: impl AsFd) -> bool {
        let Ok(link) = sys::object_get(path) else {
            return false;
        };
        sys::link_target(&link).is_ok_and(|found| found == target)
            && sys::link_update(&link, program).is_ok()
    }

    /// Whether a pinned link is attached to nothing any more, because its target is gone.
    pub fn is_detached(path: &Path) -> bool {
        sys::object_get(path)
            .and_then(sys::link_target)
            .is_ok_and(|target| target == 0)
    }

    /// Forgets a pin; without another reference the kernel detaches what it names.
    pub fn remove(path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes every pin of every layout, hooks before the maps they need.
    pub fn remove_all(pin_dir: &Path) -> io::Result<()> {
        for layout in fs::read_dir(pin_dir)?.flatten() {
            for part in ["links", "pods", "maps"] {
                match fs::remove_dir_all(layout.path().join(part)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            fs::remove_dir(layout.path())?;
        }
        fs::remove_dir(pin_dir)
    }
}
