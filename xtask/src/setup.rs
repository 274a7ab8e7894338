//! `cargo xtask setup`: makes a machine ready, in an order in which every step has what it needs. Does nothing, in a
//! fraction of a second, where nothing is missing. Called by every task that builds.

use std::fs::{File, TryLockError};

use anyhow::Context as _;
use xtask::ebpf::Toolchain;

use crate::{
    command::step,
    machine,
    packages::{self, Need},
    tools,
    vm::{self, Image, Kernel},
};

/// Guards the machine, not a checkout: two of them install the same packages.
const LOCK: &str = "/run/culvert-setup.lock";

pub fn setup() -> anyhow::Result<()> {
    machine::require_root()?;
    let _lock = lock()?;
    machine::require_kernel()?;
    let mut needs = vec![Need::Compiler, Need::Harness];
    if Toolchain::find().is_none() {
        needs.push(Need::EbpfCompiler);
    }
    packages::provide(&needs)?;
    let toolchain = Toolchain::find().context(
        "no compiler for eBPF although its packages are installed: `rustup toolchain install nightly --profile \
         minimal --component rust-src` serves as well",
    )?;
    tools::bpf_linker(toolchain.llvm_major()?)
}

/// cargo-deny as well, which only `check` needs.
pub fn setup_for_check() -> anyhow::Result<()> {
    setup()?;
    let _lock = lock()?;
    tools::cargo_deny()
}

/// Other kernels, and what boots them, which only `vm` and `test` need.
pub fn setup_for_guests(kernels: &[Kernel]) -> anyhow::Result<Vec<Image>> {
    let _lock = lock()?;
    packages::provide(&[Need::Guest])?;
    vm::emulator::provide()?;
    kernels.iter().map(|kernel| vm::provide(*kernel)).collect()
}

/// Held until dropped.
fn lock() -> anyhow::Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(LOCK)
        .with_context(|| format!("cannot open {LOCK}"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            step("wait", "another `cargo xtask` is setting this machine up");
            file.lock().with_context(|| format!("cannot lock {LOCK}"))?;
        }
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {LOCK}"));
        }
    }
    Ok(file)
}
