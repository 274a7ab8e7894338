//! The guest's whole file system: busybox, what the harness and the tests call, the agent, the test program, and the kernel's
//! modules. Programs are this machine's own, each with the libraries that ldd names. Called by `vm`.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::{self, Command},
};

use anyhow::{Context as _, bail};

use super::{cpio::Archive, kernel::Image};
use crate::command::{ask, find};

/// What init, the harness, its supervisor and the tests call.
const BUSYBOX: [&str; 15] = [
    "sh", "mount", "umount", "mkdir", "rmdir", "rm", "cat", "find", "sleep", "uname", "cp", "ls",
    "dmesg", "ps", "poweroff",
];
const PROGRAMS: [&str; 2] = ["ip", "setpriv"];
/// Virtual nodes, looking at and destroying sockets, kTLS.
const MODULES: [&str; 7] = [
    "veth",
    "bridge",
    "inet_diag",
    "tcp_diag",
    "mptcp_diag",
    "unix_diag",
    "tls",
];
/// Where those and what they need come from, below `kernel` of the modules.
const MODULE_FOLDERS: [&str; 5] = ["net", "crypto", "lib", "arch", "drivers/net"];
const MOUNT_POINTS: [&str; 7] = ["proc", "sys", "dev", "tmp", "run", "root", "var/tmp"];
/// Names that `ip rule` looks up.
const PROTOCOLS: &str = "icmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\n";

/// What an archive's name begins with; the process id of its run and the part's number follow.
const PREFIX: &str = "initramfs-";

/// What is run in the guest.
pub struct Programs {
    pub agent: PathBuf,
    pub probe: PathBuf,
    pub tests: PathBuf,
}

/// The archive, 100 MB that are gone with this.
pub struct Initramfs(PathBuf);

impl Initramfs {
    /// Its name has our process id and the part's number: each guest of each run in the same directory has an archive of its own.
    pub fn write(
        image: &Image,
        programs: &Programs,
        part: usize,
        arguments: &[String],
    ) -> anyhow::Result<Self> {
        let directory = image.kernel.directory();
        let written = Self(directory.join(format!("{PREFIX}{}-{part}", process::id())));
        let path = written.path();
        let file =
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut archive = Archive::new(BufWriter::new(file));
        fill(&mut archive, image, programs, arguments)
            .and_then(|()| archive.finish().map(drop))
            .with_context(|| format!("cannot prepare the guest ({})", path.display()))?;
        Ok(written)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Initramfs {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Removes the archives of runs that were killed.
pub fn remove_stale(directory: &Path) -> anyhow::Result<()> {
    for path in files(directory)? {
        let owner = path.file_name().and_then(|name| {
            let rest = name.to_str()?.strip_prefix(PREFIX)?;
            Some(rest.split_once('-').map_or(rest, |(pid, _)| pid))
        });
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another run may have been faster.
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

fn fill<W: Write>(
    archive: &mut Archive<W>,
    image: &Image,
    programs: &Programs,
    arguments: &[String],
) -> anyhow::Result<()> {
    for directory in MOUNT_POINTS {
        archive.directory(Path::new(directory))?;
    }
    archive.file(Path::new("init"), include_bytes!("init.sh"))?;
    archive.file(Path::new("etc/passwd"), b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.file(Path::new("etc/protocols"), PROTOCOLS.as_bytes())?;
    archive.file(Path::new("culvert/modules"), lines(&MODULES)?.as_bytes())?;
    archive.file(Path::new("culvert/arguments"), lines(arguments)?.as_bytes())?;

    let mut libraries = BTreeSet::new();
    let mut program = |archive: &mut Archive<W>, path: &str, from: &Path| {
        libraries.extend(libraries_of(from)?);
        archive.copy(Path::new(path), from)
    };
    program(archive, "bin/busybox", &find("busybox")?)?;
    // It is insmod and depmod as well, and goes by the name it is called.
    program(archive, "sbin/modprobe", &find("kmod")?)?;
    for name in PROGRAMS {
        program(archive, &format!("bin/{name}"), &find(name)?)?;
    }
    program(archive, "culvert/culvert", &programs.agent)?;
    program(archive, "culvert/culvert-probe", &programs.probe)?;
    program(archive, "culvert/tests", &programs.tests)?;
    for library in libraries {
        archive.copy(&library, &library)?;
    }
    for name in BUSYBOX {
        archive.link(&Path::new("bin").join(name), "busybox")?;
    }
    modules(archive, image)
}

/// The kernel's modules, where every modprobe finds them.
fn modules<W: Write>(archive: &mut Archive<W>, image: &Image) -> anyhow::Result<()> {
    let source = image.modules();
    let place = Path::new("lib/modules").join(&image.release);
    archive.link(Path::new("usr/lib/modules"), "/lib/modules")?;
    for path in files(&source)? {
        let name = path.file_name().context("a file without a name")?;
        archive.copy(&place.join(name), &path)?;
    }
    let mut folders: Vec<PathBuf> = MODULE_FOLDERS
        .iter()
        .map(|folder| source.join("kernel").join(folder))
        .collect();
    while let Some(folder) = folders.pop() {
        for path in files(&folder)? {
            archive.copy(&place.join(path.strip_prefix(&source)?), &path)?;
        }
        folders.extend(entries(&folder)?.into_iter().filter(|path| path.is_dir()));
    }
    Ok(())
}

fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = entries(directory)?;
    files.retain(|path| path.is_file());
    Ok(files)
}

fn entries(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    entries.with_context(|| format!("cannot read {}", directory.display()))
}

fn libraries_of(program: &Path) -> anyhow::Result<Vec<PathBuf>> {
    // A static program is a failure to ldd.
    let told = ask(Command::new("ldd").arg(program)).unwrap_or_default();
    libraries(&told).with_context(|| format!("the libraries of {}", program.display()))
}

/// Reads what ldd says: `name => path (address)`, or only `path (address)` for the loader; the kernel's own has no path.
fn libraries(told: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for line in told.lines() {
        if line.contains("not found") {
            bail!("`{}`: install the package that has it", line.trim());
        }
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        found.extend(path.map(PathBuf::from));
    }
    Ok(found)
}

/// One a line, which is how init reads them.
fn lines(words: &[impl AsRef<str>]) -> anyhow::Result<String> {
    let mut text = String::new();
    for word in words {
        let word = word.as_ref();
        if word.contains('\n') {
            bail!("an argument of several lines: {word:?}");
        }
        text.push_str(word);
        text.push('\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_with_a_path() {
        let told = "\tlinux-vdso.so.1 (0x00007f)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            libraries(told).unwrap(),
            [
                "/lib/x86_64-linux-gnu/libc.so.6",
                "/lib64/ld-linux-x86-64.so.2"
            ]
            .map(PathBuf::from)
        );
        assert!(
            libraries("\tnot a dynamic executable\n")
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn missing_library_is_named() {
        let error = libraries("\tlibcap-ng.so.0 => not found\n").unwrap_err();
        assert!(error.to_string().contains("libcap-ng.so.0"));
    }

    #[test]
    fn arguments_stay_one_a_line() {
        assert_eq!(lines(&["--exact", "a b"]).unwrap(), "--exact\na b\n");
        assert!(lines(&["a\nb"]).is_err());
    }
}
