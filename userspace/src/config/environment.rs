//! What the process finds around it: environment variables and a few facts of the machine, as one snapshot.
//! The only place that reads the environment; everything else is handed an `Environment`, so tests make their own.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;

/// A snapshot of the surroundings, taken once at start.
#[derive(Clone, Default)]
pub struct Environment {
    /// The environment variables. A value need not be Unicode; only those that are asked for must be.
    pub variables: BTreeMap<String, OsString>,
    /// The content of `/proc/self/mountinfo`, empty if it cannot be read.
    pub mountinfo: Vec<u8>,
    /// The machine's name, the default node name.
    pub hostname: String,
    /// How many CPUs this process may use.
    pub cpus: usize,
}

/// What a variable holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Variable {
    /// Not set, or set to nothing: charts render optional values as empty strings.
    Unset,
    /// Set to this text.
    Text(String),
    /// Set to bytes that are not Unicode.
    NotUnicode,
}

impl fmt::Debug for Environment {
    // Names only: a variable may hold a token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment")
            .field("variables", &self.variables.keys())
            .field("hostname", &self.hostname)
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}

impl Environment {
    /// Reads the environment of this process.
    pub fn of_this_process() -> Self {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .collect();
        let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self {
            variables,
            mountinfo: std::fs::read("/proc/self/mountinfo").unwrap_or_default(),
            hostname: hostname.trim().to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// What the variable `name` holds.
    pub fn variable(&self, name: &str) -> Variable {
        match self.variables.get(name) {
            None => Variable::Unset,
            Some(value) if value.is_empty() => Variable::Unset,
            Some(value) => value
                .to_str()
                .map_or(Variable::NotUnicode, |text| Variable::Text(text.to_owned())),
        }
    }
}
