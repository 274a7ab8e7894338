//! Who is a waypoint, and of what. Asked by `proxy`, of a client and of the pod that a tunnel leads to.

use std::net::IpAddr;

use super::{
    Destination, GatewayAddress, GatewayDestination, Mesh, Service, ServiceName, Workload,
};

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
        match &found {
            Destination::Service(service) => self.is_waypoint_of_service(workload, service),
            Destination::Workload(behind) => {
                let gateway = behind.waypoint.as_ref();
                gateway.is_some_and(|gateway| self.is_at(gateway, workload))
            }
            Destination::Unknown => false,
        }
    }

    /// Whether a workload is one of the service's waypoints.
    pub fn is_waypoint_of_service(&self, workload: &Workload, service: &Service) -> bool {
        let mut waypoints = service.waypoints.iter();
        waypoints.any(|one| self.is_at(&one.gateway, workload))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{MeshDefaults, MeshResources, NetworkAddress, PortMap, WorkloadSpec};
    use super::*;

    fn gateway(destination: GatewayDestination) -> Option<GatewayAddress> {
        Some(GatewayAddress {
            destination,
            hbone_mtls_port: 15008,
        })
    }

    fn workload(uid: &str, ip: &str, waypoint: Option<GatewayAddress>) -> WorkloadSpec {
        WorkloadSpec {
            uid: uid.into(),
            namespace: "ns".into(),
            addresses: vec![ip.parse().unwrap()],
            waypoint,
            ..WorkloadSpec::default()
        }
    }

    #[test]
    fn a_workload_is_the_waypoint_of_what_names_it_or_its_service_and_of_nothing_else() {
        let service: ServiceName = "ns/waypoint".parse().unwrap();
        let address = NetworkAddress::new("", "10.0.0.9".parse().unwrap());
        let by_name = gateway(GatewayDestination::Service(service.clone()));
        let by_address = gateway(GatewayDestination::Address(address));
        let resources = MeshResources {
            workloads: vec![
                WorkloadSpec {
                    services: vec![(service, PortMap::default())],
                    ..workload("waypoint", "10.0.0.9", None)
                },
                workload("by-name", "10.0.0.1", by_name),
                workload("by-address", "10.0.0.2", by_address),
                workload("other", "10.0.0.3", None),
            ],
            ..MeshResources::default()
        };
        let mesh = Mesh::build(resources, &MeshDefaults::default()).unwrap();
        let of = |uid: &str| {
            let workload = mesh.workload_by_uid(uid).unwrap();
            [1, 2, 3, 4].map(|last| mesh.is_waypoint_of(workload, "", [10, 0, 0, last].into()))
        };
        assert_eq!(of("waypoint"), [true, true, false, false]);
        assert_eq!(of("other"), [false; 4]);
    }
}
