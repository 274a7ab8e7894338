//! Who else is attached where this agent wants to be: another agent of ours on an overlapping cgroup, or a foreign program that
//! holds a hook for itself alone. Everything is learned from the kernel, not from files that somebody may have left.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use super::{
    KernelError, KernelSettings,
    attachments::{self, Attached, Place},
    owner::Owner,
    pins::{self, Pins},
    sys,
};

/// By this program a kernel part is found: the others may have names that anybody would choose.
const SIGNATURE: &str = "socket_ops";

/// How long what was unpinned may take to be gone: the kernel detaches in its own time.
const DETACHING: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(20);

/// `BPF_F_ALLOW_MULTI` of the kernel's linux/bpf.h.
const ALLOW_MULTI: u32 = 2;

/// Refuses a cgroup where an agent with another pin directory is attached, above or below.
pub fn refuse_overlap(settings: &KernelSettings, pins: &Pins) -> Result<(), KernelError> {
    let own = attachments::map_id(&pins.map("CONFIG"));
    let deadline = Instant::now() + DETACHING;
    while let Some(other) = overlapping(settings, own)? {
        if other.owner.is_some_and(|owner| owner.lives()) || Instant::now() >= deadline {
            return Err(other.refusal(settings));
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// Of two agents that attached at the same time, each before it could see the other, the later one gives way.
pub fn yield_to_earlier(settings: &KernelSettings, pins: &Pins) -> Result<(), KernelError> {
    let own = attachments::map_id(&pins.map("CONFIG"));
    let link = pins::link(&pins.link(SIGNATURE)).map_or(0, |info| info.id);
    match overlapping(settings, own)? {
        Some(other) if other.link < link => Err(other.refusal(settings)),
        _ => Ok(()),
    }
}

/// Another kernel part.
struct Other {
    link: u32,
    cgroup: PathBuf,
    owner: Option<Owner>,
}

impl Other {
    fn refusal(self, settings: &KernelSettings) -> KernelError {
        let Self {
            link,
            cgroup,
            owner,
        } = self;
        let own = settings.cgroup_root.clone();
        match owner {
            Some(owner) if owner.lives() => KernelError::OtherAgent {
                pid: owner.pid,
                cgroup,
                own,
            },
            owner => KernelError::LeftBehind {
                who: owner.map_or_else(
                    || "of another version".to_owned(),
                    |owner| format!("process {}", owner.pid),
                ),
                cgroup,
                own,
                pin_dir: pins::find(&settings.pin_dir, link).map_or_else(
                    || "its CULVERT_PIN_DIR".to_owned(),
                    |found| found.display().to_string(),
                ),
            },
        }
    }
}

/// The first kernel part of ours that does not use the CONFIG map `own` and whose cgroup overlaps.
fn overlapping(settings: &KernelSettings, own: Option<u32>) -> Result<Option<Other>, KernelError> {
    let attached = attachments::attached().map_err(|source| KernelError::File {
        doing: "list what is attached, for",
        path: settings.cgroup_root.clone(),
        source,
    })?;
    let mut loaded = attachments::loaded();
    loaded.retain(|_, program| program.name == SIGNATURE);
    let family = Family::of(settings)?;
    Ok(attached.into_iter().find_map(
        |Attached {
             link,
             program,
             place,
         }| {
            let program = loaded.get(&program)?;
            let Place::Cgroup(id) = place else {
                return None;
            };
            if own.is_some_and(|own| program.maps.contains(&own)) {
                return None;
            }
            let cgroup = family.related(id)?;
            let config = attachments::configuration(program)?;
            Some(Other {
                link,
                cgroup,
                owner: config.as_ref().and_then(Owner::of),
            })
        },
    ))
}

/// A cgroup with those above it.
struct Family {
    root: PathBuf,
    mount: File,
    /// From the cgroup itself to the mount.
    ancestors: Vec<(u64, PathBuf)>,
}

impl Family {
    fn of(settings: &KernelSettings) -> Result<Self, KernelError> {
        let mount = File::open(&settings.cgroup_mount)
            .map_err(pins::failed("open cgroup", &settings.cgroup_mount))?;
        Ok(Self {
            root: settings.cgroup_root.clone(),
            mount,
            ancestors: ancestors(settings),
        })
    }

    /// The path of a cgroup, if it is ours, above, or below.
    fn related(&self, id: u64) -> Option<PathBuf> {
        let above = self.ancestors.iter().find(|(above, _)| *above == id);
        if let Some((_, path)) = above {
            return Some(path.clone());
        }
        let path = sys::cgroup_path(&self.mount, id).ok()?;
        path.starts_with(&self.root).then_some(path)
    }
}

/// The ids and paths of a cgroup and those above it.
fn ancestors(settings: &KernelSettings) -> Vec<(u64, PathBuf)> {
    settings
        .cgroup_root
        .ancestors()
        .take_while(|path| path.starts_with(&settings.cgroup_mount))
        .filter_map(|path| Some((fs::metadata(path).ok()?.ino(), path.to_owned())))
        .collect()
}

/// Why the kernel does not let `program` be attached to the hook: who holds it for himself alone, if somebody does.
pub fn holder(settings: &KernelSettings, program: &'static str, hook: u32) -> Option<KernelError> {
    let mut above = ancestors(settings);
    if above.is_empty() {
        above.push((0, settings.cgroup_root.clone()));
    }
    above.into_iter().find_map(|(_, cgroup)| {
        let (flags, programs) = File::open(&cgroup)
            .and_then(|cgroup| sys::cgroup_programs(cgroup, hook))
            .ok()?;
        let id = *programs.first()?;
        (flags & ALLOW_MULTI == 0).then(|| KernelError::HookTaken {
            program,
            target: settings.cgroup_root.clone(),
            holder: name(id),
            id,
            cgroup,
        })
    })
}

/// A program's name.
fn name(id: u32) -> String {
    attachments::loaded()
        .remove(&id)
        .map_or_else(String::new, |program| program.name)
}
