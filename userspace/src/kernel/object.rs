//! Loading, attaching and adopting the kernel part.
//!
//! Everything is pinned, so that it outlives the agent; a new agent adopts the maps and gives the attached links its own
//! programs, so that no connection ever sees a hook missing.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Map, SockHash},
    programs::{
        CgroupAttachMode, CgroupSockAddr, Program, SkLookup, SkMsg, SkSkb, SockOps,
        links::{FdLink, Link},
    },
};

use super::{
    EventStream, KernelError, Netns, NetnsCookie, SocketDestroyer, Tables, btf,
    pins::{MAPS, Pins},
};

/// The object that the build script made.
static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/culvert.bpf.o"));

/// Where and how the kernel part is attached.
#[derive(Clone, Debug)]
pub struct KernelSettings {
    pub cgroup_root: PathBuf,
    /// Where the cgroup v2 hierarchy is mounted.
    pub cgroup_mount: PathBuf,
    pub pin_dir: PathBuf,
    pub verdict_max_age: std::time::Duration,
    /// Bits of `culvert_abi::knob`; 0 outside tests.
    pub knobs: u32,
}

/// The kernel part, attached.
pub struct Kernel {
    pins: Pins,
    tables: Arc<Tables>,
    write_seq_offset: u64,
}

/// `inbound` in one pod: detached when the pod leaves, kept when the agent ends.
#[derive(Debug)]
pub struct Attachment {
    path: PathBuf,
}

impl Attachment {
    pub fn detach(self) -> Result<(), KernelError> {
        Pins::remove(&self.path).map_err(|source| KernelError::File {
            doing: "unpin",
            path: self.path,
            source,
        })
    }
}

impl Kernel {
    /// Loads and attaches everything that is not per pod, adopting what an earlier agent left.
    pub fn attach(settings: &KernelSettings) -> Result<(Self, EventStream), KernelError> {
        check_own_cgroup(settings)?;
        let pins = Pins::create(&settings.pin_dir)?;
        check_pinned_maps(&pins)?;
        let write_seq_offset = btf::member_offset("tcp_sock", "write_seq")?;
        let mut object = load(&pins, write_seq_offset, NetnsCookie(0))?;
        let cgroup = fs::File::open(&settings.cgroup_root).map_err(|source| KernelError::File {
            doing: "open cgroup",
            path: settings.cgroup_root.clone(),
            source,
        })?;
        let target = cgroup
            .metadata()
            .map_err(|source| KernelError::File {
                doing: "examine cgroup",
                path: settings.cgroup_root.clone(),
                source,
            })?
            .ino();
        let place = settings.cgroup_root.display().to_string();
        // sockops first: a connection that `connect` chose needs its claim published.
        {
            let program: &mut SockOps = program(&mut object, "socket_ops")?;
            program
                .load()
                .map_err(|error| refused("socket_ops", error))?;
            let path = pins.link("socket_ops");
            if !Pins::replace_program(
                &path,
                target,
                program.fd().map_err(|error| refused("socket_ops", error))?,
            ) {
                let id = program
                    .attach(&cgroup, CgroupAttachMode::Single)
                    .map_err(|error| not_attached("socket_ops", &place, error))?;
                let link = program
                    .take_link(id)
                    .map_err(|error| not_attached("socket_ops", &place, error))?;
                pin("socket_ops", FdLink::try_from(link), path)?;
            }
        }
        for name in ["connect4", "connect6"] {
            let program: &mut CgroupSockAddr = program(&mut object, name)?;
            program.load().map_err(|error| refused(name, error))?;
            let path = pins.link(name);
            if !Pins::replace_program(
                &path,
                target,
                program.fd().map_err(|error| refused(name, error))?,
            ) {
                let id = program
                    .attach(&cgroup, CgroupAttachMode::Single)
                    .map_err(|error| not_attached(name, &place, error))?;
                let link = program
                    .take_link(id)
                    .map_err(|error| not_attached(name, &place, error))?;
                pin(name, FdLink::try_from(link), path)?;
            }
        }
        // The programs refer to the maps by descriptor until they are loaded: only now may one be taken out.
        attach_isolation(&mut object)?;
        let events = EventStream::open(take(&mut object, "EVENTS")?, take(&mut object, "ALARMS")?)?;
        SocketDestroyer::probe()?;
        let tables = Tables::open(|name| take(&mut object, name))?;
        tables.configure(settings.verdict_max_age, settings.knobs)?;
        Ok((
            Self {
                pins,
                tables: Arc::new(tables),
                write_seq_offset,
            },
            events,
        ))
    }

    pub fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    /// Removes what is left of pods whose namespace no longer exists; returns how many.
    pub fn prune(&self) -> Result<usize, KernelError> {
        let mut pruned = 0;
        for cookie in self.pins.pods() {
            if Pins::is_detached(&self.pins.pod(cookie)) {
                self.forget_pod(cookie)?;
                pruned += 1;
            }
        }
        Ok(pruned)
    }

    /// Removes what an earlier agent left of a pod that this one does not serve.
    pub fn forget_pod(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        self.tables.remove_endpoints_of(cookie)?;
        self.tables.remove_pod(cookie)?;
        self.tables.remove_claims(cookie)?;
        Attachment {
            path: self.pins.pod(cookie),
        }
        .detach()
    }

    /// Attaches `inbound` to a pod.
    pub fn attach_pod(&self, netns: &Netns) -> Result<Attachment, KernelError> {
        const NAME: &str = "inbound";
        let mut object = load(&self.pins, self.write_seq_offset, netns.cookie())?;
        let program: &mut SkLookup = program(&mut object, NAME)?;
        program.load().map_err(|error| refused(NAME, error))?;
        let path = self.pins.pod(netns.cookie());
        let fd = program.fd().map_err(|error| refused(NAME, error))?;
        if !Pins::replace_program(&path, netns.inode(), fd) {
            let place = format!("network namespace {}", netns.cookie());
            let id = program
                .attach(netns)
                .map_err(|error| not_attached(NAME, &place, error))?;
            let link = program
                .take_link(id)
                .map_err(|error| not_attached(NAME, &place, error))?;
            pin(
                NAME,
                Ok::<_, std::convert::Infallible>(FdLink::from(link)),
                path.clone(),
            )?;
        }
        Ok(Attachment { path })
    }
}

/// Takes the kernel part of a pin directory away. What is pinned nowhere else is detached by the kernel.
pub fn unload(pin_dir: &Path) -> Result<(), KernelError> {
    Pins::remove_all(pin_dir).map_err(|source| KernelError::File {
        doing: "remove pins below",
        path: pin_dir.to_owned(),
        source,
    })
}

/// The agent must run inside the cgroup it watches, or its own claims never happen.
fn check_own_cgroup(settings: &KernelSettings) -> Result<(), KernelError> {
    const OWN: &str = "/proc/self/cgroup";
    let root = &settings.cgroup_root;
    if !root.join("cgroup.procs").exists() {
        return Err(KernelError::NotCgroup { path: root.clone() });
    }
    let own = fs::read_to_string(OWN).map_err(|source| KernelError::File {
        doing: "read",
        path: PathBuf::from(OWN),
        source,
    })?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or("/");
    let below = root.strip_prefix(&settings.cgroup_mount).unwrap_or(root);
    if Path::new(own).starts_with(Path::new("/").join(below)) {
        Ok(())
    } else {
        Err(KernelError::OutsideCgroupRoot {
            own: own.to_owned(),
            root: root.display().to_string(),
        })
    }
}

/// A pinned map is reused by name: one of another shape must not be.
fn check_pinned_maps(pins: &Pins) -> Result<(), KernelError> {
    let expected = aya_obj_maps()?;
    for name in MAPS {
        let path = pins.map(name);
        if !path.exists() {
            continue;
        }
        let info =
            aya::maps::MapInfo::from_pin(&path).map_err(|error| KernelError::map(name, error))?;
        let Some(shape) = expected.iter().find(|shape| shape.name == name) else {
            continue;
        };
        let kind = info
            .map_type()
            .map_err(|error| KernelError::map(name, error))? as u32;
        let found = (kind, info.key_size(), info.value_size());
        if found != (shape.kind, shape.key_size, shape.value_size) {
            return Err(KernelError::MapLayout { map: name, path });
        }
    }
    Ok(())
}

struct MapShape {
    name: String,
    kind: u32,
    key_size: u32,
    value_size: u32,
}

/// The maps as the object declares them.
fn aya_obj_maps() -> Result<Vec<MapShape>, KernelError> {
    let object = aya_obj::Object::parse(OBJECT).map_err(|error| KernelError::Program {
        program: "object",
        detail: error.to_string(),
    })?;
    Ok(object
        .maps
        .iter()
        .map(|(name, map)| MapShape {
            name: name.clone(),
            kind: map.map_type(),
            key_size: map.key_size(),
            // A ring buffer has no values of a size.
            value_size: if matches!(name.as_str(), "EVENTS" | "ALARMS") {
                0
            } else {
                map.value_size()
            },
        })
        .collect())
}

fn load(pins: &Pins, write_seq_offset: u64, pod: NetnsCookie) -> Result<Ebpf, KernelError> {
    let mut loader = EbpfLoader::new();
    for name in MAPS {
        loader.map_pin_path(name, pins.map(name));
    }
    loader
        .override_global("TCP_WRITE_SEQ_OFFSET", &write_seq_offset, true)
        .override_global("POD_COOKIE", &pod.0, true)
        .load(OBJECT)
        .map_err(|error| KernelError::Program {
            program: "object",
            detail: chain(&error),
        })
}

/// Everything that reaches a socket in `ISOLATED` is dropped: see `ebpf-programs/src/isolation.rs`.
fn attach_isolation(object: &mut Ebpf) -> Result<(), KernelError> {
    const PLACE: &str = "map ISOLATED";
    let receive: &mut SkSkb = program(object, "isolated_receive")?;
    receive
        .load()
        .map_err(|error| refused("isolated_receive", error))?;
    let send: &mut SkMsg = program(object, "isolated_send")?;
    send.load()
        .map_err(|error| refused("isolated_send", error))?;

    let map = SockHash::<_, u64>::try_from(take(object, "ISOLATED")?)
        .map_err(|error| KernelError::map("ISOLATED", error))?;
    let receive: &mut SkSkb = program(object, "isolated_receive")?;
    let id = receive
        .attach(map.fd())
        .map_err(|error| not_attached("isolated_receive", PLACE, error))?;
    let link = receive
        .take_link(id)
        .map_err(|error| not_attached("isolated_receive", PLACE, error))?;
    // Dropping these would detach; the map, which is pinned, holds the programs.
    std::mem::forget(link);
    let send: &mut SkMsg = program(object, "isolated_send")?;
    let id = send
        .attach(map.fd())
        .map_err(|error| not_attached("isolated_send", PLACE, error))?;
    let link = send
        .take_link(id)
        .map_err(|error| not_attached("isolated_send", PLACE, error))?;
    std::mem::forget(link);
    Ok(())
}

fn program<'a, P>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = aya::programs::ProgramError>,
{
    let found = object
        .program_mut(name)
        .ok_or_else(|| KernelError::Program {
            program: name,
            detail: "it is not in the object".to_owned(),
        })?;
    found.try_into().map_err(|error| refused(name, error))
}

fn take(object: &mut Ebpf, name: &'static str) -> Result<Map, KernelError> {
    object
        .take_map(name)
        .ok_or_else(|| KernelError::map(name, "it is not in the object"))
}

fn pin<L, E: std::fmt::Display>(
    program: &'static str,
    link: Result<L, E>,
    path: PathBuf,
) -> Result<(), KernelError>
where
    L: Link + Into<FdLink>,
{
    let failed = |detail: String| KernelError::Attach {
        program,
        target: path.display().to_string(),
        detail,
    };
    // A pin that could not be adopted names something that is gone.
    Pins::remove(&path).map_err(|error| failed(error.to_string()))?;
    let link: FdLink = link.map_err(|error| failed(error.to_string()))?.into();
    link.pin(&path)
        .map_err(|error| failed(chain(&error)))
        .map(drop)
}

fn refused(program: &'static str, error: aya::programs::ProgramError) -> KernelError {
    KernelError::Program {
        program,
        detail: chain(&error),
    }
}

fn not_attached(
    program: &'static str,
    target: &str,
    error: aya::programs::ProgramError,
) -> KernelError {
    KernelError::Attach {
        program,
        target: target.to_owned(),
        detail: chain(&error),
    }
}

/// An error with its causes: aya keeps the errno in the source.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
