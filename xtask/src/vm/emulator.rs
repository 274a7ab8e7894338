//! The program that emulates a machine: this machine's own, else Debian's package. Where that cannot be installed because another package
//! would have to go, it is unpacked below the target directory, with what it needs. Prepared by `setup`, started by `guest`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

use crate::{
    command::{ask, run_quietly, step},
    distribution::Distribution,
    packages::{self, Need},
    workspace,
};

pub const PROGRAM: &str = "qemu-system-x86_64";
pub const PACKAGE: &str = "qemu-system-x86";
/// Where its libraries are in packages.
const LIBRARIES: [&str; 3] = [
    "usr/lib/x86_64-linux-gnu",
    "lib/x86_64-linux-gnu",
    "usr/lib",
];
/// Where its firmware is.
const FIRMWARE: [&str; 3] = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"];

/// A program that can be started.
pub enum Emulator {
    Installed,
    /// Packages are unpacked here.
    Unpacked(PathBuf),
}

impl Emulator {
    pub fn find() -> Option<Self> {
        let unpacked = Self::Unpacked(directory());
        [Self::Installed, unpacked].into_iter().find(|emulator| {
            ask(emulator
                .with(&mut Command::new(emulator.program()))
                .arg("--version"))
            .is_some()
        })
    }

    /// How to start it by way of another program.
    pub fn through(&self, mut command: Command) -> Command {
        command.arg(self.program());
        self.with(&mut command);
        if let Self::Unpacked(root) = self {
            for firmware in FIRMWARE {
                command.arg("-L").arg(root.join(firmware));
            }
        }
        command
    }

    fn program(&self) -> PathBuf {
        match self {
            Self::Installed => PROGRAM.into(),
            Self::Unpacked(root) => root.join("usr/bin").join(PROGRAM),
        }
    }

    /// With its libraries.
    fn with<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        match self {
            Self::Unpacked(root) => {
                let paths = LIBRARIES.map(|library| root.join(library));
                match env::join_paths(paths) {
                    Ok(paths) => command.env("LD_LIBRARY_PATH", paths),
                    // A colon in the path: then it does not start, which is said.
                    Err(_) => command,
                }
            }
            Self::Installed => command,
        }
    }
}

/// Has it there. The caller holds the lock of `setup`.
pub fn provide() -> anyhow::Result<()> {
    if Emulator::find().is_some() {
        return Ok(());
    }
    if let Distribution::Debian = Distribution::detect() {
        packages::update();
        // Nothing of the user's is removed for us.
        if simulate(&["--no-remove"]).is_none() {
            return unpack().with_context(|| format!("cannot unpack {PACKAGE}"));
        }
    }
    packages::provide(&[Need::Emulator])
}

fn directory() -> PathBuf {
    workspace::target_directory().join("emulator")
}

/// What apt-get would do.
fn simulate(options: &[&str]) -> Option<String> {
    let mut command = packages::apt_get();
    command.args(["--simulate", "install", "--no-install-recommends"]);
    ask(command.args(options).arg(PACKAGE))
}

fn unpack() -> anyhow::Result<()> {
    let plan = simulate(&[]).context("apt-get does not know how to install it")?;
    step(
        &format!(
            "unpack {PACKAGE} and {} packages that it needs",
            installed_by(&plan).count().saturating_sub(1)
        ),
        "an emulated machine, to run the tests on other kernels; to install it, apt-get would have to remove something of this machine's",
    );
    let fresh = directory().with_extension("fresh");
    // What a run that was interrupted left behind.
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
    let mut download = packages::apt_get();
    download.arg("download").args(installed_by(&plan));
    run_quietly(download.current_dir(&fresh))?;
    for package in downloaded(&fresh)? {
        run_quietly(
            Command::new("dpkg-deb")
                .arg("--extract")
                .arg(&package)
                .arg(&fresh),
        )?;
        fs::remove_file(&package)
            .with_context(|| format!("cannot remove {}", package.display()))?;
    }
    let place = directory();
    let _ = fs::remove_dir_all(&place);
    fs::rename(&fresh, &place).with_context(|| format!("cannot make {}", place.display()))?;
    Emulator::find().map(drop).with_context(|| {
        let root = place.display();
        format!("{PROGRAM} does not start from {root}; put one into PATH")
    })
}

fn downloaded(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(paths
        .filter(|path| path.extension().is_some_and(|it| it == "deb"))
        .collect())
}

/// Of lines such as `Inst qemu-system-x86 (1:7.2 Debian:12 [amd64])`, with the version before in brackets where there is one:
/// `qemu-system-x86=1:7.2`.
fn installed_by(plan: &str) -> impl Iterator<Item = String> {
    plan.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
        let (_, rest) = rest.split_once('(')?;
        Some(format!("{name}={}", rest.split_whitespace().next()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read_line_by_line() {
        let plan = "Reading package lists...\n\
                    Remv qemu-utils [1:10.0.2]\n\
                    Inst libfdt1 (1.6.1-4+b1 Debian:12.0/stable [amd64])\n\
                    Inst libzstd1 [1.5.2] (1.5.4+dfsg2-5 Debian:12.0/stable [amd64]) []\n\
                    Conf libfdt1 (1.6.1-4+b1 Debian:12.0/stable [amd64])\n\
                    Inst\n";
        let found: Vec<_> = installed_by(plan).collect();
        assert_eq!(found, ["libfdt1=1.6.1-4+b1", "libzstd1=1.5.4+dfsg2-5"]);
    }
}
