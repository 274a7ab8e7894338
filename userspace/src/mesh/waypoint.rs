//! Who is a waypoint, and of what. Asked by `proxy`, of a client and of the pod that a tunnel leads to.

use std::net::IpAddr;

use super::{Destination, GatewayAddress, GatewayDestination, Mesh, ServiceName, Workload};

impl Mesh {
    /// Whether a workload is what a gateway's address leads to: it has the address, or is an endpoint of the service that is named or
    /// has the address.
    pub fn is_at(&self, gateway: &GatewayAddress, workload: &Workload) -> bool {
        let is_endpoint =
            |service: &ServiceName| workload.services.iter().any(|(name, _)| name == service);
        match &gateway.destination {
            GatewayDestination::Service(name) => is_endpoint(name),
            GatewayDestination::Address(address) => {
                match self.lookup(&address.network, address.ip, Some(workload)) {
                    Destination::Service(service) => is_endpoint(&service.id),
                    Destination::Workload(_) | Destination::Unknown => {
                        *address.network == *workload.network && workload.has_address(address.ip)
                    }
                }
            }
        }
    }

    /// Whether a workload is the waypoint of the service, or else of the workload, that has this address on this network.
    pub fn is_waypoint_of(&self, workload: &Workload, network: &str, ip: IpAddr) -> bool {
        let found = self.lookup(network, ip, Some(workload));
        let gateway = match &found {
            Destination::Service(service) => service.waypoint.as_ref(),
            Destination::Workload(behind) => behind.waypoint.as_ref(),
            Destination::Unknown => None,
        };
        gateway.is_some_and(|gateway| self.is_at(gateway, workload))
    }
}
