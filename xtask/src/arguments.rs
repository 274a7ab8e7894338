//! The command line of `cargo xtask`, parsed into a [`Task`] before anything is done. Called by `main`.

use anyhow::{Context as _, bail};

use crate::vm::Kernel;

pub const USAGE: &str = "\
Usage: cargo xtask <task>

  setup                      install what is missing on this machine, and check what cannot be installed
  build                      setup, then build the agent, its eBPF programs and the test programs
  test [--long] [--host] [FILTER…]
                             build, then run every test, or those whose names contain a FILTER, and those of the kernel
                             part on Linux 6.12 as well, under emulation; --host leaves that out, --long adds the tests
                             that are too long for every day
  vm [--kernel NAME] [-- FILTER…]
                             build, then run the tests of the kernel part on older kernels, under emulation: 6.12 and
                             6.1, or the one that is named
  demo [--json]              build, then show two nodes, four pods and what passes between them
  bench same-node [--quick] [--json] [--plot]
                             build, then measure two pods of one node against the same pods without the mesh, for ten
                             minutes or, quickly, two; --plot renews docs/PERFORMANCE.md and its picture
  bench control-plane [--quick] [--json]
                             build, then measure what 100,000 workloads and changes to them cost the agent, for a minute
  check                      formatting, clippy, dependencies and licences
  clean                      remove pins, namespaces and cgroups that tests and stopped agents left behind

All need root and Linux with BPF and cgroup v2: they make namespaces and load eBPF programs.";

#[derive(Debug, PartialEq, Eq)]
pub enum Task {
    Help,
    Setup,
    Build,
    Test(TestOptions),
    Vm(VmOptions),
    Demo(DemoOptions),
    Bench(BenchOptions),
    Check,
    Clean,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct TestOptions {
    /// Also those marked `#[ignore]`, which is how a test says that it is long.
    pub long: bool,
    /// Only on this machine's kernel.
    pub host: bool,
    /// Parts of test names; none means every test.
    pub filters: Vec<String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct VmOptions {
    /// Only this one.
    pub kernel: Option<Kernel>,
    /// Parts of test names; none means every test of the kernel part.
    pub filters: Vec<String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct DemoOptions {
    pub json: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scenario {
    #[default]
    SameNode,
    ControlPlane,
}

impl Scenario {
    pub fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same-node",
            Self::ControlPlane => "control-plane",
        }
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct BenchOptions {
    pub scenario: Scenario,
    pub quick: bool,
    pub json: bool,
    /// Renew the page and its picture.
    pub plot: bool,
}

impl Task {
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> anyhow::Result<Self> {
        let mut arguments = arguments.into_iter();
        let Some(name) = arguments.next() else {
            bail!("which task?\n\n{USAGE}");
        };
        let rest: Vec<String> = arguments.collect();
        if rest
            .iter()
            .any(|argument| argument == "--help" || argument == "-h")
        {
            return Ok(Self::Help);
        }
        let bare = |task: Self| {
            refuse(&name, rest.iter())?;
            Ok(task)
        };
        match name.as_str() {
            "help" | "--help" | "-h" => Ok(Self::Help),
            "setup" => bare(Self::Setup),
            "build" => bare(Self::Build),
            "check" => bare(Self::Check),
            "clean" => bare(Self::Clean),
            "test" => test(&rest).map(Self::Test),
            "vm" => vm(&rest).map(Self::Vm),
            "demo" => {
                refuse(&name, rest.iter().filter(|argument| *argument != "--json"))?;
                Ok(Self::Demo(DemoOptions {
                    json: !rest.is_empty(),
                }))
            }
            "bench" => bench(&rest).map(Self::Bench),
            other => bail!("there is no task `{other}`\n\n{USAGE}"),
        }
    }
}

fn test(arguments: &[String]) -> anyhow::Result<TestOptions> {
    let mut options = TestOptions::default();
    for argument in arguments {
        match argument.as_str() {
            "--long" => options.long = true,
            "--host" => options.host = true,
            flag if flag.starts_with('-') => refuse("test", [argument].into_iter())?,
            filter => options.filters.push(filter.to_owned()),
        }
    }
    Ok(options)
}

fn vm(arguments: &[String]) -> anyhow::Result<VmOptions> {
    let mut options = VmOptions::default();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--kernel" => {
                let name = arguments
                    .next()
                    .context("`--kernel` needs a name, for example 6.12")?;
                options.kernel = Some(Kernel::parse(name)?);
            }
            "--" => {}
            flag if flag.starts_with('-') => refuse("vm", [argument].into_iter())?,
            filter => options.filters.push(filter.to_owned()),
        }
    }
    Ok(options)
}

fn bench(arguments: &[String]) -> anyhow::Result<BenchOptions> {
    let Some((name, flags)) = arguments.split_first() else {
        bail!("`bench` needs a scenario: `cargo xtask bench same-node` or `control-plane`");
    };
    let scenario = match name.as_str() {
        "same-node" => Scenario::SameNode,
        "control-plane" => Scenario::ControlPlane,
        other => {
            bail!("there is no benchmark `{other}`: there are `same-node` and `control-plane`")
        }
    };
    let mut options = BenchOptions {
        scenario,
        ..BenchOptions::default()
    };
    for flag in flags {
        match (flag.as_str(), scenario) {
            ("--quick", _) => options.quick = true,
            ("--json", _) => options.json = true,
            ("--plot", Scenario::SameNode) => options.plot = true,
            _ => refuse(&format!("bench {name}"), [flag].into_iter())?,
        }
    }
    Ok(options)
}

fn refuse<'a>(task: &str, mut unexpected: impl Iterator<Item = &'a String>) -> anyhow::Result<()> {
    match unexpected.next() {
        Some(argument) => bail!("`{task}` does not take `{argument}`; see `cargo xtask help`"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Task> {
        Task::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn tests_take_filters_and_long_in_any_order() {
        let options = TestOptions {
            long: true,
            host: true,
            filters: vec!["a".into(), "b".into()],
        };
        assert_eq!(
            parse("test a --long b --host").unwrap(),
            Task::Test(options)
        );
        assert_eq!(parse("test").unwrap(), Task::Test(TestOptions::default()));
    }

    #[test]
    fn vm_takes_a_kernel_it_knows_and_filters() {
        let options = VmOptions {
            kernel: Some(Kernel::V6_1),
            filters: vec!["paths".into()],
        };
        assert_eq!(
            parse("vm --kernel 6.1 -- paths").unwrap(),
            Task::Vm(options)
        );
        assert_eq!(parse("vm").unwrap(), Task::Vm(VmOptions::default()));
        let error = parse("vm --kernel 2.4").unwrap_err().to_string();
        assert!(error.contains("6.12"), "{error}");
        assert!(parse("vm --kernel").is_err() && parse("vm --fast").is_err());
    }

    #[test]
    fn tasks_without_arguments_refuse_them() {
        for line in [
            "setup now",
            "build --release",
            "check x",
            "clean --all",
            "demo --fast",
            "test --short",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn nothing_and_unknown_tasks_show_the_usage() {
        for line in ["", "tset"] {
            assert!(
                parse(line).unwrap_err().to_string().contains("Usage:"),
                "{line}"
            );
        }
    }

    #[test]
    fn bench_names_its_scenario() {
        assert!(parse("bench").is_err() && parse("bench moon").is_err());
        assert!(parse("bench same-node --slow").is_err());
        let options = BenchOptions {
            scenario: Scenario::SameNode,
            quick: true,
            json: false,
            plot: true,
        };
        assert_eq!(
            parse("bench same-node --plot --quick").unwrap(),
            Task::Bench(options)
        );
        assert!(parse("bench control-plane --json").is_ok());
        assert!(parse("bench control-plane --plot").is_err());
    }

    #[test]
    fn help_is_never_an_error() {
        for line in ["help", "--help", "test --help"] {
            assert_eq!(parse(line).unwrap(), Task::Help, "{line}");
        }
    }
}
