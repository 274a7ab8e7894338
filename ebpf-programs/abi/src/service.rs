//! Services that have an endpoint on this node: from a virtual address to an endpoint, by weight, in two look-ups.
//!
//! A service's endpoints are a table of slots of equal chance. Each slot keeps its own endpoint with a probability and
//! else stands for another one (the alias method), so that any weights need no more slots than there are endpoints. A
//! table is never changed: the service is pointed at a new one.

use crate::Address;

/// A port of a service as the pods of one view see it. Pods of one view would be given the same endpoints: they share
/// locality, network, cluster and address families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub struct ServiceKey {
    pub address: Address,
    pub view: u32,
    pub port: u16,
    pub padding: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Service {
    /// Which table of slots, never used again.
    pub table: u64,
    /// Slots in it.
    pub slots: u32,
    /// Number of the service, for events.
    pub number: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SlotKey {
    pub table: u64,
    pub slot: u32,
    pub padding: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Slot {
    pub address: Address,
    /// The workload that the address must belong to if it is on this node ([`crate::Endpoint::workload`]); 0 elsewhere.
    pub workload: u32,
    /// The slot's own endpoint is taken where a random number of 32 bits is not above this.
    pub threshold: u32,
    /// The slot whose endpoint is taken otherwise.
    pub alias: u32,
    pub port: u16,
    pub padding: u16,
}
