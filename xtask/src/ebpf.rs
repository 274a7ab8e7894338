//! Builds the eBPF object. Called by `cargo xtask build` through the agent's build script, so there is one way only, and by
//! `cargo xtask check` for its warnings.
//!
//! The eBPF target needs a core library built from source, hence a compiler that comes with its matching source: a
//! nightly with `rust-src` where rustup has one, else Debian's `rustc-web` and `rust-web-src`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

/// Target of the kernel part.
const TARGET: &str = "bpfel-unknown-none";
/// Debian's compiler and its source.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_SOURCE: &str = "/usr/lib/rustlib/src/rust/library";

/// Root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or_else(|| Path::new("."))
}

/// Directory of the eBPF crate.
pub fn source() -> PathBuf {
    repository().join("ebpf-programs")
}

/// A compiler whose standard library source is at hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Toolchain {
    /// rustup's nightly with `rust-src`.
    Nightly { rustc: PathBuf },
    /// Debian's packages.
    Debian,
}

impl Toolchain {
    /// The toolchain this machine has, if any; rustup's is preferred because it is already there.
    pub fn find() -> Option<Self> {
        let mut nightly = Command::new("rustc");
        // A question; rustup would take it for an order and fetch a nightly.
        nightly
            .env("RUSTUP_AUTO_INSTALL", "0")
            .args(["+nightly", "--print", "sysroot"]);
        let sysroot = output(&mut nightly).map(|text| PathBuf::from(text.trim()));
        if let Some(sysroot) = sysroot
            && sysroot
                .join("lib/rustlib/src/rust/library/Cargo.lock")
                .exists()
        {
            return Some(Self::Nightly {
                rustc: sysroot.join("bin/rustc"),
            });
        }
        (Path::new(DEBIAN_RUSTC).exists() && Path::new(DEBIAN_SOURCE).exists())
            .then_some(Self::Debian)
    }

    pub fn rustc(&self) -> &Path {
        match self {
            Self::Nightly { rustc } => rustc,
            Self::Debian => Path::new(DEBIAN_RUSTC),
        }
    }

    /// Major version of the compiler's LLVM: the linker must be built against the same.
    pub fn llvm_major(&self) -> anyhow::Result<u32> {
        let text = output(Command::new(self.rustc()).arg("-vV"))
            .with_context(|| format!("cannot run {}", self.rustc().display()))?;
        text.lines()
            .find_map(|line| line.strip_prefix("LLVM version: "))
            .and_then(|version| version.split('.').next())
            .and_then(|major| major.trim().parse().ok())
            .with_context(|| format!("{} -vV names no LLVM version", self.rustc().display()))
    }
}

/// Builds the kernel part and returns the path of the object.
pub fn build() -> anyhow::Result<PathBuf> {
    cargo(&[])?;
    Ok(target_directory().join(TARGET).join("release/culvert-ebpf"))
}

/// Builds the kernel part, or looks again at what the last build said, and fails if there was a warning.
pub fn deny_warnings() -> anyhow::Result<()> {
    // Cargo's own setting, because it keeps what is built: with rustc's flag everything would be built a second time.
    cargo(&["-Z", "warnings", "--config", "build.warnings='deny'"])
}

fn target_directory() -> PathBuf {
    source().join("target")
}

fn cargo(more: &[&str]) -> anyhow::Result<()> {
    let Some(toolchain) = Toolchain::find() else {
        bail!(
            "no toolchain for the eBPF programs on this machine: run `cargo xtask setup` as root"
        );
    };
    if output(Command::new("bpf-linker").arg("--version")).is_none() {
        bail!("bpf-linker is not installed: run `cargo xtask setup` as root");
    }
    let flags = [
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        "--cfg=bpf_target_arch=\"x86_64\"",
        "-Ctarget-cpu=v3",
    ];
    let mut cargo = Command::new("cargo");
    // The outer cargo's settings are meant for the host; nothing of them may leak into this build.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_")
            && !text.starts_with("CARGO_HOME")
            && !text.starts_with("CARGO_HTTP")
            || matches!(
                &*text,
                "RUSTFLAGS"
                    | "RUSTC_WRAPPER"
                    | "RUSTC_WORKSPACE_WRAPPER"
                    | "RUSTUP_TOOLCHAIN"
                    | "RUSTC"
            )
        {
            cargo.env_remove(&name);
        }
    }
    let status = cargo
        .current_dir(source())
        .env("RUSTC", toolchain.rustc())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", target_directory())
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .args([
            "build",
            "--quiet",
            "--release",
            "--locked",
            "-Z",
            "build-std=core",
            "--target",
            TARGET,
        ])
        .args(more)
        // The build script's standard output is cargo's to read, and that of a task is its result.
        .stdout(std::io::stderr())
        .status()
        .context("cannot start cargo for the eBPF programs")?;
    if !status.success() {
        bail!("the eBPF programs did not build ({status}); see the compiler's message above");
    }
    Ok(())
}

/// Standard output of a command that succeeded.
fn output(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}
