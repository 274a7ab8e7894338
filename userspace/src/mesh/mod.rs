//! The in-memory view of the mesh: workloads, services and policies, and the look-ups that the data path needs.
//!
//! Pure: no I/O, no clock. A [`Mesh`] is an immutable snapshot built from what a source in `xds` read; the [`Store`] holds the
//! current one. Readers (`proxy`, `kernel`'s feeder, `admin`) take a snapshot and never wait for a writer.

mod address;
mod balance;
mod build;
mod service;
mod snapshot;
mod store;
mod workload;

#[cfg(test)]
mod tests;

pub use address::{
    AddressError, NetworkAddress, NetworkCidr, ServiceName, ServiceNameError, canonical_net,
};
pub use balance::Endpoint;
pub use build::{MeshDefaults, MeshError, MeshResources};
pub use service::{
    HealthPolicy, IpFamilies, LoadBalancer, LoadBalancerMode, LocalityScope, Service,
};
pub use snapshot::{Destination, Mesh};
pub use store::{Revision, Store};
pub use workload::{
    GatewayAddress, GatewayDestination, Health, Locality, PortMap, TunnelProtocol, Workload,
    WorkloadSpec,
};
