//! The in-memory view of the mesh: workloads, services and policies, and the look-ups that the data path needs.
//!
//! Pure: no I/O, no clock. A [`Mesh`] is an immutable snapshot built from what a source in `xds` read; the [`Store`] holds the
//! current one. Readers (`proxy`, `kernel`'s feeder, `admin`) take a snapshot and never wait for a writer.

mod address;
mod balance;
mod build;
mod draft;
mod indexes;
mod kernel_choice;
mod namespaces;
mod service;
mod shared_map;
mod short_circuit;
mod slots;
mod snapshot;
mod store;
mod waypoint;
mod workload;

#[cfg(test)]
mod tests;

pub use address::{
    AddressError, NetworkAddress, NetworkCidr, ServiceName, ServiceNameError, canonical_net,
};
pub use balance::{Candidate, Endpoint};
pub use build::{MeshDefaults, MeshError, MeshResources};
pub use draft::Draft;
pub use kernel_choice::{ClientView, KernelChoice, MOST_ENDPOINTS};
pub use namespaces::{NamespaceAnnotations, Namespaces};
pub use service::{
    HealthPolicy, IpFamilies, LoadBalancer, LoadBalancerMode, LocalityScope, Service,
    WeightedWaypoint,
};
pub use short_circuit::{
    ShortCircuit, ShortCircuitAnnotation, ShortCircuitError, ShortCircuitMode,
};
pub use slots::{AliasSlot, alias_table};
pub use snapshot::{Destination, Mesh};
pub use store::{Revision, Store};
pub use workload::{
    Annotations, GatewayAddress, GatewayDestination, Health, Locality, Namespace, PortMap,
    SharedTraits, Traits, TunnelProtocol, Workload, WorkloadSpec,
};
