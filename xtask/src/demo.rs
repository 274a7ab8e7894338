//! `cargo xtask demo` and `bench`: both are culvert-demo, which prints the result on standard output.

use std::process::{Command, Stdio};

use anyhow::Context as _;

use crate::{
    arguments::{BenchOptions, DemoOptions},
    workspace,
};

pub fn demo(options: &DemoOptions) -> anyhow::Result<()> {
    let arguments = options.json.then_some("--json");
    start(arguments)
}

pub fn bench_same_node(options: &BenchOptions) -> anyhow::Result<()> {
    let quick = options.quick.then_some("--quick");
    let json = options.json.then_some("--json");
    start(
        ["--measure", "same-node"]
            .into_iter()
            .chain(quick)
            .chain(json),
    )
}

/// Ends with the program's own status: it has said itself what did not hold.
fn start<'a>(arguments: impl IntoIterator<Item = &'a str>) -> anyhow::Result<()> {
    workspace::build()?;
    workspace::clean_stale_runs()?;
    let program = workspace::program("culvert-demo")?;
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
    const NAMES: [&str; 18] = [
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
