//! Loading, attaching and adopting the kernel part.
//!
//! Everything is pinned, so that it outlives the agent; a new agent adopts the maps and gives the attached links its own
//! programs, so that no connection ever sees a hook missing.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::{
    Ebpf,
    maps::SockHash,
    programs::{SkLookup, SkMsg, SkSkb, links::FdLink},
};
use culvert_abi::{Isolated, knob};

use super::{
    Candidates, DiagThreads, EventStream, HostProcesses, KernelError, Netns, NetnsCookie,
    ShortCircuit, SocketDiag, Tables, Verdicts,
    attempt::Attempt,
    hooks, neighbours,
    object::{
        Maps, check_pinned_maps, load, loaded_classifier, loaded_tracepoint, not_attached, program,
        refused, take,
    },
    offsets::Offsets,
    owner::{self, Held},
    pins::{self, Pins},
    short_circuit, sys,
};

const INBOUND: &str = "inbound";

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

/// The verifier judges `inbound` like any other pod's, whatever the pod.
fn load_inbound(object: &mut Ebpf) -> Result<(), KernelError> {
    let program: &mut SkLookup = program(object, INBOUND)?;
    program.load().map_err(|error| refused(INBOUND, error))
}
