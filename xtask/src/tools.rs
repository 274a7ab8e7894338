//! Programs that come from cargo: bpf-linker, which links the eBPF object, and cargo-deny. Each in one version; one of
//! another version or built for another LLVM is replaced. Called by `setup` and `check`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::{
    command::{ask, run_quietly, step},
    packages::{self, Need, llvm_prefix},
    workspace,
};

pub const BPF_LINKER: &str = "0.13.0";
/// The LLVM versions that this bpf-linker can be built against.
const BPF_LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
const CARGO_DENY: &str = "0.20.2";

/// bpf-linker for the compiler's LLVM: it reads that compiler's bitcode.
pub fn bpf_linker(llvm: u32) -> anyhow::Result<()> {
    if !BPF_LINKER_LLVM.contains(&llvm) {
        bail!(
            "the eBPF compiler has LLVM {llvm}, and bpf-linker {BPF_LINKER} is for LLVM {} to {}: use another nightly, \
             or take away its source (`rustup component remove rust-src --toolchain nightly`) so that Debian's \
             compiler is used",
            BPF_LINKER_LLVM.start(),
            BPF_LINKER_LLVM.end()
        );
    }
    let home = cargo_home()?;
    let feature = format!("llvm-{llvm}");
    if !is_installed(&home, "bpf-linker", BPF_LINKER, Some(&feature)) {
        packages::provide(&[Need::EbpfLinker { llvm }])?;
        step(
            &format!("cargo install bpf-linker {BPF_LINKER} for LLVM {llvm}"),
            "it links the eBPF object; takes a minute or two, once",
        );
        let prefix = llvm_prefix(llvm);
        let mut install = install(&home, "bpf-linker", BPF_LINKER);
        install
            .args(["--no-default-features", "--features", &feature])
            .env(format!("LLVM_SYS_{llvm}1_PREFIX"), &prefix)
            .env("PATH", with_first(&Path::new(&prefix).join("bin"))?);
        run_quietly(&mut install)?;
    }
    require_first_in_path(&home.join("bin/bpf-linker"))
}

pub fn cargo_deny() -> anyhow::Result<()> {
    let home = cargo_home()?;
    if !is_installed(&home, "cargo-deny", CARGO_DENY, None) {
        step(
            &format!("cargo install cargo-deny {CARGO_DENY}"),
            "it checks the licences and sources of the dependencies; takes a few minutes, once",
        );
        run_quietly(&mut install(&home, "cargo-deny", CARGO_DENY))?;
    }
    Ok(())
}

/// Where cargo keeps what it installs.
pub fn cargo_home() -> anyhow::Result<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    home.context("neither CARGO_HOME nor HOME is set: cargo has no place to install programs")
}

fn install(home: &Path, name: &str, version: &str) -> Command {
    let mut command = workspace::cargo();
    command
        // Not the repository: its settings, and its target directory, are not meant for this.
        .current_dir(home)
        .env_remove("CARGO_TARGET_DIR")
        .args([
            "install",
            name,
            "--version",
            version,
            "--locked",
            "--force",
            "--root",
        ])
        .arg(home);
    command
}

/// Whether cargo installed this version with this feature, and it starts: a library it needs may be gone since.
fn is_installed(home: &Path, name: &str, version: &str, feature: Option<&str>) -> bool {
    let record = fs::read_to_string(home.join(".crates2.json")).unwrap_or_default();
    is_recorded(&record, name, version, feature)
        && ask(Command::new(home.join("bin").join(name)).arg("--version")).is_some()
}

/// Reads cargo's record of what it installed. A record of another shape is as good as none: the program is installed anew.
fn is_recorded(record: &str, name: &str, version: &str, feature: Option<&str>) -> bool {
    let Ok(record) = serde_json::from_str::<Value>(record) else {
        return false;
    };
    let Some(installs) = record.get("installs").and_then(Value::as_object) else {
        return false;
    };
    installs.iter().any(|(package, install)| {
        let mut words = package.split(' ');
        let features = install.get("features").and_then(Value::as_array);
        words.next() == Some(name)
            && words.next() == Some(version)
            && feature.is_none_or(|wanted| {
                features.is_some_and(|features| {
                    features.iter().any(|found| found.as_str() == Some(wanted))
                })
            })
    })
}

fn with_first(directory: &Path) -> anyhow::Result<std::ffi::OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(directory.to_owned()).chain(env::split_paths(&path));
    env::join_paths(all).with_context(|| format!("{} cannot be put into PATH", directory.display()))
}

/// rustc takes the first bpf-linker in PATH, whichever that is.
fn require_first_in_path(program: &Path) -> anyhow::Result<()> {
    let name = program.file_name().unwrap_or_default();
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file());
    let directory = program.parent().unwrap_or(program).display();
    match found {
        Some(found) if same_file(&found, program) => Ok(()),
        Some(found) => bail!(
            "{} comes before {} in PATH: remove it, or `export PATH=\"{directory}:$PATH\"`",
            found.display(),
            program.display()
        ),
        None => bail!("{directory} is not in PATH: `export PATH=\"{directory}:$PATH\"`"),
    }
}

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = r#"{"installs":{
        "bpf-linker 0.13.0 (registry+index)":{"bins":["bpf-linker"],"features":["llvm-22"]},
        "cargo-deny 0.20.2 (registry+index)":{"bins":["cargo-deny"],"features":[]}}}"#;

    #[test]
    fn installed_programs_are_recognised() {
        assert!(is_recorded(RECORD, "bpf-linker", "0.13.0", Some("llvm-22")));
        assert!(is_recorded(RECORD, "cargo-deny", "0.20.2", None));
    }

    #[test]
    fn another_version_or_llvm_does_not_serve() {
        assert!(!is_recorded(
            RECORD,
            "bpf-linker",
            "0.13.0",
            Some("llvm-23")
        ));
        assert!(!is_recorded(RECORD, "bpf-linker", "0.13", Some("llvm-22")));
        assert!(!is_recorded(RECORD, "cargo-deny", "0.20.3", None));
    }

    #[test]
    fn unreadable_record_means_not_installed() {
        for record in [
            "",
            "{",
            "[]",
            r#"{"installs":[]}"#,
            r#"{"installs":{"bpf-linker 0.13.0":7}}"#,
        ] {
            assert!(
                !is_recorded(record, "bpf-linker", "0.13.0", Some("llvm-22")),
                "{record}"
            );
        }
    }
}
