//! The flags of `culvert node`: one per setting, made from the list of settings, so that the command line cannot fall
//! behind the configuration. Values stay text here; the configuration judges them together with the other layers.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches, value_parser};

use crate::config::{Flags, settings};

/// `culvert node`.
#[derive(Clone, Debug, Default)]
pub struct NodeArgs {
    /// The settings given as flags, and `--config`.
    pub flags: Flags,
    /// Print the effective configuration and exit.
    pub print_config: bool,
}

impl NodeArgs {
    /// Where ztunnel stood everything is said by the environment, and istio-cni enrols the pods.
    pub fn as_ztunnel() -> Self {
        Self {
            flags: Flags {
                in_place_of_ztunnel: true,
                ..Flags::default()
            },
            print_config: false,
        }
    }
}

impl Args for NodeArgs {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("PATH")
            .value_parser(value_parser!(PathBuf))
            .help("Configuration file (YAML); environment and flags win over it");
        let print = Arg::new("print-config")
            .long("print-config")
            .action(ArgAction::SetTrue)
            .help("Print the effective configuration and exit");
        let settings = settings::ALL.iter().filter_map(|setting| {
            let flag = setting.flag?;
            Some(
                Arg::new(flag)
                    .long(flag)
                    .value_name("VALUE")
                    .allow_hyphen_values(true)
                    .help(format!("{} [env: {}]", setting.help, setting.variable)),
            )
        });
        command.arg(config).arg(print).args(settings)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for NodeArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let given = settings::ALL.iter().filter_map(|setting| {
            let value: &String = matches.get_one(setting.flag?)?;
            Some((*setting, value.clone()))
        });
        Ok(Self {
            flags: Flags {
                config: matches.get_one("config").cloned(),
                values: given.collect(),
                in_place_of_ztunnel: false,
            },
            print_config: matches.get_flag("print-config"),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
