//! What is loaded and attached in this kernel, by whomever, as the kernel itself tells it. Asked before something is
//! attached (is somebody else there?) and after it was taken away (is anything left?).
//!
//! Objects come and go while they are listed: one that has gone in between is left out.

use std::{collections::HashMap, io};

use aya::maps::{Array, Map, MapData, MapInfo};
use culvert_abi::Config;

use super::sys::{self, LinkInfo, Objects};

/// Where a link leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A cgroup, by its id.
    Cgroup(u64),
    /// A network namespace, by its inode.
    Netns(u64),
}

/// An attached program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    pub link: u32,
    pub program: u32,
    pub place: Place,
}

/// A program, with the maps that it uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    pub name: String,
    pub maps: Vec<u32>,
}

/// Every link to a cgroup or a namespace that still exists.
pub fn attached() -> io::Result<Vec<Attached>> {
    let mut found = Vec::new();
    let mut last = 0;
    while let Some(id) = sys::next_id(Objects::Links, last)? {
        last = id;
        let Ok(info) = sys::link_by_id(id).and_then(sys::link_info) else {
            continue;
        };
        let place = match info.kind {
            _ if info.target == 0 => continue,
            LinkInfo::CGROUP => Place::Cgroup(info.target),
            LinkInfo::NETNS => Place::Netns(info.target),
            _ => continue,
        };
        found.push(Attached {
            link: id,
            program: info.program,
            place,
        });
    }
    Ok(found)
}

/// Every program, by id.
pub fn loaded() -> HashMap<u32, Loaded> {
    aya::programs::loaded_programs()
        .flatten()
        .filter_map(|info| {
            let loaded = Loaded {
                name: info.name_as_str()?.to_owned(),
                maps: info.map_ids().ok()??,
            };
            Some((info.id(), loaded))
        })
        .collect()
}

/// Whether an object of this id is still there. Ids are given out in turn: one is not used again for a long time.
pub fn exists(objects: Objects, id: u32) -> io::Result<bool> {
    Ok(sys::next_id(objects, id.saturating_sub(1))? == Some(id))
}

/// The ids of a pinned map, link or program are told by what it is; this is for maps.
pub fn map_id(path: &std::path::Path) -> Option<u32> {
    Some(MapInfo::from_pin(path).ok()?.id())
}

/// Which agent a program belongs to, if it is one of Culvert's: it knows a program by the maps it uses.
pub fn configuration(program: &Loaded) -> Option<Option<Config>> {
    let named = |name: &str| {
        program.maps.iter().find_map(|id| {
            let info = MapInfo::from_id(*id).ok()?;
            (info.name_as_str() == Some(name)).then_some(info)
        })
    };
    let config = named("CONFIG")?;
    named("CLAIMS")?;
    if config.value_size() as usize != size_of::<Config>() {
        // Another layout.
        return Some(None);
    }
    Some(
        MapData::from_id(config.id())
            .ok()
            .and_then(|data| Array::<_, Config>::try_from(Map::Array(data)).ok())
            .and_then(|config| config.get(&0, 0).ok()),
    )
}
