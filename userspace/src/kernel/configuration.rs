//! The CONFIG map: what all hooks need to know, and who may write it.
//!
//! Invariant: once another process has made itself the owner, this one writes nothing any more. It asks the map each time,
//! because nobody tells it.

use aya::maps::{Array, MapData};
use culvert_abi::Config;

use super::{
    KernelError,
    owner::{Owner, Pen},
};

pub struct Configuration {
    map: Array<MapData, Config>,
    pen: Pen,
    own: Owner,
    /// What this process last wrote.
    value: Config,
    /// What was there before this process became the owner.
    before: Option<Config>,
}

impl Configuration {
    pub fn open(map: Array<MapData, Config>, pen: Pen, own: Owner) -> Self {
        Self {
            map,
            pen,
            own,
            value: NOTHING,
            before: None,
        }
    }

    /// Makes this process the owner. The hooks go on with what they were told, until [`Self::change`].
    pub fn take(&mut self) -> Result<(), KernelError> {
        let (map, own) = (&mut self.map, self.own);
        let taken = self.pen.hold(|| {
            let before = map.get(&0, 0)?;
            let owned = Config {
                owner_pid: own.pid,
                owner_started: own.started,
                ..before
            };
            map.set(0, owned, 0).map(|()| (before, owned))
        });
        let (before, owned) = settled(taken)?;
        self.before = Some(before);
        self.value = owned;
        Ok(())
    }

    /// Undoes [`Self::take`]. Names an owner that has ended as well: then nobody has the tables, as before.
    pub fn give_back(&mut self) {
        if let Some(before) = self.before.take()
            && let Err(error) = self.write(before)
        {
            tracing::warn!(%error, "the owner of the kernel part could not be written back");
        }
    }

    /// Whether this process is still the owner.
    pub fn is_owner(&self) -> bool {
        self.map
            .get(&0, 0)
            .is_ok_and(|config| Owner::of(&config) == Some(self.own))
    }

    /// The heartbeat that a later agent would find.
    pub fn heartbeat_ns(&self) -> u64 {
        self.value.heartbeat_ns
    }

    /// Changes what the hooks are told; `false` when this process is not the owner (any more).
    pub fn change(&mut self, change: impl FnOnce(&mut Config)) -> Result<bool, KernelError> {
        change(&mut self.value);
        self.write(self.value)
    }

    fn write(&mut self, value: Config) -> Result<bool, KernelError> {
        let (map, own) = (&mut self.map, self.own);
        let written = self.pen.hold(|| {
            if Owner::of(&map.get(&0, 0)?) != Some(own) {
                return Ok(false);
            }
            map.set(0, value, 0).map(|()| true)
        });
        settled(written)
    }
}

const NOTHING: Config = Config {
    heartbeat_ns: 0,
    verdict_max_age_ns: 0,
    host_netns: 0,
    pods_cgroup: 0,
    owner_started: 0,
    owner_pid: 0,
    knobs: 0,
    flags: 0,
    padding: 0,
    reserved: [0; 2],
};

fn settled<T>(result: std::io::Result<Result<T, aya::maps::MapError>>) -> Result<T, KernelError> {
    result
        .map_err(|error| KernelError::map("CONFIG", error))?
        .map_err(|error| KernelError::map("CONFIG", error))
}
