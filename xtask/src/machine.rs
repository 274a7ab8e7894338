//! What no package can bring: root with its capabilities, BPF with BTF, cgroup v2, bpffs. Each lack is one error that
//! names the need and the mend. Called by `setup`, and by `clean` for its first half.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::command::{run_quietly, step};

const STATUS: &str = "/proc/self/status";
const MOUNTS: &str = "/proc/self/mountinfo";
const BTF: &str = "/sys/kernel/btf/vmlinux";
const BPFFS: &str = "/sys/fs/bpf";

/// Capabilities that loading programs and making nodes take, by their bit (capabilities(7)).
const CAPABILITIES: [(u32, &str); 5] = [
    (12, "CAP_NET_ADMIN"),
    (13, "CAP_NET_RAW"),
    (21, "CAP_SYS_ADMIN"),
    (38, "CAP_PERFMON"),
    (39, "CAP_BPF"),
];

/// Root, and not the root of a container that may do nothing.
pub fn require_root() -> anyhow::Result<()> {
    if !cfg!(target_os = "linux") {
        bail!("Culvert needs Linux: run `cargo xtask` in a Linux machine, virtual or not");
    }
    let status =
        fs::read_to_string(STATUS).with_context(|| format!("{STATUS}: is /proc mounted?"))?;
    let privileges = Privileges::parse(&status)
        .with_context(|| format!("{STATUS} names no effective user id"))?;
    if privileges.user != 0 {
        bail!(
            "not root: namespaces and eBPF programs need it; run `sudo -E env \"PATH=$PATH\" cargo xtask …`, or this \
             in a root shell"
        );
    }
    let missing = privileges.missing();
    if !missing.is_empty() {
        bail!(
            "root without {}: this looks like a container; start it with these capabilities (`docker run \
             --privileged`) or use the machine itself",
            missing.join(", ")
        );
    }
    Ok(())
}

/// The kernel's part; mounts bpffs if it is missing, the only thing here that can be had without the user.
pub fn require_kernel() -> anyhow::Result<()> {
    if !Path::new(BTF).exists() {
        bail!(
            "no {BTF}: Culvert needs a kernel with BPF and BTF (CONFIG_BPF_SYSCALL, CONFIG_DEBUG_INFO_BTF; see `grep \
             BTF /boot/config-$(uname -r)`); boot the distribution's own kernel"
        );
    }
    let mounts = mounts()?;
    if mount_point(&mounts, "cgroup2").is_none() {
        bail!(
            "cgroup v2 is not mounted: `mount -t cgroup2 none /sys/fs/cgroup`, or beside the v1 controllers `mkdir -p \
             /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified`"
        );
    }
    if mount_point(&mounts, "bpf").is_none() {
        step(
            &format!("mount bpffs on {BPFFS}"),
            "the eBPF programs are pinned there, and it is not mounted",
        );
        run_quietly(Command::new("mount").args(["-t", "bpf", "bpf", BPFFS]))
            .with_context(|| format!("bpffs is needed: `mount -t bpf bpf {BPFFS}`"))?;
    }
    Ok(())
}

/// Where bpffs is mounted, if it is.
pub fn bpffs() -> anyhow::Result<Option<PathBuf>> {
    Ok(mount_point(&mounts()?, "bpf"))
}

fn mounts() -> anyhow::Result<String> {
    fs::read_to_string(MOUNTS).with_context(|| format!("{MOUNTS}: is /proc mounted?"))
}

/// First mount point of a file system, from proc_pid_mountinfo(5): optional fields end at a lone dash, then comes the type.
fn mount_point(mountinfo: &str, file_system: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        (source.split(' ').next()? == file_system).then_some(())?;
        // The kernel writes a space in a path as an octal escape.
        Some(PathBuf::from(
            mount.split(' ').nth(4)?.replace("\\040", " "),
        ))
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Privileges {
    /// Effective user id.
    user: u32,
    /// Effective capabilities, one bit each.
    capabilities: u64,
}

impl Privileges {
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        Some(Self {
            // Real, effective, saved, file system.
            user: field("Uid:")?.split_whitespace().nth(1)?.parse().ok()?,
            capabilities: u64::from_str_radix(field("CapEff:")?.trim(), 16).ok()?,
        })
    }

    fn missing(&self) -> Vec<&'static str> {
        let lacks = |bit: u32| self.capabilities & (1 << bit) == 0;
        CAPABILITIES
            .iter()
            .filter(|(bit, _)| lacks(*bit))
            .map(|(_, name)| *name)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
25 1 0:21 / /sys rw,nosuid - sysfs sysfs rw
31 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
32 31 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw,nsdelegate
33 31 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
40 25 0:30 / /mnt/my\\040bpf rw,relatime - bpf none rw,mode=700
";

    #[test]
    fn cgroup_v2_is_found_beside_v1() {
        assert_eq!(
            mount_point(HYBRID, "cgroup2"),
            Some("/sys/fs/cgroup/unified".into())
        );
    }

    #[test]
    fn escaped_spaces_and_optional_fields_are_read() {
        assert_eq!(mount_point(HYBRID, "bpf"), Some("/mnt/my bpf".into()));
    }

    #[test]
    fn absent_file_systems_and_broken_lines_are_none() {
        assert_eq!(mount_point(HYBRID, "nfs"), None);
        assert_eq!(mount_point("", "bpf"), None);
        assert_eq!(mount_point("1 2 - bpf", "bpf"), None);
    }

    #[test]
    fn effective_user_decides_not_the_real_one() {
        let privileges =
            Privileges::parse("Uid:\t1000\t0\t0\t0\nCapEff:\t000001ffffffffff\n").unwrap();
        assert_eq!(privileges.user, 0);
        assert!(privileges.missing().is_empty());
    }

    #[test]
    fn containers_root_is_told_what_it_lacks() {
        let docker = Privileges::parse("Uid:\t0\t0\t0\t0\nCapEff:\t00000000a80425fb\n").unwrap();
        assert_eq!(
            docker.missing(),
            ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_PERFMON", "CAP_BPF"]
        );
    }

    #[test]
    fn unreadable_status_is_no_root() {
        for status in [
            "",
            "Uid:\t0",
            "Uid:\tx\ty\nCapEff:\t0",
            "Uid:\t0\t0\nCapEff:\tzz",
        ] {
            assert_eq!(Privileges::parse(status), None, "{status:?}");
        }
    }
}
