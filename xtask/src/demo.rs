//! `cargo xtask demo` and `bench`: programs of their own, which print the result on standard output.

use std::{
    ffi::OsStr,
    process::{Command, Stdio},
};

use anyhow::Context as _;
use xtask::ebpf;

use crate::{
    arguments::{BenchOptions, DemoOptions, Scenario},
    packages::{self, Need},
    workspace,
};

pub fn demo(options: &DemoOptions) -> anyhow::Result<()> {
    let arguments = options.json.then_some("--json");
    start("culvert-demo", arguments)
}

pub fn bench(options: &BenchOptions) -> anyhow::Result<()> {
    if options.scenario == Scenario::SameNode {
        packages::provide(&[Need::Load])?;
    }
    let docs = ebpf::repository().join("docs");
    let flags = [
        (true, OsStr::new(options.scenario.name())),
        (options.quick, OsStr::new("--quick")),
        (options.json, OsStr::new("--json")),
        (options.plot, OsStr::new("--write-docs")),
        (options.plot, docs.as_os_str()),
    ];
    let given = flags.iter().filter(|(given, _)| *given);
    start("culvert-bench", given.map(|(_, argument)| argument))
}

/// Ends with the program's own status: it has said itself what did not hold.
fn start(name: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> anyhow::Result<()> {
    workspace::build()?;
    workspace::clean_stale_runs()?;
    let program = workspace::program(name)?;
    let mut command = Command::new(&program);
    workspace::name_programs(&mut command)?;
    // What the caller's shell has set for another agent must not change what is shown.
    for (name, _) in std::env::vars_os() {
        if is_of_an_agent(&name.to_string_lossy())
            && !matches!(name.to_str(), Some("CULVERT_BINARY" | "CULVERT_PROBE"))
        {
            command.env_remove(name);
        }
    }
    let status = command
        .args(arguments)
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", program.display()))?;
    if !status.success() {
        std::process::exit(status.code().unwrap_or(1));
    }
    Ok(())
}

/// Variables that `culvert node` reads.
fn is_of_an_agent(name: &str) -> bool {
    const PREFIXES: [&str; 4] = ["CULVERT_", "XDS_", "CA_", "ISTIO_META_"];
    const NAMES: [&str; 19] = [
        "NODE_NAME",
        "CLUSTER_ID",
        "NETWORK",
        "CLUSTER_DOMAIN",
        "POD_NAME",
        "POD_NAMESPACE",
        "INSTANCE_IP",
        "SERVICE_ACCOUNT",
        "TRUST_DOMAIN",
        "LOCAL_XDS_PATH",
        "LOCAL_XDS",
        "CRL_PATH",
        "SECRET_TTL",
        "PACKET_MARK",
        "TERMINATION_GRACE_PERIOD_SECONDS",
        "POOL_MAX_STREAMS_PER_CONNECTION",
        "IPV6_ENABLED",
        "RUST_LOG",
        "LOG_FORMAT",
    ];
    PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || NAMES.contains(&name)
}
