//! Taking the kernel part of a pin directory away, in an order in which no connection is caught half-way: first the hooks are
//! told to leave every connection alone, then what is on its way gets there, then hooks and maps go, and at last the kernel is
//! asked whether anything is left. Called by `node::unload`.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map, MapData, MapInfo, SockHash};
use culvert_abi::{Claim, Config, Flow, FlowKey, LAYOUT_VERSION, config_flag};

use super::{
    DiagThreads, Entrant, KernelError, Netns, OpenFlow, SocketDiag,
    attachments::{self, Place},
    configuration::Configuration,
    kernel_part,
    owner::{self, Held, Owner, Pen},
    pins::{self, Pins},
    sys::{self, Objects},
};

/// A claim that is older is for a SYN that nobody answered: what becomes of it does not depend on the claim.
const IN_FLIGHT: Duration = Duration::from_secs(3);
/// An agent says that it lives every second.
const SILENCE: Duration = Duration::from_millis(2500);
/// What a system call takes that has begun to send.
const SENDING: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_millis(20);
/// Words for what the kernel holds beyond what fits in a message.
const MOST_NAMED: usize = 8;

/// The CONFIG map of layout 1, whose first word is the heartbeat as well.
type FirstConfig = [u64; 5];

/// A kernel part that is being taken away. Nobody starts an agent with its directory meanwhile.
pub struct Unload {
    pins: Pins,
    layouts: Vec<(u32, PathBuf)>,
    began: Instant,
    timeout: Duration,
    _alone: Vec<Held>,
}

/// What was taken away.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Removed {
    /// Versions of the layouts that were found.
    pub layouts: Vec<u32>,
    pub pins: usize,
    pub links: usize,
    pub programs: usize,
    pub maps: usize,
    /// Direct flows that were open, and go on.
    pub open_flows: usize,
}

impl Unload {
    /// Looks for a kernel part in a directory; `None` when there is none. Refuses while an agent lives with it.
    pub fn begin(pin_dir: &Path, timeout: Duration) -> Result<Option<Self>, KernelError> {
        let began = Instant::now();
        let pins = Pins::of(pin_dir);
        let mut held = Vec::new();
        if pins.root().exists() {
            held.push(start_right(&pins, began + timeout)?);
            match owner::alone(&pins)? {
                Some(alone) => held.push(alone),
                None if pins.living().exists() => {
                    return Err(KernelError::InUse {
                        pin_dir: pin_dir.to_owned(),
                        pid: owner_of(&pins).map_or(0, |owner| owner.pid),
                    });
                }
                None => {}
            }
        }
        let mut layouts = pins::layouts(pin_dir)?;
        layouts.retain(|(_, path)| !pins::pins_below(path).is_empty());
        if layouts.is_empty() {
            drop(held);
            pins.remove_empty();
            return Ok(None);
        }
        for (version, path) in &layouts {
            if *version != LAYOUT_VERSION && beats(path) {
                return Err(KernelError::InUseByOther {
                    pin_dir: pin_dir.to_owned(),
                    version: *version,
                });
            }
        }
        Ok(Some(Self {
            pins,
            layouts,
            began,
            timeout,
            _alone: held,
        }))
    }

    /// Has the hooks leave every connection alone, and waits for those that they have begun with; returns how many are left.
    pub fn leave(&self) -> Result<usize, KernelError> {
        let path = self.pins.map("CONFIG");
        let Some(map) = open::<Array<MapData, Config>>(&path, Map::Array) else {
            // Another layout, or what an attempt to unload left: what it does cannot be changed.
            return Ok(0);
        };
        let mut config = Configuration::open(map, Pen::of(&self.pins)?, Owner::this_process()?);
        config.take()?;
        config.change(|config| config.flags |= config_flag::LEAVING)?;
        if let Err(error) = sys::wait_for_running_programs() {
            tracing::debug!(%error, "cannot wait for running programs");
        }
        let Some(claims) =
            open::<HashMap<MapData, FlowKey, Claim>>(&self.pins.map("CLAIMS"), Map::HashMap)
        else {
            return Ok(0);
        };
        loop {
            let now = sys::monotonic_now();
            let young = claims
                .iter()
                .flatten()
                .filter(|(_, claim)| {
                    now.saturating_sub(Duration::from_nanos(claim.opened_ns)) < IN_FLIGHT
                })
                .count();
            if young == 0 || self.began.elapsed() >= self.timeout {
                return Ok(young);
            }
            thread::sleep(PAUSE);
        }
    }

    /// Waits until what was redirected has been read: with the maps goes what is in them. A flow of these namespaces that has such
    /// bytes when the time is over is reset, so that nobody takes the rest for all; returns how many.
    pub fn drain(&self, pods: &[Arc<Netns>]) -> usize {
        if !self.pins.map("SHORT_FLOWS").exists() {
            return 0;
        }
        let short = match kernel_part::left_short_circuit(&self.pins) {
            Ok(short) => short,
            Err(error) => {
                tracing::warn!(%error, "cannot see whether redirected bytes are unread");
                return 0;
            }
        };
        let Some(flows) =
            open::<HashMap<MapData, FlowKey, Flow>>(&self.pins.map("FLOWS"), Map::HashMap)
        else {
            return 0;
        };
        let netns = |cookie| pods.iter().find(|pod| pod.cookie().0 == cookie).cloned();
        let unread = || -> Vec<Entrant> {
            let entered = short.entered().into_iter();
            let entrants = entered.filter_map(|(key, _)| {
                let flow = flows.get(&key, 0).ok()?;
                Some(Entrant {
                    client: netns(flow.client_netns)?,
                    server: netns(flow.server_netns)?,
                    flow: OpenFlow { key, flow },
                })
            });
            entrants
                .filter(|entrant| short.has_unread(entrant))
                .collect()
        };
        let began = Instant::now();
        loop {
            let left = unread();
            if left.is_empty() || began.elapsed() >= self.timeout {
                for entrant in &left {
                    reset(entrant);
                }
                self.take_out();
                return left.len();
            }
            thread::sleep(PAUSE);
        }
    }

    /// Takes the sockets out of the map: as long as one is there, it holds the program and the program the map.
    fn take_out(&self) {
        // Whoever was told to redirect before the hooks left has done so by then.
        thread::sleep(SENDING);
        let path = self.pins.map("SHORT_SOCKETS");
        let Some(mut sockets) = open::<SockHash<MapData, u64>>(&path, Map::SockHash) else {
            return;
        };
        let cookies: Vec<u64> = sockets.keys().flatten().collect();
        for cookie in cookies {
            // One that has closed meanwhile is not there any more.
            let _ = sockets.remove(&cookie);
        }
    }

    /// Removes everything, and waits until the kernel has let go of it.
    pub fn remove(self) -> Result<Removed, KernelError> {
        let open_flows =
            open::<HashMap<MapData, FlowKey, Flow>>(&self.pins.map("FLOWS"), Map::HashMap)
                .map_or(0, |flows| flows.keys().flatten().count());
        let pinned: Vec<PathBuf> = self
            .layouts
            .iter()
            .flat_map(|(_, path)| pins::pins_below(path))
            .collect();
        let maps: Vec<u32> = pinned
            .iter()
            .filter_map(|path| attachments::map_id(path))
            .collect();
        let programs: Vec<u32> = attachments::loaded()
            .into_iter()
            .filter(|(_, program)| program.maps.iter().any(|map| maps.contains(map)))
            .map(|(id, _)| id)
            .collect();
        let list = attachments::attached().map_err(pins::failed(
            "list what is attached, for",
            self.pins.directory(),
        ))?;
        let links: Vec<_> = list
            .into_iter()
            .filter(|link| programs.contains(&link.program))
            .collect();
        for path in &pinned {
            Pins::remove(path).map_err(pins::failed("unpin", path))?;
        }
        for (_, path) in &self.layouts {
            for part in pins::PARTS {
                let _ = fs::remove_dir(path.join(part));
            }
            let _ = fs::remove_dir(path);
        }
        self.pins.remove_empty();
        let removed = Removed {
            layouts: self.layouts.iter().map(|(version, _)| *version).collect(),
            pins: pinned.len(),
            links: links.len(),
            programs: programs.len(),
            maps: maps.len(),
            open_flows,
        };
        let began = Instant::now();
        loop {
            let left = self.left(&links, &programs)?;
            if left.is_empty() {
                return Ok(removed);
            }
            if began.elapsed() >= self.timeout {
                return Err(KernelError::StillThere {
                    pin_dir: self.pins.directory().to_owned(),
                    left: left
                        .into_iter()
                        .take(MOST_NAMED)
                        .collect::<Vec<_>>()
                        .join(", "),
                    waited: self.timeout,
                });
            }
            thread::sleep(PAUSE);
        }
    }

    /// What is still pinned, attached or loaded.
    fn left(
        &self,
        links: &[attachments::Attached],
        programs: &[u32],
    ) -> Result<Vec<String>, KernelError> {
        let failed = || pins::failed("list what is loaded, for", self.pins.directory());
        let mut left: Vec<String> = pins::layouts(self.pins.directory())?
            .into_iter()
            .map(|(_, path)| path.display().to_string())
            .collect();
        for link in links {
            if attachments::exists(Objects::Links, link.link).map_err(failed())? {
                let place = match link.place {
                    Place::Cgroup(id) => format!("cgroup {id}"),
                    Place::Netns(inode) => format!("network namespace net:[{inode}]"),
                };
                left.push(format!("link {} to {place}", link.link));
            }
        }
        for program in programs {
            if attachments::exists(Objects::Programs, *program).map_err(failed())? {
                left.push(format!("program {program}"));
            }
        }
        Ok(left)
    }
}

fn start_right(pins: &Pins, deadline: Instant) -> Result<Held, KernelError> {
    loop {
        if let Some(held) = owner::try_starting(pins)? {
            return Ok(held);
        }
        if Instant::now() >= deadline {
            return Err(KernelError::Busy {
                pin_dir: pins.directory().to_owned(),
            });
        }
        thread::sleep(PAUSE);
    }
}

/// Both ends are told.
fn reset(entrant: &Entrant) {
    let ends = [
        (&entrant.client, entrant.flow.client_end()),
        (&entrant.server, entrant.flow.server_end()),
    ];
    for (netns, end) in ends {
        let reset = SocketDiag::new(netns, "unload", &DiagThreads::new())
            .map(|diag| diag.destroy(vec![end]).wait());
        if let Err(error) = reset {
            tracing::warn!(%error, "a flow with unread bytes could not be reset");
        }
    }
}

/// Opens a pinned map, if it is there and has the shape of this version's.
fn open<T: TryFrom<Map>>(path: &Path, kind: impl FnOnce(MapData) -> Map) -> Option<T> {
    kind(MapData::from_pin(path).ok()?).try_into().ok()
}

fn owner_of(pins: &Pins) -> Option<Owner> {
    let config: Array<MapData, Config> = open(&pins.map("CONFIG"), Map::Array)?;
    Owner::of(&config.get(&0, 0).ok()?)
}

/// Whether the agent of another layout lives: whether its heartbeat goes on.
fn beats(layout: &Path) -> bool {
    let path = layout.join("maps/CONFIG");
    let Some(before) = heartbeat(&path) else {
        return false;
    };
    if sys::monotonic_now().saturating_sub(Duration::from_nanos(before)) > SILENCE {
        return false;
    }
    let deadline = Instant::now() + SILENCE;
    while Instant::now() < deadline {
        if heartbeat(&path).is_some_and(|now| now != before) {
            return true;
        }
        thread::sleep(PAUSE);
    }
    false
}

/// In nanoseconds of the monotonic clock.
fn heartbeat(path: &Path) -> Option<u64> {
    let size = MapInfo::from_pin(path).ok()?.value_size() as usize;
    if size == size_of::<FirstConfig>() {
        let config: Array<MapData, FirstConfig> = open(path, Map::Array)?;
        return config.get(&0, 0).ok()?.first().copied();
    }
    let config: Array<MapData, Config> = open(path, Map::Array)?;
    Some(config.get(&0, 0).ok()?.heartbeat_ns)
}
