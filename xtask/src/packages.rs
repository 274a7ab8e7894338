//! Packages of the distribution: which the machine needs, which it lacks, and installing those. Called by `setup`.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

use anyhow::{Context as _, bail};

use crate::{
    command::{ask, run_quietly, step},
    distribution::Distribution,
    vm::emulator,
};

/// What needs packages, in the order in which it can be known: the linker's depend on the compiler's LLVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Building for the host: the crates with C in them, and everything's linker.
    Compiler,
    /// Making virtual nodes.
    Harness,
    /// Building for the kernel: a compiler with the source of its `core`.
    EbpfCompiler,
    /// Building bpf-linker against the LLVM of that compiler.
    EbpfLinker { llvm: u32 },
    /// What is in the machines that boot other kernels.
    Guest,
    /// Emulating them. See [`emulator`].
    Emulator,
    /// Benchmarks: servers and clients that others know.
    Load,
    /// Tests of real programs over direct flows, beside those of `Load`.
    Programs,
}

impl Need {
    fn packages(self) -> Vec<String> {
        let names: &[&str] = match self {
            // There are two packages of busybox, and one would have to remove the other: either serves.
            Self::Guest if is_there("busybox", "--help") => &["kmod"],
            Self::Guest => &["kmod", "busybox-static"],
            Self::Emulator => &[emulator::PACKAGE],
            Self::Compiler => &["gcc", "libc6-dev"],
            Self::Harness => &["iproute2", "iptables"],
            Self::EbpfCompiler => &["rustc-web", "rust-web-src"],
            Self::Load => &["redis-server", "redis-tools", "nginx-light", "wrk"],
            Self::Programs => &[
                "curl",
                "default-jdk-headless",
                "golang-go",
                "haproxy",
                "iperf3",
                "libfaketime",
                "openssl",
                "postgresql",
                "python3",
                "stunnel4",
            ],
            Self::EbpfLinker { llvm } => {
                // bpf-linker's LLVM is C++: g++ brings the library it links.
                let fixed = ["zlib1g-dev", "libzstd-dev", "g++"].map(str::to_owned);
                return [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")]
                    .into_iter()
                    .chain(fixed)
                    .collect();
            }
        };
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn why(self) -> &'static str {
        match self {
            Self::Compiler => "C parts of the dependencies",
            Self::Harness => "namespaces of the virtual nodes, and the rules in their pods",
            Self::EbpfCompiler => {
                "a Rust compiler with its core library's source, for the eBPF target"
            }
            Self::EbpfLinker { .. } => "bpf-linker is built against the LLVM of the eBPF compiler",
            Self::Guest => "programs in the emulated machine that runs the tests on other kernels",
            Self::Emulator => "an emulated machine, to run the tests on other kernels",
            Self::Load => "servers and clients of the benchmark, used inside its namespaces only",
            Self::Programs => {
                "servers, clients and languages of the tests, used inside their namespaces only"
            }
        }
    }

    /// Whether it is there, by what it is for: all that can be asked where there is no dpkg.
    fn is_met(self) -> bool {
        match self {
            Self::Compiler => ask(Command::new("cc").arg("--version")).is_some(),
            Self::Harness => is_there("ip", "-V") && is_there("iptables-legacy", "-V"),
            Self::Guest => {
                let programs = [("busybox", "--help"), ("kmod", "--version")];
                programs
                    .iter()
                    .all(|(program, asked)| is_there(program, asked))
            }
            Self::Emulator => is_there(emulator::PROGRAM, "--version"),
            Self::Load => {
                let programs = [
                    ("redis-server", "-v"),
                    ("redis-benchmark", "-v"),
                    ("nginx", "-v"),
                ];
                programs
                    .iter()
                    .all(|(program, asked)| is_there(program, asked))
                    // Says its version, and then how it is used, as an error.
                    && Command::new("wrk").arg("-v").output().is_ok()
            }
            Self::Programs => {
                let programs = [
                    ("curl", "-V"),
                    ("javac", "-version"),
                    ("go", "version"),
                    ("haproxy", "-v"),
                    ("iperf3", "-v"),
                    ("openssl", "version"),
                    ("/usr/bin/python3", "-V"),
                    ("stunnel", "-version"),
                ];
                programs
                    .iter()
                    .all(|(program, asked)| is_there(program, asked))
                    && Path::new("/usr/lib/postgresql").is_dir()
                    && faketime().is_file()
            }
            // Asked for only where none was found.
            Self::EbpfCompiler => false,
            Self::EbpfLinker { llvm } => Path::new(&llvm_prefix(llvm))
                .join("include/llvm-c")
                .is_dir(),
        }
    }

    /// What to do about it where setup cannot.
    fn by_hand(self) -> String {
        match self {
            Self::Compiler => "a C compiler and the C library's headers (`cc --version` must work)".into(),
            Self::Harness => "iproute2 and iptables (`ip -V` and `iptables-legacy -V` must work)".into(),
            Self::EbpfCompiler => {
                "a compiler for eBPF: `rustup toolchain install nightly --profile minimal --component rust-src`".into()
            }
            Self::Guest => "busybox and kmod in PATH".into(),
            Self::Emulator => "QEMU for x86_64 in PATH".into(),
            Self::Load => "redis-server, redis-benchmark, nginx and wrk in PATH".into(),
            Self::Programs => {
                format!(
                    "curl, javac, go, haproxy, iperf3, openssl, python3 and stunnel in PATH, PostgreSQL below \
                     /usr/lib/postgresql, and {}",
                    faketime().display()
                )
            }
            Self::EbpfLinker { llvm } => {
                format!(
                    "LLVM {llvm} with headers, zlib and zstd below {} (or bpf-linker {} built for it)",
                    llvm_prefix(llvm),
                    crate::tools::BPF_LINKER
                )
            }
        }
    }
}

/// Where Debian's package puts the clock that tests set.
fn faketime() -> PathBuf {
    let architecture = std::env::consts::ARCH;
    format!("/usr/lib/{architecture}-linux-gnu/faketime/libfaketimeMT.so.1").into()
}

/// Where Debian's packages put an LLVM.
pub fn llvm_prefix(major: u32) -> String {
    format!("/usr/lib/llvm-{major}")
}

/// Installs what is missing for these needs, in one go.
pub fn provide(needs: &[Need]) -> anyhow::Result<()> {
    match Distribution::detect() {
        Distribution::Debian => install(needs),
        Distribution::Other(name) => {
            let missing: Vec<_> = needs
                .iter()
                .filter(|need| !need.is_met())
                .map(|need| need.by_hand())
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            bail!(
                "cannot install packages on {name}, only on Debian and Ubuntu; install by hand:\n  - {}",
                missing.join("\n  - ")
            );
        }
    }
}

fn install(needs: &[Need]) -> anyhow::Result<()> {
    let wanted: Vec<String> = needs.iter().flat_map(|need| need.packages()).collect();
    let missing = lacking(&wanted, &installed(&wanted)?);
    if missing.is_empty() {
        return Ok(());
    }
    let whys: Vec<&str> = needs
        .iter()
        .filter(|need| {
            need.packages()
                .iter()
                .any(|package| missing.contains(package))
        })
        .map(|need| need.why())
        .collect();
    step(
        &format!("apt-get install {}", missing.join(" ")),
        &whys.join("; "),
    );
    update();
    let before = services();
    // Nothing of the user's is removed for us: a conflict (another rustc, say) is his to decide.
    run_quietly(
        apt_get()
            .args(["install", "--yes", "--no-install-recommends", "--no-remove"])
            .args(&missing),
    )
    .with_context(|| {
        let by_hand: Vec<String> = needs.iter().map(|need| need.by_hand()).collect();
        format!(
            "these packages did not install; without them, Culvert needs\n  - {}",
            by_hand.join("\n  - ")
        )
    })?;
    silence(&before)
}

/// Those of the servers' services that this machine has.
fn services() -> Vec<&'static str> {
    let unit = |name: &str| Path::new("/lib/systemd/system").join(format!("{name}.service"));
    let servers = [
        "redis-server",
        "nginx",
        "postgresql",
        "haproxy",
        "iperf3",
        "stunnel4",
    ];
    servers
        .into_iter()
        .filter(|name| unit(name).exists())
        .collect()
}

/// Stops the services that came with packages: what is used here is started inside namespaces only. Those that were there
/// `before` are somebody's, and go on.
fn silence(before: &[&str]) -> anyhow::Result<()> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(());
    }
    for service in services() {
        if !before.contains(&service) {
            step(
                &format!("systemctl disable --now {service}"),
                "it came with a package, and is not used as a service",
            );
            run_quietly(Command::new("systemctl").args(["disable", "--now", service]))?;
        }
    }
    Ok(())
}

/// Renews the package lists, once.
pub fn update() {
    static UPDATE: Once = Once::new();
    UPDATE.call_once(|| {
        // A source that cannot be reached need not be the one with our packages.
        if let Err(error) = run_quietly(apt_get().arg("update")) {
            step(
                "go on with the package lists there are",
                &format!("{error:#}"),
            );
        }
    });
}

fn is_there(program: &str, asked: &str) -> bool {
    ask(Command::new(program).arg(asked)).is_some()
}

pub fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Installed servers are not started: the runlevel of a system under repair has none. For systemd, see `silence`.
        .env("RUNLEVEL", "1")
        // Another installer at work is waited for, seconds.
        .args([
            "--quiet",
            "-o",
            "DPkg::Lock::Timeout=600",
            "-o",
            "Acquire::Retries=3",
        ]);
    command
}

/// What dpkg knows of these packages. One that it has never heard of is an error to dpkg-query, not to us.
fn installed(packages: &[String]) -> anyhow::Result<String> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${db:Status-Abbrev} ${Package}\n"])
        .args(packages)
        .output()
        .context("cannot run dpkg-query: is this Debian or Ubuntu?")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Those of `wanted` that dpkg's answer does not call installed, in order, each once.
fn lacking(wanted: &[String], answer: &str) -> Vec<String> {
    let installed = |package: &str| {
        answer.lines().any(|line| {
            let mut words = line.split_whitespace();
            // Desired and actual state: an installed package may be held ("hi").
            words.next().is_some_and(|state| state.ends_with('i')) && words.next() == Some(package)
        })
    };
    let mut missing: Vec<String> = Vec::new();
    for package in wanted {
        if !installed(package) && !missing.contains(package) {
            missing.push(package.clone());
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn linkers_packages_follow_the_compilers_llvm() {
        let packages = Need::EbpfLinker { llvm: 23 }.packages();
        assert!(
            packages.contains(&"llvm-23-dev".to_owned())
                && packages.contains(&"libpolly-23-dev".to_owned())
        );
    }

    #[test]
    fn only_what_is_not_installed_is_lacking() {
        let answer = "ii  gcc\nrc  iproute2\nhi  zlib1g-dev\nun  g++\n";
        let wanted = names(&[
            "gcc",
            "iproute2",
            "zlib1g-dev",
            "g++",
            "libc6-dev",
            "libc6-dev",
        ]);
        assert_eq!(
            lacking(&wanted, answer),
            names(&["iproute2", "g++", "libc6-dev"])
        );
    }

    #[test]
    fn a_longer_name_is_another_package() {
        assert_eq!(lacking(&names(&["gcc"]), "ii  gcc-12\n"), names(&["gcc"]));
    }

    #[test]
    fn nothing_lacks_where_all_is_installed() {
        assert!(lacking(&names(&["a", "b"]), "ii  b\nii  a\n").is_empty());
    }
}
