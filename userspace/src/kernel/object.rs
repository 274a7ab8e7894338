//! Loading, attaching and adopting the kernel part.
//!
//! Everything is pinned, so that it outlives the agent; a new agent adopts the maps and gives the attached links its own
//! programs, so that no connection ever sees a hook missing.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::{Map, SockHash},
    programs::{
        Program, ProgramError, ProgramFd, SchedClassifier, SkLookup, SkMsg, SkSkb, TracePoint,
        links::FdLink,
    },
};
use culvert_abi::{Isolated, knob};

use super::{
    Candidates, DiagThreads, EventStream, HostProcesses, KernelError, Netns, NetnsCookie,
    ShortCircuit, SocketDiag, Tables, Verdicts,
    attempt::Attempt,
    hooks, neighbours,
    offsets::Offsets,
    owner::{self, Held},
    pins::{self, MAPS, Pins},
    short_circuit, sys,
};

const INBOUND: &str = "inbound";
/// Maps whose size follows from how much a node may have, and what they have where only [`Maps::Few`] are asked for.
const SIZED: [&str; 12] = [
    "ENDPOINTS",
    "VERDICTS",
    "SERVICES",
    "SLOTS",
    "CLAIMS",
    "FLOWS",
    "LISTENERS",
    "ISOLATED_CLIENTS",
    "ISOLATED_SERVERS",
    "SHORT_SOCKETS",
    "SHORT_FLOWS",
    "SHORT_NAMES",
];
const FEW: u32 = 1024;

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
    /// Which processes are the node's own; none when they are like any other.
    pub host: Option<HostProcesses>,
    /// Flows are reported.
    pub telemetry: bool,
    /// The hooks decide nothing: for measuring what they cost.
    pub leave_alone: bool,
    /// What [`Kernel::try_out`] has found, or why nothing may be short-circuited.
    pub short_circuit: Result<Verdicts, String>,
    /// Bits of `culvert_abi::knob`; 0 outside tests.
    pub knobs: u32,
}

/// The kernel part, attached.
pub struct Kernel {
    pins: Pins,
    tables: Arc<Tables>,
    offsets: &'static Offsets,
    short_circuit: Result<Arc<ShortCircuit>, String>,
    diag: Arc<DiagThreads>,
    _life: Held,
}

/// `inbound` in one pod: detached when the pod leaves, kept when the agent ends.
pub struct Attachment {
    path: PathBuf,
    tables: Arc<Tables>,
}

impl Attachment {
    /// Detaches, unless another agent has taken the kernel part over: then it is that agent's.
    pub fn detach(self) -> Result<(), KernelError> {
        if !self.tables.is_owner() {
            return Ok(());
        }
        // Without this it would go on for a moment, and give connections to listeners that are gone.
        if let Ok(link) = sys::object_get(&self.path)
            && let Err(error) = sys::link_detach(&link)
        {
            tracing::debug!(%error, path = %self.path.display(), "the hook of a pod is detached later");
        }
        Pins::remove(&self.path).map_err(pins::failed("unpin", &self.path))
    }
}

impl Kernel {
    /// Loads and attaches everything that is not per pod, adopting what an earlier agent left.
    pub fn attach(
        settings: &KernelSettings,
    ) -> Result<(Self, EventStream, Candidates), KernelError> {
        check_own_cgroup(settings)?;
        let offsets = Offsets::of_this_kernel()?;
        let pins = Pins::of(&settings.pin_dir);
        // Held until this agent is the owner, or until what was changed is put back.
        let _starting = owner::starting(&pins)?;
        let mut attempt = Attempt::new(&pins);
        neighbours::refuse_overlap(settings, &pins)?;
        check_pinned_maps(&pins)?;
        let life = owner::live(&pins)?;
        let mut object = load(Maps::Pinned(&pins), offsets, NetnsCookie(0))?;
        hooks::load(&mut object)?;
        load_inbound(&mut object)?;
        // The programs refer to the maps by descriptor until they are loaded: only now may one be taken out.
        attach_isolation(&mut object)?;
        let eager = settings.knobs & knob::EAGER_SHORT_CIRCUIT != 0;
        let short_circuit = settings.short_circuit.clone().and_then(|verdicts| {
            attach_short_circuit(&mut object, offsets, &pins, verdicts, eager)
        });
        let candidates = Candidates::open(take(&mut object, "CANDIDATES")?)?;
        let events = EventStream::open(take(&mut object, "EVENTS")?, take(&mut object, "ALARMS")?)?;
        SocketDiag::probe()?;
        let tables = Arc::new(Tables::open(&pins, |name| take(&mut object, name))?);
        attempt.owns(&tables);
        hooks::attach(&mut object, settings, &mut attempt, &pins)?;
        neighbours::yield_to_earlier(settings, &pins)?;
        tables.configure(settings)?;
        attempt.succeed();
        Ok((
            Self {
                pins,
                tables,
                offsets,
                short_circuit,
                diag: DiagThreads::new(),
                _life: life,
            },
            events,
            candidates,
        ))
    }

    /// Tries out whether this kernel takes the kernel part, and what it does with short-circuited sockets: with maps and a namespace
    /// of its own, attached to nothing that anybody else uses.
    pub fn try_out() -> Result<Result<Verdicts, String>, KernelError> {
        let offsets = Offsets::of_this_kernel()?;
        let mut object = load(Maps::Own, offsets, NetnsCookie(0))?;
        hooks::load(&mut object)?;
        load_inbound(&mut object)?;
        attach_isolation(&mut object)?;
        Self::try_out_short_circuit()
    }

    /// The second half of it. Takes a fraction of a second.
    pub fn try_out_short_circuit() -> Result<Result<Verdicts, String>, KernelError> {
        let offsets = Offsets::of_this_kernel()?;
        let mut object = load(Maps::Few, offsets, NetnsCookie(0))?;
        // Nothing of a pod's is watched: its pins are never made.
        let pins = Pins::of(Path::new("/"));
        let unknown = Verdicts::default();
        match attach_short_circuit(&mut object, offsets, &pins, unknown, true) {
            Ok(short) => short_circuit::try_out(&short).map(Ok),
            Err(reason) => Ok(Err(reason)),
        }
    }

    /// Looks for what [`Self::attach`] would refuse because of others, and changes nothing.
    pub fn check(settings: &KernelSettings) -> Result<(), KernelError> {
        check_own_cgroup(settings)?;
        let pins = Pins::of(&settings.pin_dir);
        pins.check()?;
        neighbours::refuse_overlap(settings, &pins)
    }

    pub fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    /// What short-circuits flows, or why nothing on this kernel does.
    pub fn short_circuit(&self) -> Result<Arc<ShortCircuit>, String> {
        self.short_circuit.clone()
    }

    /// Whether a later agent has taken the kernel part over.
    pub fn is_taken_over(&self) -> bool {
        !self.tables.is_owner()
    }

    /// The threads that look at sockets and destroy them.
    pub fn diag(&self) -> &Arc<DiagThreads> {
        &self.diag
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
            tables: Arc::clone(&self.tables),
        }
        .detach()
    }

    /// Attaches `inbound` to a pod.
    pub fn attach_pod(&self, netns: &Netns) -> Result<Attachment, KernelError> {
        let mut object = load(Maps::Pinned(&self.pins), self.offsets, netns.cookie())?;
        load_inbound(&mut object)?;
        let program: &mut SkLookup = program(&mut object, INBOUND)?;
        let path = self.pins.pod(netns.cookie());
        let attachment = Attachment {
            path: path.clone(),
            tables: Arc::clone(&self.tables),
        };
        let fd = program.fd().map_err(|error| refused(INBOUND, error))?;
        if let Ok(link) = sys::object_get(&path)
            && sys::link_info(&link).is_ok_and(|info| info.target == netns.inode())
            && sys::link_update(&link, fd).is_ok()
        {
            return Ok(attachment);
        }
        let place = format!("network namespace {}", netns.cookie());
        let link = program
            .attach(netns)
            .and_then(|id| program.take_link(id))
            .map_err(|error| not_attached(INBOUND, &place, &error))?;
        // A pin that could not be adopted names something that is gone.
        Pins::remove(&path).map_err(pins::failed("unpin", &path))?;
        FdLink::from(link)
            .pin(&path)
            .map_err(|error| not_attached(INBOUND, &path.display().to_string(), &error))?;
        Ok(attachment)
    }
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
            value_size: if matches!(name.as_str(), "EVENTS" | "ALARMS" | "CANDIDATES") {
                0
            } else {
                map.value_size()
            },
        })
        .collect())
}

/// Which maps an instance of the object has.
#[derive(Clone, Copy)]
enum Maps<'a> {
    Pinned(&'a Pins),
    /// Its own, as large as the pinned ones.
    Own,
    /// Its own, for a few sockets: large ones take the kernel long to make.
    Few,
}

fn load(maps: Maps, offsets: &Offsets, pod: NetnsCookie) -> Result<Ebpf, KernelError> {
    let globals = offsets.globals(pod);
    let mut loader = EbpfLoader::new();
    match maps {
        Maps::Pinned(pins) => {
            for name in MAPS {
                loader.map_pin_path(name, pins.map(name));
            }
        }
        Maps::Own => {}
        Maps::Few => {
            for name in SIZED {
                loader.map_max_entries(name, FEW);
            }
        }
    }
    for (name, value) in &globals {
        loader.override_global(name, value, true);
    }
    loader.load(OBJECT).map_err(|error| KernelError::Program {
        program: "object",
        detail: chain(&error),
    })
}

/// Everything that reaches an isolated socket is dropped: see `ebpf-programs/src/isolation.rs`.
fn attach_isolation(object: &mut Ebpf) -> Result<(), KernelError> {
    let receive: &mut SkSkb = program(object, "isolated_receive")?;
    receive
        .load()
        .map_err(|error| refused("isolated_receive", error))?;
    let send: &mut SkMsg = program(object, "isolated_send")?;
    send.load()
        .map_err(|error| refused("isolated_send", error))?;
    for name in ["ISOLATED_CLIENTS", "ISOLATED_SERVERS"] {
        let place = format!("map {name}");
        let map = SockHash::<_, Isolated>::try_from(take(object, name)?)
            .map_err(|error| KernelError::map(name, error))?;
        let receive: &mut SkSkb = program(object, "isolated_receive")?;
        let link = receive
            .attach(map.fd())
            .and_then(|id| receive.take_link(id))
            .map_err(|error| not_attached("isolated_receive", &place, &error))?;
        // Dropping these would detach; the map, which is pinned, holds the programs.
        std::mem::forget(link);
        let send: &mut SkMsg = program(object, "isolated_send")?;
        let link = send
            .attach(map.fd())
            .and_then(|id| send.take_link(id))
            .map_err(|error| not_attached("isolated_send", &place, &error))?;
        std::mem::forget(link);
    }
    Ok(())
}

/// Direct flows go on without it: what this kernel refuses is said, not fatal.
fn attach_short_circuit(
    object: &mut Ebpf,
    offsets: &Offsets,
    pins: &Pins,
    verdicts: Verdicts,
    eager: bool,
) -> Result<Arc<ShortCircuit>, String> {
    const SEND: &str = "short_circuit";
    if let Some(reason) = &offsets.no_short_circuit {
        return Err(reason.clone());
    }
    let attach = |object: &mut Ebpf| {
        let send: &mut SkMsg = program(object, SEND)?;
        send.load().map_err(|error| refused(SEND, error))?;
        let short = open_short_circuit(object, pins, verdicts, eager)?;
        let map = SockHash::<_, u64>::try_from(take(object, "SHORT_SOCKETS")?)
            .map_err(|error| KernelError::map("SHORT_SOCKETS", error))?;
        let send: &mut SkMsg = program(object, SEND)?;
        let link = send
            .attach(map.fd())
            .and_then(|id| send.take_link(id))
            .map_err(|error| not_attached(SEND, "map SHORT_SOCKETS", &error))?;
        // As with the isolated sockets.
        std::mem::forget(link);
        Ok(short)
    };
    attach(object)
        .map(Arc::new)
        .map_err(|error: KernelError| error.to_string())
}

/// The programs that the agent runs or attaches later, loaded.
fn open_short_circuit(
    object: &mut Ebpf,
    pins: &Pins,
    verdicts: Verdicts,
    eager: bool,
) -> Result<ShortCircuit, KernelError> {
    let programs = short_circuit::Programs {
        request: loaded_classifier(object, "short_request")?,
        readers: [
            loaded_tracepoint(object, "splices")?,
            loaded_tracepoint(object, "asks")?,
            loaded_tracepoint(object, "sets")?,
        ],
    };
    let maps = ["SHORT_FLOWS", "SHORT_NAMES", "UNFIT"];
    let [flows, names, unfit] = maps.map(|name| take(object, name));
    ShortCircuit::open(programs, [flows?, names?, unfit?], pins, verdicts, eager)
}

/// For a look at what an agent has left; nothing is attached.
pub(super) fn left_short_circuit(pins: &Pins) -> Result<ShortCircuit, KernelError> {
    let offsets = Offsets::of_this_kernel()?;
    let mut object = load(Maps::Pinned(pins), offsets, NetnsCookie(0))?;
    open_short_circuit(&mut object, pins, Verdicts::default(), false)
}

fn loaded_classifier(object: &mut Ebpf, name: &'static str) -> Result<ProgramFd, KernelError> {
    let classifier: &mut SchedClassifier = program(object, name)?;
    classifier.load().map_err(|error| refused(name, error))?;
    descriptor(name, classifier.fd())
}

fn loaded_tracepoint(object: &mut Ebpf, name: &'static str) -> Result<ProgramFd, KernelError> {
    let tracepoint: &mut TracePoint = program(object, name)?;
    tracepoint.load().map_err(|error| refused(name, error))?;
    descriptor(name, tracepoint.fd())
}

/// One that outlives the object.
fn descriptor(
    name: &'static str,
    fd: Result<&ProgramFd, ProgramError>,
) -> Result<ProgramFd, KernelError> {
    fd.and_then(|fd| fd.try_clone().map_err(ProgramError::IOError))
        .map_err(|error| refused(name, error))
}

pub(super) fn program<'a, P>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut P, KernelError>
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

/// The verifier judges `inbound` like any other pod's, whatever the pod.
fn load_inbound(object: &mut Ebpf) -> Result<(), KernelError> {
    let program: &mut SkLookup = program(object, INBOUND)?;
    program.load().map_err(|error| refused(INBOUND, error))
}

pub(super) fn refused(program: &'static str, error: ProgramError) -> KernelError {
    let detail = match &error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let said = excerpt(&verifier_log.to_string());
            // The verifier, too, says EACCES; without its log it was not asked.
            if io_error.kind() == io::ErrorKind::PermissionDenied && said.is_none() {
                format!(
                    "{io_error}; run the agent as root, with the capabilities BPF, NET_ADMIN, PERFMON and SYS_ADMIN"
                )
            } else {
                format!(
                    "{io_error}; the verifier of this kernel said last: {}",
                    said.as_deref().unwrap_or("nothing")
                )
            }
        }
        _ => chain(&error),
    };
    KernelError::Program { program, detail }
}

/// The end of the verifier's log, where the reason is, without its statistics; `None` if there is none.
fn excerpt(log: &str) -> Option<String> {
    const LINES: usize = 8;
    const BYTES: usize = 200;
    let said: Vec<String> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !is_statistic(line))
        .map(|line| line.chars().take(BYTES).collect())
        .collect();
    match said.get(said.len().saturating_sub(LINES)..) {
        Some([]) | None => None,
        Some(last) => Some(last.join(" | ")),
    }
}

fn is_statistic(line: &str) -> bool {
    ["processed ", "verification time ", "stack depth "]
        .iter()
        .any(|start| line.starts_with(start))
}

pub(super) fn not_attached(
    program: &'static str,
    target: &str,
    error: &(dyn std::error::Error + 'static),
) -> KernelError {
    let mut detail = chain(error);
    if errno(error) == Some(libc::E2BIG) {
        detail.push_str(
            "; as many programs of others are attached there as the kernel takes (`bpftool link show` lists them): detach some",
        );
    }
    KernelError::Attach {
        program,
        target: target.to_owned(),
        detail,
    }
}

/// The system call's error somewhere below.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        next = error.source();
    }
    None
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

#[cfg(test)]
mod tests {
    use super::excerpt;

    #[test]
    fn the_excerpt_of_a_verifier_log_is_its_end_without_statistics() {
        let log = "0: R1=ctx()\n1: (b7) r0 = 0\nR2 !read_ok\n\nprocessed 3 insns (limit 1000000)\nstack depth 8\n";
        let said = "0: R1=ctx() | 1: (b7) r0 = 0 | R2 !read_ok";
        assert_eq!(excerpt(log).as_deref(), Some(said));
        assert_eq!(excerpt(""), None);
        let long = "x".repeat(100_000) + "\n";
        assert!(excerpt(&long.repeat(50)).is_some_and(|said| said.len() < 2000));
    }
}
