//! `cargo xtask clean`: removes what tests and stopped agents left behind. Everything is recognised by its name; what is
//! not ours, or belongs to something that still runs, stays.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::{
    command::{run, step},
    machine, workspace,
};

/// Below the directory of a layout, hooks before the maps they need.
const PINS: [&str; 3] = ["links", "pods", "maps"];

pub fn clean() -> anyhow::Result<()> {
    machine::require_root()?;
    // No setup: a machine need not be able to build eBPF programs to be cleaned.
    run(workspace::cargo()
        .arg("build")
        .args(workspace::SELECTION)
        .args(["--bin", "culvert-clean"]))?;
    workspace::clean_stale_runs()?;
    let Some(bpffs) = machine::bpffs()? else {
        return Ok(());
    };
    remove_pins(&bpffs.join("culvert"))
}

/// The default pin directory. Removing it detaches the programs, which opens the pods that were enrolled: right for what
/// an agent left when it stopped, wrong under one that runs.
fn remove_pins(directory: &Path) -> anyhow::Result<()> {
    let layouts = layouts(directory)?;
    if layouts.is_empty() {
        return Ok(());
    }
    if let Some(pid) = running_agent() {
        step(
            &format!("{} stays", directory.display()),
            &format!("an agent runs, pid {pid}; stop it and run `cargo xtask clean` again"),
        );
        return Ok(());
    }
    step(
        &format!("remove {}", directory.display()),
        "pins of an agent that no longer runs",
    );
    for layout in &layouts {
        for part in PINS {
            gone(fs::remove_dir_all(layout.join(part)))
                .with_context(|| format!("cannot remove {}/{part}", layout.display()))?;
        }
        gone(fs::remove_dir(layout))
            .with_context(|| format!("{} has pins that are not ours", layout.display()))?;
    }
    gone(fs::remove_dir(directory))
        .with_context(|| format!("{} has pins that are not ours", directory.display()))
}

/// `v1`, `v2`, …: one for every layout that an agent used.
fn layouts(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read {}", directory.display()))?,
    };
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(is_layout)
        })
        .collect())
}

fn is_layout(name: &str) -> bool {
    name.strip_prefix('v')
        .is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Any agent: which pin directory it uses cannot be told from outside.
fn running_agent() -> Option<u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .find_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok()?;
            is_agent(&fs::read(process.path().join("cmdline")).ok()?).then_some(pid)
        })
}

/// Whether a command line, words ended by zero bytes, is that of `culvert node`.
fn is_agent(command_line: &[u8]) -> bool {
    let mut words = command_line.split(|byte| *byte == 0);
    words
        .next()
        .is_some_and(|program| program.rsplit(|byte| *byte == b'/').next() == Some(b"culvert"))
        && words.any(|word| word == b"node")
}

fn gone(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_are_known_by_program_and_subcommand() {
        assert!(is_agent(b"/usr/bin/culvert\0node\0--dev-ca\0/tmp/ca\0"));
        assert!(is_agent(b"culvert\0--config\0file\0node\0"));
        for other in [
            &b"culvert\0pod\0list\0"[..],
            b"vi\0node\0",
            b"/opt/culvert/run\0node\0",
            b"",
        ] {
            assert!(!is_agent(other), "{}", String::from_utf8_lossy(other));
        }
    }

    #[test]
    fn only_layout_directories_are_ours() {
        assert!(is_layout("v1") && is_layout("v12"));
        for name in ["v", "vx", "1", "maps", "v1.0", "v-1"] {
            assert!(!is_layout(name), "{name}");
        }
    }
}
