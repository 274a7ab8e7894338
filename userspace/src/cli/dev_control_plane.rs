//! `culvert dev-control-plane`: runs the development control plane until it is told to end. Needs no agent.

use std::io::Write as _;

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{CliError, DevControlPlaneArgs};
use crate::config::{Environment, LogFilter, LogFormat, Variable};
use crate::dev_control_plane::{self, Listening, Options};
use crate::telemetry::logging;

/// What is logged unless RUST_LOG says otherwise.
const LOG: &str = "info";

/// The line that tells where it listens, among those of the log.
#[derive(Serialize)]
struct Line<'a> {
    event: &'a str,
    address: String,
    root: &'a std::path::Path,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// See [`CliError`].
pub fn dev_control_plane(
    args: DevControlPlaneArgs,
    environment: &Environment,
) -> Result<(), CliError> {
    let filter = match environment.variable("RUST_LOG") {
        Variable::Text(text) => text,
        Variable::Unset | Variable::NotUnicode => LOG.to_owned(),
    };
    let filter = LogFilter::parse(&filter).ok_or(logging::LoggingError::Filter(filter))?;
    let _log = logging::start(&filter, LogFormat::Text)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let options = Options {
        listen: args.listen,
        mesh: args.mesh,
        dev_ca: args.dev_ca,
        trust_domain: args.trust_domain,
        names: args.names,
        token: args.token,
        behaviour: args.behaviour,
    };
    runtime.block_on(serve(options))
}

async fn serve(options: Options) -> Result<(), CliError> {
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let serving = dev_control_plane::run(options, announce, shutdown.clone());
    tokio::pin!(serving);
    tokio::select! {
        outcome = &mut serving => return Ok(outcome?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    shutdown.cancel();
    Ok(serving.await?)
}

fn announce(listening: Listening) {
    let line = Line {
        event: "listening",
        address: listening.address.to_string(),
        root: &listening.root,
    };
    let written = serde_json::to_string(&line)
        .map_err(std::io::Error::from)
        .and_then(|line| writeln!(std::io::stdout().lock(), "{line}"));
    if let Err(error) = written {
        tracing::warn!(%error, address = %listening.address, "listening, but nobody can be told");
    }
}
