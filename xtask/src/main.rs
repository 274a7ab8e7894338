//! `cargo xtask`: every task of this repository.

mod arguments;
mod check;
mod clean;
mod command;
mod demo;
mod distribution;
mod machine;
mod packages;
mod setup;
mod tally;
mod test;
mod tools;
mod vm;
mod workspace;

use std::process::ExitCode;

use arguments::Task;

fn main() -> ExitCode {
    match Task::parse(std::env::args().skip(1)).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<()> {
    match task {
        Task::Help => {
            println!("{}", arguments::USAGE);
            Ok(())
        }
        Task::Setup => {
            setup::setup()?;
            command::step(
                "this machine is ready",
                "`cargo xtask demo` or `cargo xtask test` is next",
            );
            Ok(())
        }
        Task::Build => workspace::build(),
        Task::Test(options) => test::test(&options),
        Task::Vm(options) => vm::vm(&options),
        Task::Demo(options) => demo::demo(&options),
        Task::Bench(options) => demo::bench(&options),
        Task::Check => check::check(),
        Task::Clean => clean::clean(),
    }
}
