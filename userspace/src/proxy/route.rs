//! Which way a connection out of a pod goes. Pure but for chance; asked by `outbound` for each connection.
//!
//! Invariant: what the mesh carries between nodes is never carried as plain text: where the way is not known it is
//! [`Route::Nowhere`].

use std::borrow::Cow;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::Arc;

use culvert_abi::{HBONE_PORT, OWN_PORTS};

use crate::mesh::{
    Destination, GatewayAddress, GatewayDestination, LoadBalancerMode, Mesh, Service,
    TunnelProtocol, WeightedWaypoint, Workload,
};

#[cfg(test)]
mod tests;

/// Where a connection goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Tunnel(Tunnel),
    /// As plain TCP.
    Plain {
        workload: Option<Arc<Workload>>,
        target: SocketAddr,
        service: Option<Arc<Service>>,
    },
    /// It is refused, for this reason.
    Nowhere(Cow<'static, str>),
}

/// A connection inside a tunnel.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tunnel {
    pub end: TunnelEnd,
    /// What the other end is asked to connect to: an endpoint, or of a waypoint the client's own destination.
    pub target: SocketAddr,
    /// What the client connected to.
    pub service: Option<Arc<Service>>,
    pub is_waypoint: bool,
}

/// The other end of a tunnel.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TunnelEnd {
    pub workload: Arc<Workload>,
    pub address: SocketAddr,
    /// By which it was found: it may have that one's names as well as its own.
    pub service: Option<Arc<Service>>,
}

/// Decides the way: service by its rules, workload by what it speaks, everything else as it is.
///
/// `chosen` is the endpoint that the kernel part has chosen already, so that the shares are those of one choice, not of two.
pub(super) fn route(
    mesh: &Mesh,
    network: &str,
    destination: SocketAddr,
    client: Option<&Workload>,
    chosen: Option<SocketAddr>,
) -> Route {
    match mesh.lookup(network, destination.ip(), client) {
        Destination::Unknown => Route::Plain {
            workload: None,
            target: destination,
            service: None,
        },
        Destination::Workload(workload) => match &workload.waypoint {
            Some(gateway) if !is_waypoint(mesh, client, gateway) => {
                to_waypoint(waypoint(mesh, gateway, client), network, destination, None)
            }
            _ => to_workload(workload, destination, network, None),
        },
        Destination::Service(service) => {
            let is_waypoint =
                client.is_some_and(|client| mesh.is_waypoint_of_service(client, &service));
            if service.waypoints.is_empty() || is_waypoint {
                to_service(mesh, network, service, destination, client, chosen)
            } else {
                let end = one_of(mesh, &service.waypoints, client);
                to_waypoint(end, network, destination, Some(service))
            }
        }
    }
}

fn to_service(
    mesh: &Mesh,
    network: &str,
    service: Arc<Service>,
    destination: SocketAddr,
    client: Option<&Workload>,
    chosen: Option<SocketAddr>,
) -> Route {
    if service.load_balancer.mode == LoadBalancerMode::Passthrough {
        return Route::Plain {
            workload: None,
            target: destination,
            service: Some(service),
        };
    }
    // The mesh may have changed since: what is not a candidate any more is not taken.
    let chosen = chosen.and_then(|chosen| {
        let workload = mesh.endpoint_at(&service, destination, client, chosen)?;
        Some((workload, chosen))
    });
    match chosen.or_else(|| mesh.choose_endpoint(&service, destination, client, &mut random)) {
        Some((workload, target)) => to_workload(workload, target, network, Some(service)),
        None => Route::Nowhere("the service has no healthy endpoint for this port".into()),
    }
}

fn to_workload(
    workload: Arc<Workload>,
    target: SocketAddr,
    network: &str,
    service: Option<Arc<Service>>,
) -> Route {
    if *workload.network != *network {
        return Route::Nowhere(
            "the workload is on another network, which this version cannot reach yet".into(),
        );
    }
    if OWN_PORTS.contains(&target.port()) && workload.protocol == TunnelProtocol::Hbone {
        return Route::Nowhere("the port belongs to the agent of the destination".into());
    }
    match workload.protocol {
        TunnelProtocol::Hbone => Route::Tunnel(Tunnel {
            end: TunnelEnd {
                workload,
                address: SocketAddr::new(target.ip(), HBONE_PORT),
                service: service.clone(),
            },
            target,
            service,
            is_waypoint: false,
        }),
        TunnelProtocol::Tcp => Route::Plain {
            workload: Some(workload),
            target,
            service,
        },
    }
}

/// Through the waypoint in front of the destination, which is told where the client wanted to go.
fn to_waypoint(
    end: Option<TunnelEnd>,
    network: &str,
    destination: SocketAddr,
    service: Option<Arc<Service>>,
) -> Route {
    let Some(end) = end else {
        return Route::Nowhere(
            "the waypoint of the destination is not known, or has no healthy endpoint".into(),
        );
    };
    if *end.workload.network != *network {
        return Route::Nowhere("the waypoint of the destination is on another network, which this version cannot reach yet".into());
    }
    Route::Tunnel(Tunnel {
        end,
        target: destination,
        service,
        is_waypoint: true,
    })
}

/// By weight, of those that can be reached.
fn one_of(
    mesh: &Mesh,
    waypoints: &[WeightedWaypoint],
    client: Option<&Workload>,
) -> Option<TunnelEnd> {
    let mut left: Vec<&WeightedWaypoint> = waypoints.iter().collect();
    loop {
        let weight = |one: &WeightedWaypoint| u64::from(one.weight.get());
        let all: u64 = left.iter().map(|one| weight(one)).sum();
        let mut at = random().checked_rem(all)?;
        let chosen = left.iter().position(|one| {
            let found = at < weight(one);
            at = at.saturating_sub(weight(one));
            found
        })?;
        let chosen = left.swap_remove(chosen);
        let end = waypoint(mesh, &chosen.gateway, client);
        if end.is_some() {
            return end;
        }
    }
}

/// One of the waypoint's workloads.
fn waypoint(mesh: &Mesh, gateway: &GatewayAddress, client: Option<&Workload>) -> Option<TunnelEnd> {
    let port = gateway.hbone_mtls_port;
    let found = match &gateway.destination {
        GatewayDestination::Service(name) => {
            Destination::Service(mesh.service_by_name(name.as_str())?.clone())
        }
        GatewayDestination::Address(address) => mesh.lookup(&address.network, address.ip, client),
    };
    match found {
        Destination::Workload(workload) => {
            let GatewayDestination::Address(address) = &gateway.destination else {
                return None;
            };
            Some(TunnelEnd {
                workload,
                address: SocketAddr::new(address.ip, port),
                service: None,
            })
        }
        Destination::Service(service) => {
            // Which family is of no account for a name; an address says it.
            let asked = match &gateway.destination {
                GatewayDestination::Address(address) => Some(address.ip),
                GatewayDestination::Service(_) => service.vips.first().map(|vip| vip.net.addr()),
            };
            let asked = SocketAddr::new(asked.unwrap_or([0, 0, 0, 0].into()), port);
            let (workload, address) = mesh.choose_endpoint(&service, asked, client, &mut random)?;
            Some(TunnelEnd {
                workload,
                address,
                service: Some(service),
            })
        }
        Destination::Unknown => None,
    }
}

/// Whether a client is the waypoint itself: what it sends on does not come back to it.
fn is_waypoint(mesh: &Mesh, client: Option<&Workload>, gateway: &GatewayAddress) -> bool {
    client.is_some_and(|client| mesh.is_at(gateway, client))
}

/// Good enough to balance load; not for secrets.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
