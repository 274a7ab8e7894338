//! Where a pod's network namespace is found: by a path, as an operator says; or held open, as istio-cni hands it over.

use std::{fmt, path::PathBuf, sync::Arc};

use crate::kernel::{KernelError, Netns, NetnsCookie};

/// A pod's network namespace, as far as it is known before it is looked at.
#[derive(Clone, Debug)]
pub enum NetnsPlace {
    /// The file that stands for it.
    Path(PathBuf),
    /// Open.
    Held(Arc<Netns>),
    /// What an earlier agent held open.
    Remembered { inode: u64, cookie: NetnsCookie },
}

impl NetnsPlace {
    /// The namespace. A path may lead to another one each time.
    pub fn open(&self) -> Result<Arc<Netns>, KernelError> {
        match self {
            Self::Path(path) => Netns::open(path).map(Arc::new),
            Self::Held(netns) => Ok(Arc::clone(netns)),
            Self::Remembered { inode, cookie } => Netns::find(*inode, *cookie).map(Arc::new),
        }
    }

    /// What a later agent can find it by.
    pub fn remembered(&self) -> Self {
        match self {
            Self::Held(netns) => Self::Remembered {
                inode: netns.inode(),
                cookie: netns.cookie(),
            },
            other => other.clone(),
        }
    }

    /// The cookie, where it is known without looking.
    fn cookie(&self) -> Option<NetnsCookie> {
        match self {
            Self::Path(_) => None,
            Self::Held(netns) => Some(netns.cookie()),
            Self::Remembered { cookie, .. } => Some(*cookie),
        }
    }
}

impl PartialEq for NetnsPlace {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Path(one), Self::Path(other)) => one == other,
            _ => self.cookie().is_some() && self.cookie() == other.cookie(),
        }
    }
}

impl Eq for NetnsPlace {}

impl fmt::Display for NetnsPlace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(formatter),
            Self::Held(netns) => write!(formatter, "net:[{}]", netns.inode()),
            Self::Remembered { inode, .. } => write!(formatter, "net:[{inode}]"),
        }
    }
}
