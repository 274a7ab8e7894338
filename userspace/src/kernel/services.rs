//! The tables by which `connect` chooses an endpoint of a service.
//!
//! Invariant: a service points at a table that is there whole and never changes. So a new table is written before the service
//! is pointed at it, and the old one is deleted when no program can be reading it any more. Called by the enforcer.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use culvert_abi::{Service, ServiceKey, Slot, SlotKey};

use super::{
    KernelError, sys,
    tables::{absent_is_fine, clear, lock},
};

/// The slots of one table, which stay until they are deleted.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "its slots stay in the kernel until they are deleted"]
pub struct SlotTable {
    /// Never used again.
    pub id: u64,
    pub slots: u32,
}

/// The maps SERVICES and SLOTS.
pub struct ServiceTables {
    services: Mutex<HashMap<MapData, ServiceKey, Service>>,
    slots: Mutex<HashMap<MapData, SlotKey, Slot>>,
    next: AtomicU64,
    room: u32,
}

impl ServiceTables {
    pub(super) fn open(services: Map, slots: Map) -> Result<Self, KernelError> {
        let room = match &slots {
            Map::HashMap(map) => map.info().map(|info| info.max_entries()),
            _ => Ok(0),
        };
        let open = |error: MapError| KernelError::map("SLOTS", error);
        // Unique over the agents of one boot.
        let first = u64::try_from(sys::monotonic_now().as_nanos()).unwrap_or(u64::MAX / 2);
        Ok(Self {
            room: room.map_err(open)?,
            services: Mutex::new(
                services
                    .try_into()
                    .map_err(|error: MapError| KernelError::map("SERVICES", error))?,
            ),
            slots: Mutex::new(slots.try_into().map_err(open)?),
            next: AtomicU64::new(first),
        })
    }

    /// How many slots there can be.
    pub fn room(&self) -> u32 {
        self.room
    }

    /// Removes what an earlier agent has left.
    pub fn clear(&self) -> Result<(), KernelError> {
        clear("SERVICES", &self.services)?;
        clear("SLOTS", &self.slots)
    }

    /// Lets `connect` choose among `slots` for a service. `None` where there is no room: then nothing has changed.
    ///
    /// The caller keeps the table that the service had before, and deletes it later.
    pub fn put(
        &self,
        key: &ServiceKey,
        number: u32,
        slots: &[Slot],
    ) -> Result<Option<SlotTable>, KernelError> {
        let count = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let mut table = SlotTable {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            slots: 0,
        };
        let written = self.write_slots(&mut table, slots).and_then(|room| {
            if !room {
                return Ok(false);
            }
            let service = Service {
                table: table.id,
                slots: count,
                number,
            };
            has_room("SERVICES", lock(&self.services).insert(key, service, 0))
        });
        match written {
            Ok(true) => Ok(Some(table)),
            Ok(false) => self.delete(&table).map(|()| None),
            Err(error) => {
                self.delete(&table)?;
                Err(error)
            }
        }
    }

    /// `table` counts what has been written.
    fn write_slots(&self, table: &mut SlotTable, slots: &[Slot]) -> Result<bool, KernelError> {
        let mut map = lock(&self.slots);
        for slot in slots {
            let key = slot_key(table.id, table.slots);
            if !has_room("SLOTS", map.insert(key, slot, 0))? {
                return Ok(false);
            }
            table.slots = table.slots.saturating_add(1);
        }
        Ok(true)
    }

    /// From now on the agent chooses.
    pub fn remove(&self, key: &ServiceKey) -> Result<(), KernelError> {
        absent_is_fine("SERVICES", lock(&self.services).remove(key))
    }

    /// Deletes a table that no service points at, and no program that still runs has found.
    pub fn delete(&self, table: &SlotTable) -> Result<(), KernelError> {
        let mut map = lock(&self.slots);
        (0..table.slots)
            .try_for_each(|slot| absent_is_fine("SLOTS", map.remove(&slot_key(table.id, slot))))
    }
}

fn slot_key(table: u64, slot: u32) -> SlotKey {
    SlotKey {
        table,
        slot,
        padding: 0,
    }
}

fn has_room(name: &'static str, result: Result<(), MapError>) -> Result<bool, KernelError> {
    match result {
        Ok(()) => Ok(true),
        Err(MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::E2BIG) =>
        {
            Ok(false)
        }
        Err(error) => Err(KernelError::map(name, error)),
    }
}
