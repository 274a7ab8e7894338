//! The command line: what it accepts, and the commands that ask a running agent. `node` is carried out
//! by its caller in `main`; its arguments are parsed here.

mod check;
mod client;
mod dev_control_plane;
mod node_args;
mod table;
mod unload;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use check::check;
pub use client::{CliError, run};
pub use dev_control_plane::dev_control_plane;
pub use node_args::NodeArgs;
pub use unload::unload;

/// Exit status of a command that the agent refused or could not carry out. Usage errors exit with 2.
pub const EXIT_FAILED: u8 = 1;
/// Exit status of a command that found no agent.
pub const EXIT_NO_AGENT: u8 = 3;
/// Exit status of `culvert node` for a configuration with errors, from sysexits(3).
pub const EXIT_CONFIG: u8 = 78;

/// Node agent of an ambient service mesh.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, about, propagate_version = true)]
#[command(
    after_help = "Exit status: 0 done, 1 failed or refused by the agent, 2 usage, 3 no agent answers, 78 configuration."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent of this node
    Node(NodeArgs),
    /// Run the agent in the place of another proxy: what its DaemonSet passes
    #[command(subcommand)]
    Proxy(ProxyCommand),
    /// Tell whether this node's kernel can do what the agent needs, and which flows it may short-circuit; changes nothing
    Check(CheckArgs),
    /// Detach and remove everything the agent left in the kernel and in its pods; open direct flows go on
    Unload(UnloadArgs),
    /// Serve a mesh file over xDS, and certificates, to agents: for development, demos and tests
    DevControlPlane(DevControlPlaneArgs),
    /// A command for a running agent.
    #[command(flatten)]
    Client(ClientCommand),
}

/// `culvert proxy`.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum ProxyCommand {
    /// Run the agent where ztunnel stood: with its environment, and pods enrolled by istio-cni
    Ztunnel,
}

/// A command for a running agent.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Enrol, release and list pods
    #[command(subcommand)]
    Pod(PodCommand),
    /// Follow connections as they open and end
    Flows(FlowsArgs),
    /// Show how the agent is
    Status(StatusArgs),
}

/// Where the agent is.
#[derive(Clone, Debug, Default, Args)]
pub struct Agent {
    /// The agent's admin socket [env: CULVERT_ADMIN_SOCKET] [default: /run/culvert/admin.sock]
    #[arg(long, value_name = "PATH")]
    pub admin_socket: Option<String>,
}

/// `culvert pod`.
#[derive(Debug, Subcommand)]
pub enum PodCommand {
    /// Enrol a pod: from now on its connections are the mesh's
    Add(PodAddArgs),
    /// Release a pod
    Remove(PodRemoveArgs),
    /// List the pods of this node
    List(PodListArgs),
}

/// `culvert pod add`.
#[derive(Debug, Args)]
pub struct PodAddArgs {
    /// The pod's network namespace, such as /run/netns/NAME or /proc/PID/ns/net
    #[arg(long, value_name = "PATH")]
    pub netns: PathBuf,
    /// The pod's uid, as in the mesh
    #[arg(long)]
    pub uid: String,
    /// The pod's namespace
    #[arg(long)]
    pub namespace: Option<String>,
    /// The pod's name
    #[arg(long)]
    pub name: Option<String>,
    /// The pod's service account
    #[arg(long)]
    pub service_account: Option<String>,
    /// Where the agent is.
    #[command(flatten)]
    pub agent: Agent,
}

/// `culvert pod remove`.
#[derive(Debug, Args)]
pub struct PodRemoveArgs {
    /// The pod's uid
    pub uid: String,
    /// Where the agent is.
    #[command(flatten)]
    pub agent: Agent,
}

/// `culvert pod list`.
#[derive(Debug, Args)]
pub struct PodListArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Where the agent is.
    #[command(flatten)]
    pub agent: Agent,
}

/// `culvert flows`.
#[derive(Debug, Args)]
pub struct FlowsArgs {
    /// Print one JSON object per line
    #[arg(long)]
    pub json: bool,
    /// Begin with so many of the latest
    #[arg(long, default_value_t = 20)]
    pub recent: usize,
    /// Where the agent is.
    #[command(flatten)]
    pub agent: Agent,
}

/// `culvert status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Where the agent is.
    #[command(flatten)]
    pub agent: Agent,
}

/// `culvert check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `culvert unload`.
#[derive(Debug, Args)]
pub struct UnloadArgs {
    /// Where programs and maps are pinned [env: CULVERT_PIN_DIR] [default: `culvert` under the bpf filesystem's mount]
    #[arg(long, value_name = "PATH")]
    pub pin_dir: Option<String>,
    /// Packet mark that the agent was configured with [env: PACKET_MARK] [default: 1337]
    #[arg(long, value_name = "MARK")]
    pub packet_mark: Option<String>,
    /// How long to wait for connections on their way, for readers of short-circuited flows and for the kernel, in seconds each
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Where the agent was; the pods that it served are remembered beside its socket.
    #[command(flatten)]
    pub agent: Agent,
}

/// `culvert dev-control-plane`.
#[derive(Debug, Args)]
#[command(
    after_help = "Prints a line {\"event\":\"listening\",\"address\":...,\"root\":...} when agents can connect. They need XDS_ADDRESS and CA_ADDRESS (https://ADDRESS), XDS_ROOT_CA and CA_ROOT_CA (the file that `root` names) and AUTH_TOKEN."
)]
pub struct DevControlPlaneArgs {
    /// The mesh file, in the format of LOCAL_XDS_PATH; followed as it changes
    #[arg(long, value_name = "FILE")]
    pub mesh: PathBuf,
    /// Directory of the development CA, made on first use; root-cert.pem in it is for clients
    #[arg(long, value_name = "DIR")]
    pub dev_ca: PathBuf,
    /// Where to listen; port 0 is any that is free
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15012")]
    pub listen: SocketAddr,
    /// DNS name or address in the server's certificate, repeatable [default: localhost, 127.0.0.1, ::1 and the address of --listen]
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
    /// File with the bearer token that agents must send; without it everybody is admitted
    #[arg(long, value_name = "FILE")]
    pub token: Option<PathBuf>,
    /// For tests: file that says what to do wrong, followed as it changes; without the file it behaves
    #[arg(long, value_name = "FILE")]
    pub behaviour: Option<PathBuf>,
    /// Trust domain of the CA and of workloads that name none
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: String,
}
