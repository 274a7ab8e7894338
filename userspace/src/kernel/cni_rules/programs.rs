//! Running `iptables-save` and `iptables-restore`. To be called on a thread in the pod's namespace, which what it starts inherits.

use std::{
    fs,
    io::{self, Read, Write as _},
    process::{Command, Output, Stdio},
    thread,
};

use serde::{Deserialize, Serialize};

use crate::kernel::routing::Family;

/// How long another user of the tables on this node is waited for, in seconds: istio-cni waits for the whole for 5.
const LOCK: &str = "3";
/// Longer output is not that of a pod with rules that anybody means.
const MOST_OUTPUT: usize = 1 << 20;

/// The two ways in which the kernel keeps such rules; either has programs of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    Legacy,
    Nft,
}

/// Rules of one backend and one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub backend: Backend,
    pub family: Family,
}

impl Place {
    pub const ALL: [Self; 4] = [
        Self::new(Backend::Legacy, Family::V4),
        Self::new(Backend::Legacy, Family::V6),
        Self::new(Backend::Nft, Family::V4),
        Self::new(Backend::Nft, Family::V6),
    ];

    const fn new(backend: Backend, family: Family) -> Self {
        Self { backend, family }
    }

    /// What `iptables-save` prints; empty where the kernel has no such rules.
    pub fn save(self) -> Result<String, String> {
        let program = self.program("save");
        let legacy = self.backend == Backend::Legacy;
        if legacy && !self.has_legacy_tables() {
            return Ok(String::new());
        }
        let child = Command::new(&program)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match child {
            // Of these only the programs know: without them the node, and so istio-cni on it, uses the others.
            Err(error) if !legacy && error.kind() == io::ErrorKind::NotFound => {
                return Ok(String::new());
            }
            child => child.map_err(|error| missing(&program, &error))?,
        };
        // A pod may have made as many rules as it likes, and complaints of them. The program ends when nobody reads on.
        let (output, complaint) = (child.stdout.take(), child.stderr.take());
        let (output, complaint) = thread::scope(|scope| {
            let complaint = scope.spawn(|| beginning(complaint));
            (beginning(output), complaint.join())
        });
        let failed = |error: io::Error| format!("{program}: {error}");
        let status = child.wait().map_err(failed)?;
        let stdout = output.map_err(failed)?;
        if stdout.len() > MOST_OUTPUT {
            return Err(format!("{program} prints more than {MOST_OUTPUT} bytes"));
        }
        let stderr = complaint
            .unwrap_or_else(|_| Ok(Vec::new()))
            .map_err(failed)?;
        succeeded(
            &program,
            Output {
                status,
                stdout,
                stderr,
            },
        )
    }

    /// Has `iptables-restore` carry a script out beside what is there.
    pub fn restore(self, script: &str) -> Result<(), String> {
        if script.is_empty() {
            return Ok(());
        }
        let program = self.program("restore");
        let mut child = Command::new(&program)
            .args(["--noflush", "-w", LOCK])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| missing(&program, &error))?;
        // Closed when it is written. What the program does not read, it complains of.
        let written = child
            .stdin
            .take()
            .map(|mut input| input.write_all(script.as_bytes()));
        let output = child
            .wait_with_output()
            .map_err(|error| format!("{program}: {error}"))?;
        succeeded(&program, output)?;
        match written {
            Some(Err(error)) => Err(format!("{program}: {error}")),
            _ => Ok(()),
        }
    }

    fn program(self, verb: &str) -> String {
        let family = match self.family {
            Family::V4 => "iptables",
            Family::V6 => "ip6tables",
        };
        let backend = match self.backend {
            Backend::Legacy => "legacy",
            Backend::Nft => "nft",
        };
        format!("{family}-{backend}-{verb}")
    }

    /// The kernel lists the tables of this namespace; asking the program would make them.
    fn has_legacy_tables(self) -> bool {
        let list = match self.family {
            Family::V4 => "/proc/thread-self/net/ip_tables_names",
            Family::V6 => "/proc/thread-self/net/ip6_tables_names",
        };
        fs::read_to_string(list).is_ok_and(|tables| !tables.trim().is_empty())
    }
}

/// What a program prints, up to where it is too much.
fn beginning(pipe: Option<impl Read>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(MOST_OUTPUT as u64 + 1).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

fn missing(program: &str, error: &io::Error) -> String {
    format!(
        "cannot run {program}, which is needed where a pod has such rules: {error}; install the iptables package in the agent's image or on the node"
    )
}

fn succeeded(program: &str, output: Output) -> Result<String, String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint: String = complaint.trim().chars().take(400).collect();
    Err(format!(
        "{program} ended with {}: {complaint}",
        output.status
    ))
}
