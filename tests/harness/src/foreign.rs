//! eBPF programs of somebody else, where Culvert wants to attach its own. They do nothing.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};

use crate::netns::Netns;
use crate::sys::{self, ProgramKind};

/// The name that the kernel shows for them.
pub const NAME: &str = "foreign";

/// Where a program can be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Connect4,
    Connect6,
    SocketOps,
    SkLookup,
    /// What a socket in a map of sockets sends.
    SkMsg,
    /// What such a socket receives.
    StreamVerdict,
}

impl Hook {
    fn kind(self) -> ProgramKind {
        let (kind, hook) = match self {
            Self::Connect4 => (18, 10),
            Self::Connect6 => (18, 11),
            Self::SocketOps => (13, 3),
            Self::SkLookup => (30, 36),
            Self::SkMsg => (16, 7),
            Self::StreamVerdict => (14, 5),
        };
        ProgramKind { kind, hook }
    }
}

/// A program of somebody else.
#[derive(Debug)]
pub struct Foreign {
    program: OwnedFd,
    hook: Hook,
}

/// Attached for as long as this lives.
#[derive(Debug)]
pub struct Alone<'a> {
    foreign: &'a Foreign,
    cgroup: File,
}

impl Foreign {
    /// Loads one.
    pub fn load(hook: Hook) -> Result<Self> {
        let program = sys::load_idle_program(hook.kind(), NAME)
            .with_context(|| format!("loading a program for {hook:?}: are you root?"))?;
        Ok(Self { program, hook })
    }

    /// Attaches it to a cgroup for itself alone: nobody else can be attached there or below.
    pub fn attach_alone(&self, cgroup: &Path) -> Result<Alone<'_>> {
        let open = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        sys::attach_alone(self.program.as_fd(), open.as_fd(), self.hook.kind().hook)
            .with_context(|| format!("attaching to {}", cgroup.display()))?;
        Ok(Alone {
            foreign: self,
            cgroup: open,
        })
    }

    /// Takes the place of the program at this hook of a map of sockets, and leaves it empty.
    pub fn displace(&self, map: BorrowedFd<'_>) -> Result<()> {
        let (program, hook) = (self.program.as_fd(), self.hook.kind().hook);
        sys::attach_alone(program, map, hook)
            .and_then(|()| sys::detach(program, map, hook))
            .with_context(|| format!("taking the place of the program for {:?}", self.hook))
    }

    /// Attaches it to a namespace, beside others, until the link is dropped.
    pub fn link(&self, netns: &Netns) -> Result<OwnedFd> {
        let target = netns.open()?;
        sys::link(self.program.as_fd(), target.as_fd(), self.hook.kind().hook)
            .with_context(|| format!("attaching to namespace {}", netns.name()))
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        // The end of the cgroup would detach it as well.
        let foreign = self.foreign;
        let _ = sys::detach(
            foreign.program.as_fd(),
            self.cgroup.as_fd(),
            foreign.hook.kind().hook,
        );
    }
}
