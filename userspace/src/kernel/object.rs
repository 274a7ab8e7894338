//! The object that the build script made: its maps and programs, how it is loaded, and what is said when the kernel refuses it.
//! Called by `kernel_part` and `hooks`.

use std::io;

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    maps::Map,
    programs::{Program, ProgramError, ProgramFd, SchedClassifier, TracePoint},
};

use super::{
    KernelError, NetnsCookie,
    offsets::Offsets,
    pins::{MAPS, Pins},
};

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

/// Which maps an instance of the object has.
#[derive(Clone, Copy)]
pub(super) enum Maps<'a> {
    Pinned(&'a Pins),
    /// Its own, as large as the pinned ones.
    Own,
    /// Its own, for a few sockets: large ones take the kernel long to make.
    Few,
}

pub(super) fn load(maps: Maps, offsets: &Offsets, pod: NetnsCookie) -> Result<Ebpf, KernelError> {
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

/// A pinned map is reused by name: one of another shape must not be.
pub(super) fn check_pinned_maps(pins: &Pins) -> Result<(), KernelError> {
    let expected = declared()?;
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
fn declared() -> Result<Vec<MapShape>, KernelError> {
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

pub(super) fn take(object: &mut Ebpf, name: &'static str) -> Result<Map, KernelError> {
    object
        .take_map(name)
        .ok_or_else(|| KernelError::map(name, "it is not in the object"))
}

pub(super) fn loaded_classifier(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<ProgramFd, KernelError> {
    let classifier: &mut SchedClassifier = program(object, name)?;
    classifier.load().map_err(|error| refused(name, error))?;
    descriptor(name, classifier.fd())
}

pub(super) fn loaded_tracepoint(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<ProgramFd, KernelError> {
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
