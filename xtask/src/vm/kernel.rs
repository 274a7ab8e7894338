//! The kernels there are to boot: Debian's packages of them, fetched and unpacked below the target directory, never installed.
//! What is there is taken as it is; removing the directory fetches the newest. Called by `vm` and `setup`.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{
    command::{ask, find, run_quietly, step},
    distribution::Distribution,
    packages, workspace,
};

/// A line of kernels: which release of it is the distribution's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    V6_12,
    V6_1,
}

impl Kernel {
    /// The one that `cargo xtask test` boots first.
    pub const ALL: [Self; 2] = [Self::V6_12, Self::V6_1];

    pub fn parse(name: &str) -> anyhow::Result<Self> {
        let found = Self::ALL.into_iter().find(|kernel| kernel.name() == name);
        found.with_context(|| {
            format!(
                "there is no kernel `{name}`; those that can be booted are {}",
                Self::ALL.map(Self::name).join(" and ")
            )
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V6_1 => "6.1",
        }
    }

    /// Where everything about this kernel is kept.
    pub fn directory(self) -> PathBuf {
        workspace::target_directory().join("vm").join(self.name())
    }
}

/// An unpacked kernel.
#[derive(Debug)]
pub struct Image {
    pub kernel: Kernel,
    /// The kernel's own name of its version, as `uname -r` has it.
    pub release: String,
    root: PathBuf,
}

impl Image {
    /// What a boot loader loads.
    pub fn kernel_file(&self) -> PathBuf {
        self.root
            .join("boot")
            .join(format!("vmlinuz-{}", self.release))
    }

    /// `/lib/modules/<release>`, with depmod's tables.
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }

    /// The newest that is unpacked.
    fn find(kernel: Kernel) -> Option<Self> {
        let directory = kernel.directory();
        let names = fs::read_dir(&directory).ok()?.filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            release_of(kernel, &name)
                .map(str::to_owned)
                .map(|release| (name, release))
        });
        let (name, release) = names.max_by_key(|(_, release)| order(release))?;
        let image = Self {
            kernel,
            release,
            root: directory.join(name),
        };
        (image.kernel_file().is_file() && image.modules().join("modules.dep").is_file())
            .then_some(image)
    }
}

/// The kernel, fetched if it is not there. The caller holds the lock of `setup`.
pub fn provide(kernel: Kernel) -> anyhow::Result<Image> {
    if let Some(image) = Image::find(kernel) {
        return Ok(image);
    }
    if !cfg!(target_arch = "x86_64") {
        bail!(
            "kernels to boot are prepared for x86_64 machines only; `cargo xtask test --host` tests on this one's kernel"
        );
    }
    if let Distribution::Other(name) = Distribution::detect() {
        bail!(
            "Linux {} comes from the package archive of Debian, which {name} does not use; `cargo xtask test --host` \
             tests on this machine's kernel",
            kernel.name()
        );
    }
    let directory = kernel.directory();
    let fresh = directory.join("fresh");
    // What a run that was interrupted left behind.
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
    let package = match newest(kernel) {
        // Package lists may name what the archive no longer has.
        Some(package) if download(&package, &fresh).is_ok() => package,
        _ => {
            packages::update();
            let package = newest(kernel).with_context(|| {
                format!(
                    "no package of Linux {} (linux-image-{}.…-cloud-amd64) in the lists of apt-get: is the archive of \
                     this Debian in its sources?",
                    kernel.name(),
                    kernel.name()
                )
            })?;
            download(&package, &fresh)?;
            package
        }
    };
    unpack(&fresh)?;
    // Newer packages keep modules below /usr, where they are found through this by every depmod.
    if !fresh.join("lib").exists() {
        symlink("usr/lib", fresh.join("lib")).context("cannot link to the modules")?;
    }
    let release = release_of(kernel, &package).unwrap_or_default();
    run_quietly(
        Command::new(find("depmod")?)
            .arg("--basedir")
            .arg(&fresh)
            .arg(release),
    )
    .context("cannot list the modules of the kernel")?;
    let place = directory.join(&package);
    let _ = fs::remove_dir_all(&place);
    fs::rename(&fresh, &place)
        .with_context(|| format!("cannot rename {} to {}", fresh.display(), place.display()))?;
    Image::find(kernel).with_context(|| {
        format!(
            "{package} has no kernel or no modules where they are expected; see {}",
            place.display()
        )
    })
}

/// The newest package of this line that apt-get knows.
fn newest(kernel: Kernel) -> Option<String> {
    let prefix = format!("linux-image-{}.", kernel.name());
    let names = ask(Command::new("apt-cache").args(["pkgnames", &prefix]))?;
    names
        .lines()
        .filter_map(|name| Some((order(release_of(kernel, name)?), name)))
        .max()
        .map(|(_, name)| name.to_owned())
}

fn download(package: &str, into: &Path) -> anyhow::Result<()> {
    step(
        &format!("fetch {package}"),
        "a kernel to boot under emulation; it is unpacked, not installed",
    );
    run_quietly(
        packages::apt_get()
            .arg("download")
            .arg(package)
            .current_dir(into),
    )
}

/// Unpacks the one package in the directory, and removes it.
fn unpack(directory: &Path) -> anyhow::Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let package = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get downloaded no package")?;
    run_quietly(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(&package)
            .arg(directory),
    )?;
    fs::remove_file(&package).with_context(|| format!("cannot remove {}", package.display()))
}

/// `6.1.0-56-cloud-amd64` of `linux-image-6.1.0-56-cloud-amd64`; of packages of debug symbols, unsigned kernels and other
/// lines, nothing.
fn release_of(kernel: Kernel, package: &str) -> Option<&str> {
    let release = package.strip_prefix("linux-image-")?;
    let rest = release.strip_prefix(kernel.name())?.strip_prefix('.')?;
    (rest.starts_with(|first: char| first.is_ascii_digit()) && rest.ends_with("-cloud-amd64"))
        .then_some(release)
}

/// The numbers in a release: compared one by one, they tell which is newer.
fn order(release: &str) -> Vec<u64> {
    let version = release.strip_suffix("-cloud-amd64").unwrap_or(release);
    version
        .split(|letter: char| !letter.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packages_of_kernels_of_the_line_are_releases() {
        let release = |name| release_of(Kernel::V6_1, name);
        assert_eq!(
            release("linux-image-6.1.0-56-cloud-amd64"),
            Some("6.1.0-56-cloud-amd64")
        );
        for other in [
            "linux-image-6.1.0-56-cloud-amd64-dbg",
            "linux-image-6.1.0-56-cloud-amd64-unsigned",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.1.0-56-amd64",
            "linux-image-6.1.x-cloud-amd64",
            "linux-image-cloud-amd64",
            "fresh",
        ] {
            assert_eq!(release(other), None, "{other}");
        }
    }

    #[test]
    fn newer_releases_come_later() {
        for (older, newer) in [
            ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64"),
            ("6.12.99+deb12-cloud-amd64", "6.12.117+deb12-cloud-amd64"),
            ("6.12.117+deb12-cloud-amd64", "6.12.117+deb13-cloud-amd64"),
            ("6.12.9+bpo-cloud-amd64", "6.12.10+bpo-cloud-amd64"),
        ] {
            assert!(order(older) < order(newer), "{older} {newer}");
        }
    }

    #[test]
    fn unknown_kernel_is_told_those_there_are() {
        assert_eq!(Kernel::parse("6.1").unwrap(), Kernel::V6_1);
        let error = Kernel::parse("5.10").unwrap_err().to_string();
        assert!(error.contains("6.12 and 6.1"), "{error}");
    }
}
