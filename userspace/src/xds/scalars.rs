//! The texts of the mesh and annotations files that have a form of their own, checked where they stand so that an error has their line.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::mesh::{GatewayDestination, NetworkAddress, NetworkCidr, ServiceName, canonical_net};
use crate::policy::{PolicyName, ServiceAccountMatch, StringMatch};

/// A text of type `T`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text<T>(pub T);

/// How `T` is written in the file.
pub trait Written: Sized {
    fn read(text: &str) -> Result<Self, String>;
}

impl<'de, T: Written> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(std::marker::PhantomData<T>);

        impl<T: Written> Visitor<'_> for Reader<T> {
            type Value = Text<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                T::read(text).map(Text).map_err(E::custom)
            }
        }

        deserializer.deserialize_str(Reader(std::marker::PhantomData))
    }
}

/// One part of a resource's name.
#[derive(Debug)]
pub struct Name(pub String);

/// A port that something listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(pub u16);

/// The port of an endpoint, or 0 to leave it to the endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TargetPort(pub u16);

/// A condition on a principal.
#[derive(Debug)]
pub struct Principal(pub StringMatch);

impl Written for Name {
    fn read(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.contains('/') {
            return Err(format!(
                "{text:?} is not a name; it must not be empty or contain a slash"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl Written for u32 {
    fn read(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| {
            format!(
                "{text:?} is not a capacity; write a number from 0 to {}",
                u32::MAX
            )
        })
    }
}

impl Written for Port {
    fn read(text: &str) -> Result<Self, String> {
        match decimal(text) {
            Some(port) if port > 0 => Ok(Self(port)),
            _ => Err(format!(
                "{text:?} is not a port; write a number from 1 to 65535"
            )),
        }
    }
}

impl Written for TargetPort {
    fn read(text: &str) -> Result<Self, String> {
        let expected = "write a number from 1 to 65535, or 0 where each endpoint has its own";
        decimal(text)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is not a target port; {expected}"))
    }
}

/// Digits only: `u16` would accept a sign.
fn decimal(text: &str) -> Option<u16> {
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
}

impl Written for IpAddr {
    fn read(text: &str) -> Result<Self, String> {
        let ip: IpAddr = text
            .parse()
            .map_err(|_| format!("{text:?} is not an IP address"))?;
        Ok(ip.to_canonical())
    }
}

impl Written for IpNet {
    fn read(text: &str) -> Result<Self, String> {
        let address = || text.parse::<IpAddr>().map(IpNet::from);
        let net = text.parse::<IpNet>().or_else(|_| address());
        net.map(canonical_net)
            .map_err(|_| format!("{text:?} is not a CIDR; write it as in 10.0.0.0/8 or 10.1.2.3"))
    }
}

fn from_str<T: FromStr>(text: &str) -> Result<T, String>
where
    T::Err: fmt::Display,
{
    text.parse().map_err(|error: T::Err| error.to_string())
}

impl Written for NetworkCidr {
    fn read(text: &str) -> Result<Self, String> {
        from_str(text)
    }
}

impl Written for ServiceName {
    fn read(text: &str) -> Result<Self, String> {
        from_str(text)
    }
}

impl Written for PolicyName {
    fn read(text: &str) -> Result<Self, String> {
        from_str(text)
    }
}

impl Written for GatewayDestination {
    /// A hostname is never an IP address, so what follows the slash decides.
    fn read(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<NetworkAddress>() {
            return Ok(Self::Address(address));
        }
        text.parse().map(Self::Service).map_err(|_| {
            format!("{text:?} does not name a gateway; write namespace/hostname or network/ip")
        })
    }
}

const STRING_FORMS: &str = "write foo, foo*, *foo or * (in quotes where it begins with *), or a map of one of exact, prefix, suffix, presence";

impl Written for StringMatch {
    fn read(text: &str) -> Result<Self, String> {
        let (kind, value): (fn(&str) -> StringMatch, &str) =
            match (text.strip_prefix('*'), text.strip_suffix('*')) {
                _ if text == "*" => return Ok(Self::Presence),
                (Some(suffix), _) => (|value| Self::Suffix(value.into()), suffix),
                (None, Some(prefix)) => (|value| Self::Prefix(value.into()), prefix),
                (None, None) => (|value| Self::Exact(value.into()), text),
            };
        if value.is_empty() || value.contains('*') {
            return Err(format!("{text:?} is not a string match; {STRING_FORMS}"));
        }
        Ok(kind(value))
    }
}

/// A string match as a text or as a map.
#[derive(Debug)]
pub struct Pattern(pub StringMatch);

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Pattern;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a string match: {STRING_FORMS}")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Pattern, E> {
                StringMatch::read(text).map(Pattern).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pattern, A::Error> {
                let one =
                    || A::Error::custom(format!("a string match says one thing; {STRING_FORMS}"));
                let kind: Kind = map.next_key()?.ok_or_else(one)?;
                let found = match kind {
                    Kind::Presence => {
                        map.next_value::<Nothing>()?;
                        StringMatch::Presence
                    }
                    Kind::Exact => StringMatch::Exact(map.next_value::<NonEmpty>()?.0.into()),
                    Kind::Prefix => StringMatch::Prefix(map.next_value::<NonEmpty>()?.0.into()),
                    Kind::Suffix => StringMatch::Suffix(map.next_value::<NonEmpty>()?.0.into()),
                };
                if map.next_key::<Kind>()?.is_some() {
                    return Err(one());
                }
                Ok(Pattern(found))
            }
        }

        deserializer.deserialize_any(Reader)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Exact,
    Prefix,
    Suffix,
    Presence,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

struct NonEmpty(String);

impl<'de> Deserialize<'de> for NonEmpty {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() {
            return Err(D::Error::custom(
                "an empty string match; name something, or write * for any",
            ));
        }
        Ok(Self(text))
    }
}

impl<'de> Deserialize<'de> for Principal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Pattern(pattern) = Pattern::deserialize(deserializer)?;
        if let StringMatch::Exact(text) | StringMatch::Prefix(text) | StringMatch::Suffix(text) =
            &pattern
            && text.contains("://")
        {
            // It would match nobody, and a DENY that matches nobody is an open door.
            return Err(D::Error::custom(format!(
                "the principal {text:?} would never match; write it without spiffe://, as in cluster.local/ns/web/sa/front"
            )));
        }
        Ok(Self(pattern))
    }
}

/// A service account as `namespace/name` or as a map.
#[derive(Debug)]
pub struct ServiceAccount(pub ServiceAccountMatch);

impl<'de> Deserialize<'de> for ServiceAccount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields)]
        struct Parts {
            namespace: String,
            service_account: String,
        }

        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = ServiceAccount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a service account: namespace/name, or a map of namespace and serviceAccount",
                )
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<ServiceAccount, E> {
                let (namespace, name) = text.split_once('/').unwrap_or_default();
                checked(namespace, name)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ServiceAccount, A::Error> {
                let parts = Parts::deserialize(serde::de::value::MapAccessDeserializer::new(map))?;
                checked(&parts.namespace, &parts.service_account)
            }
        }

        fn checked<E: Error>(namespace: &str, name: &str) -> Result<ServiceAccount, E> {
            if namespace.is_empty()
                || name.is_empty()
                || namespace.contains('/')
                || name.contains('/')
            {
                return Err(E::custom("not a service account; write namespace/name"));
            }
            Ok(ServiceAccount(ServiceAccountMatch {
                namespace: namespace.into(),
                service_account: name.into(),
            }))
        }

        deserializer.deserialize_any(Reader)
    }
}
