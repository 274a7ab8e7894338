//! Runs iproute2's `ip` in batch mode: one process for all the changes in one namespace. Called by `fabric`, `node`, `pod`.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Carries out `lines` in the namespace called `netns` (`None`: the caller's own).
pub(crate) fn batch(netns: Option<&str>, lines: &[String]) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting `ip`: is iproute2 installed?")?;
    let mut text = lines.join("\n");
    text.push('\n');
    if let Some(mut stdin) = child.stdin.take() {
        // A refused line ends `ip` early; its own message tells more than our broken pipe.
        let _ = stdin.write_all(text.as_bytes());
    }
    let output = child.wait_with_output().context("waiting for `ip`")?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        bail!(
            "`ip -batch` in {}: {}; the lines were:\n{text}",
            netns.unwrap_or("this namespace"),
            reason.trim()
        );
    }
    Ok(())
}
