//! Where direct connections may be short-circuited: a mode for all ports of a destination, and other modes for some.
//!
//! A pod or a namespace says it in a [`ShortCircuitAnnotation`]; `Mesh::build` lays those over the agent's own setting and gives
//! each workload its [`ShortCircuit`].

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

#[cfg(test)]
mod tests;

/// How many ports one annotation may name.
const MOST_PORTS: usize = 64;

/// Whether what is sent over a direct connection goes straight into the other end's receive queue. It does where both ends agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ShortCircuitMode {
    /// Never.
    Off,
    /// Where no program can tell: see `culvert check`.
    #[default]
    Auto,
    /// The operator knows the programs.
    On,
}

/// What holds for one workload, by the port of the destination, which is this workload or the one that it connects to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShortCircuit {
    general: ShortCircuitMode,
    ports: BTreeMap<NonZeroU16, ShortCircuitMode>,
}

/// What an annotation says: a mode for all ports, `PORT=MODE` for some, or first the one and then the others, separated by
/// commas. A port that it says nothing about is left to what is less specific.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShortCircuitAnnotation {
    general: Option<ShortCircuitMode>,
    ports: BTreeMap<NonZeroU16, ShortCircuitMode>,
}

/// A text that is no such annotation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShortCircuitError {
    /// Nothing, or nothing between two commas.
    #[error(
        "an item is empty; write on, off, auto or PORT=MODE, with one comma between two of them"
    )]
    Empty,
    /// Neither a mode nor a port with one.
    #[error("{0:?} is none of on, off, auto and PORT=MODE")]
    Item(String),
    /// The mode of a port that is none.
    #[error("{0:?} is none of on, off and auto")]
    Mode(String),
    /// The port that is none.
    #[error("{0:?} is not a port; write a number from 1 to 65535")]
    Port(String),
    /// A mode for all ports after another item.
    #[error("{0} is for all ports and not the first item; write it first, and once")]
    NotFirst(ShortCircuitMode),
    /// A port with two modes.
    #[error("the port {0} occurs twice; remove one")]
    Twice(NonZeroU16),
    /// More ports than an annotation may name.
    #[error(
        "more than {MOST_PORTS} ports are named; say what holds for most of them as the mode for all ports"
    )]
    TooMany,
}

impl ShortCircuit {
    /// The mode for connections to this port of the destination.
    pub fn mode(&self, port: u16) -> ShortCircuitMode {
        let named = NonZeroU16::new(port).and_then(|port| self.ports.get(&port));
        named.copied().unwrap_or(self.general)
    }

    /// With `auto` as what it means on this kernel.
    #[must_use]
    pub fn with_auto(mut self, meaning: ShortCircuitMode) -> Self {
        for mode in std::iter::once(&mut self.general).chain(self.ports.values_mut()) {
            if *mode == ShortCircuitMode::Auto {
                *mode = meaning;
            }
        }
        self
    }

    /// True if it is on for one port at least.
    pub fn is_on_somewhere(&self) -> bool {
        self.general == ShortCircuitMode::On
            || self
                .ports
                .values()
                .any(|mode| *mode == ShortCircuitMode::On)
    }

    /// What holds where a more specific place says this.
    pub fn overridden_by(mut self, annotation: &ShortCircuitAnnotation) -> Self {
        if let Some(general) = annotation.general {
            self = general.into();
        }
        self.ports.extend(&annotation.ports);
        self
    }
}

impl From<ShortCircuitMode> for ShortCircuit {
    /// The same for all ports.
    fn from(general: ShortCircuitMode) -> Self {
        Self {
            general,
            ports: BTreeMap::new(),
        }
    }
}

impl FromStr for ShortCircuitAnnotation {
    type Err = ShortCircuitError;

    fn from_str(text: &str) -> Result<Self, ShortCircuitError> {
        let mut read = Self {
            general: None,
            ports: BTreeMap::new(),
        };
        for (index, item) in text.split(',').map(str::trim).enumerate() {
            if item.is_empty() {
                return Err(ShortCircuitError::Empty);
            }
            let Some((port, mode)) = item.split_once('=') else {
                let invalid = |_| ShortCircuitError::Item(item.to_owned());
                let mode = item.parse().map_err(invalid)?;
                if index > 0 {
                    return Err(ShortCircuitError::NotFirst(mode));
                }
                read.general = Some(mode);
                continue;
            };
            let port = parse_port(port)?;
            if read.ports.insert(port, mode.parse()?).is_some() {
                return Err(ShortCircuitError::Twice(port));
            }
            if read.ports.len() > MOST_PORTS {
                return Err(ShortCircuitError::TooMany);
            }
        }
        Ok(read)
    }
}

/// Digits only: the standard library would accept a sign.
fn parse_port(text: &str) -> Result<NonZeroU16, ShortCircuitError> {
    let digits = Some(text).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    digits
        .and_then(|digits| digits.parse().ok())
        .ok_or_else(|| ShortCircuitError::Port(text.to_owned()))
}

impl FromStr for ShortCircuitMode {
    type Err = ShortCircuitError;

    fn from_str(text: &str) -> Result<Self, ShortCircuitError> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            _ => Err(ShortCircuitError::Mode(text.to_owned())),
        }
    }
}

impl fmt::Display for ShortCircuitMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Auto => "auto",
            Self::On => "on",
        })
    }
}
