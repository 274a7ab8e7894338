//! From a service's address to one of its endpoints, by weight, before the connection exists.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use culvert_abi::{Address, Service, ServiceKey, Slot, SlotKey};

use crate::maps::{SERVICES, SLOTS};

/// The service behind an address and port, as pods of `view` see it. Services that the kernel cannot choose for are not
/// in the map: the agent chooses.
#[inline(always)]
pub fn find(address: &Address, port: u16, view: u32) -> Option<Service> {
    let key = ServiceKey {
        address: *address,
        view,
        port,
        padding: 0,
    };
    // The kernel gives the memory of a replaced entry to the next one at once, also while we read: what we have read may be
    // another service's. Then it is not what a second look finds. (Slots are deleted only when nobody reads them.)
    // SAFETY: a copy each time, because table and length belong together.
    let (first, second) = unsafe { (SERVICES.get(&key).copied()?, SERVICES.get(&key).copied()?) };
    (first == second).then_some(first)
}

/// One endpoint by weight. `None` where the table has just been replaced by another one.
#[inline(always)]
pub fn choose(service: &Service) -> Option<Slot> {
    if service.slots == 0 {
        return None;
    }
    let index = random() % service.slots;
    let own = slot(service, index)?;
    if random() <= own.threshold {
        return Some(own);
    }
    slot(service, own.alias)
}

#[inline(always)]
fn slot(service: &Service, slot: u32) -> Option<Slot> {
    let key = SlotKey {
        table: service.table,
        slot,
        padding: 0,
    };
    // SAFETY: slots are never changed once they are written.
    unsafe { SLOTS.get(&key) }.copied()
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: helper call without arguments.
    unsafe { bpf_get_prandom_u32() }
}
