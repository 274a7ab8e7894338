//! The commands that ask a running agent: one request, its answer printed, and an exit status that scripts can use.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::admin::{
    Client, ClientError, FlowsQuery, PodAdd, PodInfo, PodRemove, Reply, Request, Status,
};
use crate::config::{self, ConfigErrors, Environment};
use crate::dev_control_plane::ControlPlaneError;
use crate::kernel::KernelError;
use crate::telemetry::logging::LoggingError;

use super::{
    Agent, ClientCommand, EXIT_CONFIG, EXIT_FAILED, EXIT_NO_AGENT, FlowsArgs, PodCommand, table,
};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// No socket to ask.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// A path the agent could not be told.
    #[error("cannot use the path {0}: {1}; give one that exists")]
    Path(PathBuf, io::Error),
    /// The agent, or its absence.
    #[error(transparent)]
    Agent(#[from] ClientError),
    /// The kernel part could not be taken away.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The development control plane.
    #[error(transparent)]
    ControlPlane(#[from] ControlPlaneError),
    /// Its log.
    #[error(transparent)]
    Log(#[from] LoggingError),
    /// The terminal or pipe.
    #[error("cannot print the answer: {0}")]
    Output(#[from] io::Error),
    /// An answer that is no JSON.
    #[error("cannot print the answer as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl CliError {
    /// The exit status that tells it.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Log(LoggingError::Filter(_)) => EXIT_CONFIG,
            Self::Agent(ClientError::NotRunning { .. }) => EXIT_NO_AGENT,
            _ => EXIT_FAILED,
        }
    }

    /// Whether whoever read the answer has gone, which is no failure: `culvert flows | head`.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Carries out a command and prints its answer to `out`.
///
/// # Errors
/// See [`CliError`].
pub fn run(
    command: &ClientCommand,
    environment: &Environment,
    out: &mut impl Write,
) -> Result<(), CliError> {
    let connect = |agent: &Agent| -> Result<Client, CliError> {
        let path = config::admin_socket(agent.admin_socket.as_deref(), environment)?;
        Ok(Client::connect(&path)?)
    };
    match command {
        ClientCommand::Pod(PodCommand::Add(add)) => {
            let netns = std::path::absolute(&add.netns)
                .map_err(|error| CliError::Path(add.netns.clone(), error))?;
            let netns = for_another_process(&netns);
            let request = Request::PodAdd(PodAdd {
                netns,
                uid: add.uid.clone(),
                namespace: add.namespace.clone(),
                name: add.name.clone(),
                service_account: add.service_account.clone(),
            });
            let pod: PodInfo = connect(&add.agent)?.ask(&request)?;
            let identity = pod.identity.as_deref().unwrap_or("no identity yet");
            let line = format!(
                "enrolled {} ({}/{}, {identity})",
                pod.uid, pod.namespace, pod.name
            );
            writeln!(out, "{}", table::clean(&line))?;
        }
        ClientCommand::Pod(PodCommand::Remove(remove)) => {
            let uid = remove.uid.clone();
            connect(&remove.agent)?.ask::<()>(&Request::PodRemove(PodRemove { uid }))?;
            writeln!(out, "released {}", table::clean(&remove.uid))?;
        }
        ClientCommand::Pod(PodCommand::List(list)) => {
            let pods: Vec<PodInfo> = connect(&list.agent)?.ask(&Request::PodList {})?;
            match list.json {
                true => writeln!(out, "{}", serde_json::to_string(&pods)?)?,
                false => out.write_all(table::pods(&pods).as_bytes())?,
            }
        }
        ClientCommand::Status(args) => {
            let status: Status = connect(&args.agent)?.ask(&Request::Status {})?;
            match args.json {
                true => writeln!(out, "{}", serde_json::to_string(&status)?)?,
                false => out.write_all(table::status(&status).as_bytes())?,
            }
        }
        ClientCommand::Flows(args) => follow(connect(&args.agent)?, args, out)?,
    }
    out.flush()?;
    Ok(())
}

/// The path as another process has to say it: `/proc/self` there would be that process.
fn for_another_process(path: &Path) -> PathBuf {
    ["/proc/self", "/proc/thread-self"]
        .into_iter()
        .find_map(|own| path.strip_prefix(own).ok())
        .map_or_else(
            || path.to_owned(),
            |rest| {
                Path::new("/proc")
                    .join(std::process::id().to_string())
                    .join(rest)
            },
        )
}

fn follow(client: Client, args: &FlowsArgs, out: &mut impl Write) -> Result<(), CliError> {
    let query = FlowsQuery {
        recent: args.recent,
    };
    let stream = client.follow(&Request::Flows(query))?;
    if !args.json {
        out.write_all(table::FLOWS_HEADER.as_bytes())?;
        out.flush()?;
    }
    for reply in stream {
        let reply = reply?;
        match (&reply, args.json) {
            (Reply::Flow(event), true) => writeln!(out, "{}", serde_json::to_string(event)?)?,
            (Reply::Flow(event), false) => out.write_all(table::flow(event).as_bytes())?,
            (Reply::Lost(lost), true) => writeln!(out, "{{\"lost\":{lost}}}")?,
            (Reply::Lost(lost), false) => {
                writeln!(out, "({lost} events lost: this terminal is too slow)")?
            }
            (Reply::Ok(()) | Reply::Error(_), _) => {}
        }
        out.flush()?;
    }
    Ok(())
}
