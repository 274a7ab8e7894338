//! The `culvert` program: parses the command line and hands over.

use std::{io::Write as _, process::ExitCode};

use clap::Parser as _;
use culvert::{
    cli::{self, Cli, Command, EXIT_CONFIG, EXIT_FAILED, NodeArgs, ProxyCommand},
    config::{self, Config, Environment},
    node,
    telemetry::logging,
};

fn main() -> ExitCode {
    let environment = Environment::of_this_process();
    match Cli::parse().command {
        Command::Node(args) => run_node(&args, &environment),
        Command::Proxy(ProxyCommand::Ztunnel) => run_node(&NodeArgs::as_ztunnel(), &environment),
        Command::Check(args) => ended(cli::check(&args, &mut std::io::stdout().lock())),
        Command::Unload(args) => ended(cli::unload(
            &args,
            &environment,
            &mut std::io::stdout().lock(),
        )),
        Command::DevControlPlane(args) => ended(cli::dev_control_plane(args, &environment)),
        Command::Client(command) => ended(cli::run(
            &command,
            &environment,
            &mut std::io::stdout().lock(),
        )),
    }
}

fn run_node(args: &NodeArgs, environment: &Environment) -> ExitCode {
    let config = match Config::load(&args.flags, environment) {
        Ok(config) => config,
        Err(errors) => return fail(&errors, EXIT_CONFIG),
    };
    if args.print_config {
        return match std::io::stdout()
            .lock()
            .write_all(config.to_yaml().as_bytes())
        {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, EXIT_FAILED),
        };
    }
    let log = match logging::start(&config.log_filter, config.log_format) {
        Ok(log) => log,
        Err(error) => return fail(&error, EXIT_CONFIG),
    };
    let cgroup_mount = config::mounts::find(&environment.mountinfo, "cgroup2").unwrap_or_default();
    // Control only; connections have threads of their own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(node::run(config, cgroup_mount, &log)),
        Err(error) => return fail(&error, EXIT_FAILED),
    };
    drop(log);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, EXIT_FAILED),
    }
}

fn ended(outcome: Result<(), cli::CliError>) -> ExitCode {
    match outcome {
        Err(error) if !error.is_closed_pipe() => fail(&error, error.exit_status()),
        _ => ExitCode::SUCCESS,
    }
}

fn fail(error: &dyn std::fmt::Display, status: u8) -> ExitCode {
    eprintln!("culvert: {error}");
    ExitCode::from(status)
}
