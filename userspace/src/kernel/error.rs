//! What can go wrong between the agent and the kernel.

use std::{io, path::PathBuf};

/// An operation on the kernel that failed; the text says what was being done, to what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("{} is not on a BPF file system: mount one with `mount -t bpf bpf /sys/fs/bpf`, or set CULVERT_PIN_DIR", path.display())]
    NotBpffs { path: PathBuf },
    #[error("{} is not a cgroup v2 directory: set CULVERT_CGROUP_ROOT to one", path.display())]
    NotCgroup { path: PathBuf },
    #[error(
        "this agent (cgroup {own}) does not run inside CULVERT_CGROUP_ROOT {root}: its own connections would not be recognised; start it in a cgroup below"
    )]
    OutsideCgroupRoot { own: String, root: String },
    #[error("cannot {doing} {}: {source}", path.display())]
    File {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "the kernel's type information (/sys/kernel/btf/vmlinux) {0}: a kernel with CONFIG_DEBUG_INFO_BTF is needed"
    )]
    Btf(String),
    #[error("cannot make a network namespace in which to try the short-circuit out: {0}")]
    SelfTest(#[source] io::Error),
    #[error("the kernel refused the program `{program}`: {detail}")]
    Program {
        program: &'static str,
        detail: String,
    },
    #[error("cannot attach `{program}` to {target}: {detail}")]
    Attach {
        program: &'static str,
        target: String,
        detail: String,
    },
    #[error("map {map}: {detail}")]
    Map { map: &'static str, detail: String },
    #[error("{} holds the kernel part of another version of Culvert (layout {found}, this version has {own}): stop the agent of that version, run `culvert unload --pin-dir {}`, then start this one; open direct flows go on meanwhile, but nothing revokes them any more", pin_dir.display(), pin_dir.display())]
    OtherLayout {
        pin_dir: PathBuf,
        found: u32,
        own: u32,
    },
    #[error("another agent, process {pid}, is attached to cgroup {}, which overlaps with {}: one cgroup has one agent; stop it, or give this one a CULVERT_CGROUP_ROOT of its own", cgroup.display(), own.display())]
    OtherAgent {
        pid: u32,
        cgroup: PathBuf,
        own: PathBuf,
    },
    #[error("an agent that has ended ({who}) left its kernel part attached to cgroup {}, which overlaps with {}: take it away with `culvert unload --pin-dir {pin_dir}`, or start this one with that CULVERT_PIN_DIR, and it takes over", cgroup.display(), own.display())]
    LeftBehind {
        who: String,
        cgroup: PathBuf,
        own: PathBuf,
        pin_dir: String,
    },
    #[error("another agent starts, or is being unloaded, with the pin directory {}: wait until it is done, and try again", pin_dir.display())]
    Busy { pin_dir: PathBuf },
    #[error("{} belongs to an agent that runs, process {pid}: stop it first (`kill {pid}`), then run `culvert unload` again", pin_dir.display())]
    InUse { pin_dir: PathBuf, pid: u32 },
    #[error("{} belongs to an agent of another version (layout {version}) that runs: stop it first, then run `culvert unload` again", pin_dir.display())]
    InUseByOther { pin_dir: PathBuf, version: u32 },
    #[error("not everything below {} is gone after {} s: {left}; run `culvert unload` again", pin_dir.display(), waited.as_secs())]
    StillThere {
        pin_dir: PathBuf,
        left: String,
        waited: std::time::Duration,
    },
    #[error("cannot attach `{program}` to cgroup {}: the program `{holder}` (id {id}) holds this hook for itself alone at {}, because it was attached without BPF_F_ALLOW_MULTI; detach it (`bpftool cgroup show {}` shows how it is attached), have it attached with that flag, or set CULVERT_CGROUP_ROOT to a cgroup outside", target.display(), cgroup.display(), cgroup.display())]
    HookTaken {
        program: &'static str,
        target: PathBuf,
        holder: String,
        id: u32,
        cgroup: PathBuf,
    },
    #[error("map {map} pinned at {} has another type or size than this version's: run `culvert unload` with the version that made it", path.display())]
    MapLayout { map: &'static str, path: PathBuf },
    #[error("cannot {doing} in the pod's network namespace: {source}")]
    Netns {
        doing: &'static str,
        source: io::Error,
    },
    #[error("{} is not a network namespace", path.display())]
    NotNetns { path: PathBuf },
    #[error("the descriptor that came with the request is not one of a network namespace")]
    NotReceivedNetns,
    #[error(
        "the network namespace (inode {inode}) is not found: neither in /run/netns nor among those of the processes that the agent sees"
    )]
    LostNetns { inode: u64 },
    #[error(
        "port {port} of the pod is taken by another process: Culvert needs 15001, 15006 and 15008 ({source})"
    )]
    Port { port: u16, source: io::Error },
    #[error(
        "the kernel cannot destroy sockets ({0}): policy changes could not cut open flows; a kernel with CONFIG_INET_DIAG_DESTROY is needed"
    )]
    NoSocketDestroy(io::Error),
    #[error(
        "the pod has none of istio-cni's iptables rules, so that nothing would bring its connections to the agent: have istio-cni make them, or set CULVERT_REDIRECT_MODE to ebpf"
    )]
    NoRedirection,
    #[error("cannot {doing} the pod's routing: {detail}")]
    Routing { doing: &'static str, detail: String },
}

impl KernelError {
    pub(crate) fn map(map: &'static str, error: impl std::fmt::Display) -> Self {
        Self::Map {
            map,
            detail: error.to_string(),
        }
    }
}
