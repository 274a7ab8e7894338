//! From the control plane's messages to the mesh's own types.
//!
//! Invariants: a resource is taken whole or not at all, and what is wrong with it is said by the name of the field; nothing here can
//! panic. An enumeration's value that is not known is an error: it may mean that a rule is stricter than it looks. [`lenient`] is for those who want some of
//! it ztunnel's way.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;

use ipnet::IpNet;

use crate::mesh::{
    AddressError, GatewayAddress, GatewayDestination, Health, HealthPolicy, IpFamilies,
    LoadBalancer, LoadBalancerMode, Locality, LocalityScope, MeshError, NetworkAddress,
    NetworkCidr, PortMap, Service, ServiceName, ServiceNameError, TunnelProtocol, WeightedWaypoint,
    WorkloadSpec, canonical_net,
};
use crate::policy::{PolicyName, PolicyNameError};
use crate::wire::istio::workload as wire;

pub mod lenient;
mod policies;
#[cfg(test)]
mod tests;

pub use policies::policy;

/// Why a resource is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResourceError {
    /// It is not the message it says it is.
    #[error("not a {expected}: {reason}")]
    Malformed {
        /// The message that was expected.
        expected: &'static str,
        /// What the decoder says.
        reason: String,
    },
    /// It is of a type nobody asked for.
    #[error("is a {found}, not a {expected}")]
    OtherType {
        /// The type it should be.
        expected: &'static str,
        /// The type it is.
        found: String,
    },
    /// It goes by another name than its content says.
    #[error("is named {content:?} by its content")]
    OtherName {
        /// The name that it should have.
        content: String,
    },
    /// A field that must be there is not.
    #[error("has no {0}")]
    Missing(&'static str),
    /// A value that this agent does not know.
    #[error("has the {field} {value}, which this agent does not know")]
    Unknown {
        /// The field.
        field: &'static str,
        /// The value on the wire.
        value: i32,
    },
    /// Not an IPv4 or IPv6 address.
    #[error("has a {field} of {length} bytes; an address has 4 or 16")]
    Address {
        /// The field.
        field: &'static str,
        /// How many bytes there are.
        length: usize,
    },
    /// A prefix longer than an address.
    #[error("has a {field} with a prefix of {length} bits")]
    Prefix {
        /// The field.
        field: &'static str,
        /// The length.
        length: u32,
    },
    /// Not a port.
    #[error("has the {field} {value}; a port is at most 65535")]
    Port {
        /// The field.
        field: &'static str,
        /// The number on the wire.
        value: u32,
    },
    /// More than any real resource has.
    #[error("has {count} {field}; {most} are taken")]
    TooMany {
        /// The field.
        field: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// A service's name.
    #[error(transparent)]
    Service(#[from] ServiceNameError),
    /// A policy's name.
    #[error(transparent)]
    Policy(#[from] PolicyNameError),
    /// An address with its network.
    #[error(transparent)]
    NetworkAddress(#[from] AddressError),
    /// It does not fit into a mesh.
    #[error(transparent)]
    Mesh(#[from] MeshError),
}

/// The most addresses, services, ports or policies of one resource.
const MOST: usize = 4096;

/// Texts that many resources repeat, each kept once.
#[derive(Debug, Default)]
pub struct Shared {
    texts: HashSet<Arc<str>>,
    /// How many there were after those that nobody used any more were dropped.
    settled: usize,
}

impl Shared {
    const FEW: usize = 1024;

    /// The text itself, or one equal to it.
    pub fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        if self.texts.len() >= self.settled.saturating_mul(2).max(Self::FEW) {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.settled = self.texts.len();
        }
        let new: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&new));
        new
    }
}

/// A workload.
///
/// # Errors
/// The first field that is wrong.
pub fn workload(
    message: wire::Workload,
    shared: &mut Shared,
) -> Result<WorkloadSpec, ResourceError> {
    if message.uid.is_empty() {
        return Err(ResourceError::Missing("uid"));
    }
    few("addresses", message.addresses.len())?;
    few("services", message.services.len())?;
    few(
        "authorization policies",
        message.authorization_policies.len(),
    )?;
    let addresses = message.addresses.iter();
    let addresses: Result<Vec<_>, _> = addresses.map(|bytes| ip("address", bytes)).collect();
    let services = message.services.iter().map(|(name, ports)| {
        few("ports", ports.ports.len())?;
        Ok((
            ServiceName::whole(shared.text(name))?,
            port_map(&ports.ports)?,
        ))
    });
    let mut services: Vec<_> = services.collect::<Result<_, ResourceError>>()?;
    services.sort_by(|(a, _): &(ServiceName, PortMap), (b, _)| a.cmp(b));
    let policies = message.authorization_policies.iter();
    let policies: Result<Vec<PolicyName>, _> = policies.map(|name| name.parse()).collect();
    let locality = message.locality.unwrap_or_default();
    Ok(WorkloadSpec {
        uid: message.uid.as_str().into(),
        name: message.name.as_str().into(),
        namespace: shared.text(&message.namespace),
        service_account: shared.text(&message.service_account),
        trust_domain: shared.text(&message.trust_domain),
        addresses: addresses?,
        network: shared.text(&message.network),
        host_network: match wire::NetworkMode::try_from(message.network_mode) {
            Ok(wire::NetworkMode::Standard) => false,
            Ok(wire::NetworkMode::HostNetwork) => true,
            Err(_) => return Err(unknown("network mode", message.network_mode)),
        },
        protocol: match wire::TunnelProtocol::try_from(message.tunnel_protocol) {
            Ok(wire::TunnelProtocol::Hbone) => TunnelProtocol::Hbone,
            // A sidecar's own mutual TLS: to the agent it is a stream like any other.
            Ok(wire::TunnelProtocol::None | wire::TunnelProtocol::LegacyIstioMtls) => {
                TunnelProtocol::Tcp
            }
            Err(_) => return Err(unknown("tunnel protocol", message.tunnel_protocol)),
        },
        node: shared.text(&message.node),
        hostname: shared.text(&message.hostname),
        waypoint: message.waypoint.map(|it| gateway(it, shared)).transpose()?,
        network_gateway: message
            .network_gateway
            .map(|it| gateway(it, shared))
            .transpose()?,
        services,
        authorization_policies: policies?,
        status: match wire::WorkloadStatus::try_from(message.status) {
            Ok(wire::WorkloadStatus::Healthy) => Health::Healthy,
            Ok(wire::WorkloadStatus::Unhealthy) => Health::Unhealthy,
            Err(_) => return Err(unknown("status", message.status)),
        },
        cluster_id: shared.text(&message.cluster_id),
        locality: Locality {
            region: shared.text(&locality.region),
            zone: shared.text(&locality.zone),
            subzone: shared.text(&locality.subzone),
        },
        capacity: message.capacity,
        canonical_name: shared.text(&message.canonical_name),
        canonical_revision: shared.text(&message.canonical_revision),
        workload_name: shared.text(&message.workload_name),
        annotations: crate::mesh::Annotations::default(),
    })
}

/// A service.
///
/// # Errors
/// The first field that is wrong.
pub fn service(message: wire::Service, shared: &mut Shared) -> Result<Service, ResourceError> {
    few("addresses", message.addresses.len())?;
    few("ports", message.ports.len())?;
    few("subject alternative names", message.subject_alt_names.len())?;
    let vips = message.addresses.iter().map(|vip| {
        let ip = ip("address", &vip.address)?;
        let net = match vip.length {
            Some(length) => range("address", ip, length)?,
            None => IpNet::from(ip),
        };
        Ok(NetworkCidr::new(shared.text(&vip.network), net))
    });
    let vips = vips.collect::<Result<Vec<_>, ResourceError>>()?;
    // Who may see a service is the control plane's choice: what is not for this node is not sent.
    if wire::Visibility::try_from(message.visibility).is_err() {
        return Err(unknown("visibility", message.visibility));
    }
    Ok(Service {
        id: ServiceName::new(&message.namespace, &message.hostname)?,
        name: message.name.as_str().into(),
        vips,
        ports: port_map(&message.ports)?,
        subject_alt_names: message
            .subject_alt_names
            .iter()
            .map(|name| shared.text(name))
            .collect(),
        waypoints: waypoints(message.waypoint, message.weighted_waypoints, shared)?,
        load_balancer: message
            .load_balancing
            .map(load_balancer)
            .transpose()?
            .unwrap_or_default(),
        ip_families: match wire::IpFamilies::try_from(message.ip_families) {
            Ok(wire::IpFamilies::Automatic) => IpFamilies::Automatic,
            Ok(wire::IpFamilies::Ipv4Only) => IpFamilies::Ipv4Only,
            Ok(wire::IpFamilies::Ipv6Only) => IpFamilies::Ipv6Only,
            Ok(wire::IpFamilies::Dual) => IpFamilies::Dual,
            Err(_) => return Err(unknown("IP families", message.ip_families)),
        },
        canonical: message.canonical,
    })
}

/// Those by weight, or else the one without. A service whose waypoints all have no weight would be reached past them: it is refused.
fn waypoints(
    only: Option<wire::GatewayAddress>,
    weighted: Vec<wire::WeightedWaypoint>,
    shared: &mut Shared,
) -> Result<Vec<WeightedWaypoint>, ResourceError> {
    few("waypoints", weighted.len())?;
    let is_weighted = !weighted.is_empty();
    let mut waypoints = Vec::new();
    for one in weighted {
        let destination = one.destination.ok_or(ResourceError::Missing("waypoint"))?;
        let gateway = gateway(destination, shared)?;
        if let Some(weight) = NonZeroU32::new(one.weight) {
            waypoints.push(WeightedWaypoint { gateway, weight });
        }
    }
    if waypoints.is_empty() {
        let only = only.map(|it| gateway(it, shared)).transpose()?;
        waypoints.extend(only.map(WeightedWaypoint::from));
        if is_weighted && waypoints.is_empty() {
            return Err(ResourceError::Missing("waypoint with a weight"));
        }
    }
    Ok(waypoints)
}

fn load_balancer(message: wire::LoadBalancing) -> Result<LoadBalancer, ResourceError> {
    use wire::load_balancing::{HealthPolicy as Policy, Mode, Scope};
    few("routing preferences", message.routing_preference.len())?;
    let preferences = message.routing_preference.into_iter().map(|preference| {
        Ok(match Scope::try_from(preference) {
            Ok(Scope::Network) => LocalityScope::Network,
            Ok(Scope::Region) => LocalityScope::Region,
            Ok(Scope::Zone) => LocalityScope::Zone,
            Ok(Scope::Subzone) => LocalityScope::Subzone,
            Ok(Scope::Node) => LocalityScope::Node,
            Ok(Scope::Cluster) => LocalityScope::Cluster,
            Ok(Scope::UnspecifiedScope) | Err(_) => {
                return Err(unknown("routing preference", preference));
            }
        })
    });
    Ok(LoadBalancer {
        routing_preferences: preferences.collect::<Result<_, _>>()?,
        mode: match Mode::try_from(message.mode) {
            Ok(Mode::UnspecifiedMode) => LoadBalancerMode::Standard,
            Ok(Mode::Strict) => LoadBalancerMode::Strict,
            Ok(Mode::Failover) => LoadBalancerMode::Failover,
            Ok(Mode::Passthrough) => LoadBalancerMode::Passthrough,
            Err(_) => return Err(unknown("load-balancing mode", message.mode)),
        },
        health_policy: match Policy::try_from(message.health_policy) {
            Ok(Policy::OnlyHealthy) => HealthPolicy::OnlyHealthy,
            Ok(Policy::AllowAll) => HealthPolicy::AllowAll,
            Err(_) => return Err(unknown("health policy", message.health_policy)),
        },
    })
}

fn gateway(
    message: wire::GatewayAddress,
    shared: &mut Shared,
) -> Result<GatewayAddress, ResourceError> {
    use wire::gateway_address::Destination;
    let destination = match message.destination {
        Some(Destination::Hostname(name)) => {
            GatewayDestination::Service(ServiceName::new(&name.namespace, &name.hostname)?)
        }
        Some(Destination::Address(address)) => GatewayDestination::Address(NetworkAddress::new(
            shared.text(&address.network),
            ip("gateway's address", &address.address)?,
        )),
        None => return Err(ResourceError::Missing("gateway's destination")),
    };
    let hbone_mtls_port = match message.hbone_mtls_port {
        0 => return Err(ResourceError::Missing("gateway's HBONE port")),
        number => port("gateway's HBONE port", number)?,
    };
    Ok(GatewayAddress {
        destination,
        hbone_mtls_port,
    })
}

fn port_map(ports: &[wire::Port]) -> Result<PortMap, ResourceError> {
    let pair = |entry: &wire::Port| {
        Ok((
            port("service port", entry.service_port)?,
            port("target port", entry.target_port)?,
        ))
    };
    let pairs: Result<Vec<_>, ResourceError> = ports.iter().map(pair).collect();
    Ok(pairs?.into_iter().collect())
}

fn port(field: &'static str, value: u32) -> Result<u16, ResourceError> {
    u16::try_from(value).map_err(|_| ResourceError::Port { field, value })
}

/// Never IPv4-mapped.
fn ip(field: &'static str, bytes: &[u8]) -> Result<IpAddr, ResourceError> {
    let four = <[u8; 4]>::try_from(bytes).map(|four| IpAddr::V4(Ipv4Addr::from(four)));
    let six = || <[u8; 16]>::try_from(bytes).map(|six| IpAddr::V6(Ipv6Addr::from(six)));
    let ip = four
        .or_else(|_| six())
        .map_err(|_| ResourceError::Address {
            field,
            length: bytes.len(),
        })?;
    Ok(ip.to_canonical())
}

fn range(field: &'static str, ip: IpAddr, length: u32) -> Result<IpNet, ResourceError> {
    let net = u8::try_from(length)
        .ok()
        .and_then(|length| IpNet::new(ip, length).ok());
    net.map(canonical_net)
        .ok_or(ResourceError::Prefix { field, length })
}

fn few(field: &'static str, count: usize) -> Result<(), ResourceError> {
    if count > MOST {
        return Err(ResourceError::TooMany {
            field,
            count,
            most: MOST,
        });
    }
    Ok(())
}

fn unknown(field: &'static str, value: i32) -> ResourceError {
    ResourceError::Unknown { field, value }
}
