//! The pods that have had a short-circuited flow, and the hooks that notice who reads in ways that do not see redirected bytes. Those
//! cost every system call of the node a little: they are attached when there is the first such flow.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::programs::ProgramFd;

use crate::kernel::{
    KernelError, Netns, NetnsCookie,
    pins::{self, Pins},
    short_circuit::{Row, Verdicts},
    sys::{self, tracepoint},
};

/// Names of the programs, what they are attached to, and what this kernel must do otherwise than over TCP for them to be needed.
const READERS: [(&str, &str, Row); 3] = [
    ("splices", "syscalls/sys_enter_splice", Row::Splice),
    ("asks", "syscalls/sys_enter_ioctl", Row::Available),
    ("sets", "syscalls/sys_enter_setsockopt", Row::ZeroCopy),
];

/// They stay when the agent ends, as all hooks do.
pub struct Watch {
    pins: Pins,
    readers: [ProgramFd; 3],
    verdicts: Verdicts,
    watched: Mutex<Watched>,
}

#[derive(Default)]
struct Watched {
    readers: bool,
    pods: HashMap<NetnsCookie, Arc<Netns>>,
}

impl Watch {
    pub fn new(pins: Pins, readers: [ProgramFd; 3], verdicts: Verdicts) -> Self {
        Self {
            pins,
            readers,
            verdicts,
            watched: Mutex::default(),
        }
    }

    /// Has a pod's sockets watched, if they are not yet.
    pub fn pod(&self, netns: &Arc<Netns>) -> Result<(), KernelError> {
        let mut watched = self.watched();
        if !watched.readers {
            self.attach_readers()?;
            watched.readers = true;
        }
        let pods = &mut watched.pods;
        pods.entry(netns.cookie())
            .or_insert_with(|| Arc::clone(netns));
        Ok(())
    }

    /// The namespace of a pod that is watched.
    pub fn netns(&self, cookie: NetnsCookie) -> Option<Arc<Netns>> {
        self.watched().pods.get(&cookie).cloned()
    }

    /// Forgets the pods that have left.
    pub fn keep(&self, is_pod: impl Fn(NetnsCookie) -> bool) {
        self.watched().pods.retain(|cookie, _| is_pod(*cookie));
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach_readers(&self) -> Result<(), KernelError> {
        for ((name, place, row), program) in READERS.into_iter().zip(&self.readers) {
            if self.verdicts.is_same(row) {
                continue;
            }
            let link = tracepoint::attach(place, program)
                .map_err(|error| not_attached(name, &format!("tracepoint {place}"), &error))?;
            self.pin(name, &link, &self.pins.link(name))?;
        }
        Ok(())
    }

    /// In the place of an earlier agent's, which is attached until now.
    fn pin(
        &self,
        name: &'static str,
        link: &std::os::fd::OwnedFd,
        path: &std::path::Path,
    ) -> Result<(), KernelError> {
        Pins::remove(path).map_err(pins::failed("unpin", path))?;
        sys::object_pin(link, path)
            .map_err(|error| not_attached(name, &path.display().to_string(), &error))
    }
}

fn not_attached(program: &'static str, target: &str, error: &io::Error) -> KernelError {
    KernelError::Attach {
        program,
        target: target.to_owned(),
        detail: error.to_string(),
    }
}
