//! Which processes are the node's own, so that kubelet's probes pass: those of the host's namespace outside the pods'
//! cgroup. A host-network pod shares the namespace, never the cgroup.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{KernelError, Netns, NetnsCookie};

/// Where kubelet keeps its pods, by cgroup driver.
const PODS_CGROUPS: [&str; 3] = [
    "kubepods.slice",
    "kubepods",
    "kubelet.slice/kubelet-kubepods.slice",
];

/// How the kernel part knows the node's own processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostProcesses {
    pub netns: NetnsCookie,
    /// Id of the cgroup below which pods live.
    pub pods_cgroup: u64,
}

impl HostProcesses {
    pub fn find(netns: &Path, pods_cgroup: &Path) -> Result<Self, KernelError> {
        // A cgroup's id is its inode.
        let pods_cgroup = std::fs::metadata(pods_cgroup)
            .map_err(|source| KernelError::File {
                doing: "examine the pods' cgroup",
                path: pods_cgroup.to_owned(),
                source,
            })?
            .ino();
        Ok(Self {
            netns: Netns::open(netns)?.cookie(),
            pods_cgroup,
        })
    }

    /// The pods' cgroup where kubelet usually puts it.
    pub fn usual_pods_cgroup(cgroup_mount: &Path) -> Option<PathBuf> {
        PODS_CGROUPS
            .into_iter()
            .map(|name| cgroup_mount.join(name))
            .find(|path| path.is_dir())
    }
}
