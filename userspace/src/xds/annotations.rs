//! The annotations of a workload or a namespace, of which those that begin with `culvert.dev/` are for us.
//!
//! Invariant: ours are understood or refused. A misspelt one must not leave traffic the way it was meant not to go.

use std::fmt;

use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::mesh::{self, ShortCircuitAnnotation};

/// What ours begin with.
const PREFIX: &str = "culvert.dev/";
/// Whether connections within the node may be direct.
const DIRECT: &str = "culvert.dev/direct";
/// Which of those may be short-circuited.
const SHORT_CIRCUIT: &str = "culvert.dev/short-circuit";

/// Annotations as pods and namespaces have them: those of others are not our business.
#[derive(Debug, Default)]
pub struct Annotations(pub mesh::Annotations);

/// Annotations that are written for us alone: there are no others among them.
#[derive(Debug)]
pub struct OnlyOurs(pub mesh::Annotations);

impl<'de> Deserialize<'de> for Annotations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = deserializer.deserialize_map(Reader { only_ours: false })?;
        Ok(Self(read))
    }
}

impl<'de> Deserialize<'de> for OnlyOurs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = deserializer.deserialize_map(Reader { only_ours: true })?;
        Ok(Self(read))
    }
}

struct Reader {
    only_ours: bool,
}

impl<'de> Visitor<'de> for Reader {
    type Value = mesh::Annotations;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("annotations: a map of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<mesh::Annotations, A::Error> {
        let mut read = mesh::Annotations::default();
        while let Some(key) = map.next_key::<String>()? {
            if key == DIRECT {
                read.direct = Some(map.next_value_seed(Switch(&key))?);
            } else if key == SHORT_CIRCUIT {
                read.short_circuit = Some(map.next_value_seed(ShortCircuit(&key))?);
            } else if self.only_ours || key.starts_with(PREFIX) {
                map.next_value_seed(Unknown(&key))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(read)
    }
}

/// A value that is `on` or `off`, read as text: YAML's own truth values are written otherwise.
struct Switch<'a>(&'a str);

/// A value that is `on`, `off` or `auto`, also by port.
struct ShortCircuit<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for ShortCircuit<'_> {
    type Value = ShortCircuitAnnotation;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> Result<ShortCircuitAnnotation, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for ShortCircuit<'_> {
    type Value = ShortCircuitAnnotation;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: on, off, auto or PORT=MODE", self.0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<ShortCircuitAnnotation, E> {
        // The value last: it may be long, and an error is cut off somewhere.
        text.parse()
            .map_err(|error| E::custom(format!("{}: {error} (the value is {text:?})", self.0)))
    }
}

/// The value of an annotation of ours that does not exist.
struct Unknown<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Switch<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Switch<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: on or off", self.0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<bool, E> {
        match text {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(E::custom(format!(
                "{}: {text:?} is neither on nor off",
                self.0
            ))),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Unknown<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Unknown<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "another annotation than {}", self.0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        let key = self.0;
        Err(E::custom(format!(
            "there is no annotation {key} (here {text:?}); of {PREFIX} there are {DIRECT} and {SHORT_CIRCUIT}"
        )))
    }
}
