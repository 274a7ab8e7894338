//! How resources name each other: an address on a network, a service by namespace and hostname.
//!
//! Invariant: an address in here is never IPv4-mapped IPv6. Read by the sources in `xds`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

/// One address on one network, written `network/ip`. The network may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkAddress {
    /// The network.
    pub network: Arc<str>,
    /// The address on it.
    pub ip: IpAddr,
}

/// A range of addresses on one network, written `network/ip` or `network/ip/length`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkCidr {
    /// The network.
    pub network: Arc<str>,
    /// The addresses on it.
    pub net: IpNet,
}

/// The name of a service, `namespace/hostname`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(Arc<str>);

/// A text that is not an address on a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not an address.
    #[error(
        "{0:?} is not an address on a network; write network/ip, or /ip for the network without a name"
    )]
    Address(String),
    /// Not a range of addresses.
    #[error(
        "{0:?} is not an address or range on a network; write network/ip or network/ip/length, or /ip for the network without a name"
    )]
    Range(String),
}

/// A text that is not a service's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a service's name; write it as namespace/hostname")]
pub struct ServiceNameError(String);

/// The range in its one spelling: no bits after the prefix, IPv4 where it is IPv4-mapped.
pub fn canonical_net(net: IpNet) -> IpNet {
    const MAPPED: u8 = 96;
    let net = net.trunc();
    let IpNet::V6(six) = net else { return net };
    six.prefix_len()
        .checked_sub(MAPPED)
        .zip(six.addr().to_ipv4_mapped())
        .and_then(|(length, four): (u8, Ipv4Addr)| Ipv4Net::new(four, length).ok())
        .map_or(net, IpNet::V4)
}

impl NetworkAddress {
    /// Turns an IPv4-mapped address into IPv4.
    pub fn new(network: impl Into<Arc<str>>, ip: IpAddr) -> Self {
        Self {
            network: network.into(),
            ip: ip.to_canonical(),
        }
    }
}

impl NetworkCidr {
    /// Turns an IPv4-mapped range into IPv4 and drops the bits after the prefix.
    pub fn new(network: impl Into<Arc<str>>, net: IpNet) -> Self {
        Self {
            network: network.into(),
            net: canonical_net(net),
        }
    }

    /// The address, if it is exactly one.
    pub fn single(&self) -> Option<IpAddr> {
        (self.net.prefix_len() == self.net.max_prefix_len()).then(|| self.net.addr())
    }
}

impl ServiceName {
    /// Joins the two parts.
    ///
    /// # Errors
    /// A part is empty or contains a slash.
    pub fn new(namespace: &str, hostname: &str) -> Result<Self, ServiceNameError> {
        let joined = format!("{namespace}/{hostname}");
        if namespace.is_empty()
            || hostname.is_empty()
            || namespace.contains('/')
            || hostname.contains('/')
        {
            return Err(ServiceNameError(joined));
        }
        Ok(Self(joined.into()))
    }

    /// Takes the whole name, which may be shared with others.
    ///
    /// # Errors
    /// It is not two parts with a slash between them.
    pub fn whole(name: Arc<str>) -> Result<Self, ServiceNameError> {
        match name.split_once('/') {
            Some((namespace, hostname))
                if !namespace.is_empty() && !hostname.is_empty() && !hostname.contains('/') =>
            {
                Ok(Self(name))
            }
            _ => Err(ServiceNameError(name.to_string())),
        }
    }

    /// The namespace of the service.
    pub fn namespace(&self) -> &str {
        self.0
            .split_once('/')
            .map_or("", |(namespace, _)| namespace)
    }

    /// The name that clients look up.
    pub fn hostname(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, hostname)| hostname)
    }

    /// `namespace/hostname`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for ServiceName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl FromStr for NetworkAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text
            .split_once('/')
            .and_then(|(network, ip)| Some(Self::new(network, ip.parse().ok()?)));
        parsed.ok_or_else(|| AddressError::Address(text.to_owned()))
    }
}

impl FromStr for NetworkCidr {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let net = |text: &str| {
            text.parse()
                .ok()
                .or_else(|| text.parse().ok().map(|ip: IpAddr| IpNet::from(ip)))
        };
        let parsed = text
            .split_once('/')
            .and_then(|(network, range)| Some(Self::new(network, net(range)?)));
        parsed.ok_or_else(|| AddressError::Range(text.to_owned()))
    }
}

impl FromStr for ServiceName {
    type Err = ServiceNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, hostname) = text
            .split_once('/')
            .ok_or_else(|| ServiceNameError(text.to_owned()))?;
        Self::new(namespace, hostname)
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

impl fmt::Display for NetworkCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.single() {
            Some(ip) => write!(f, "{}/{ip}", self.network),
            None => write!(f, "{}/{}", self.network, self.net),
        }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceName({self})")
    }
}
