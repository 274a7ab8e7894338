//! An attempt to set the kernel part up: what it pinned, replaced and wrote is put back unless it succeeds, so that nothing
//! half-attached stays behind, and an agent that runs goes on with what it had.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use super::{
    Tables,
    pins::{MAPS, Pins},
    sys::{self, LinkInfo},
};

/// Dropped before [`Attempt::succeed`], it undoes.
pub struct Attempt<'a> {
    pins: &'a Pins,
    /// Pins of its own: the hooks last.
    pinned: Vec<PathBuf>,
    /// Adopted links, with the programs that they had.
    replaced: Vec<(OwnedFd, OwnedFd)>,
    tables: Option<Arc<Tables>>,
    failed: bool,
}

impl<'a> Attempt<'a> {
    /// Maps that are not pinned now will have been pinned by this attempt.
    pub fn new(pins: &'a Pins) -> Self {
        Self {
            pins,
            pinned: MAPS
                .iter()
                .map(|name| pins.map(name))
                .filter(|path| !path.exists())
                .collect(),
            replaced: Vec::new(),
            tables: None,
            failed: true,
        }
    }

    pub fn pinned(&mut self, path: PathBuf) {
        self.pinned.push(path);
    }

    /// Gives a pinned link a new program, if it is attached to the cgroup with this id; else says so.
    pub fn replace_program(&mut self, name: &str, cgroup: u64, program: impl AsFd) -> bool {
        let Ok(link) = sys::object_get(&self.pins.link(name)) else {
            return false;
        };
        let Ok(info) = sys::link_info(&link) else {
            return false;
        };
        if info.kind != LinkInfo::CGROUP || info.target != cgroup {
            return false;
        }
        let before = sys::program_by_id(info.program);
        if sys::link_update(&link, program).is_err() {
            return false;
        }
        self.replaced
            .extend(before.ok().map(|before| (link, before)));
        true
    }

    /// The tables, once this process has made itself their owner.
    pub fn owns(&mut self, tables: &Arc<Tables>) {
        self.tables = Some(Arc::clone(tables));
    }

    pub fn succeed(mut self) {
        self.failed = false;
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.failed {
            return;
        }
        for (link, before) in &self.replaced {
            if let Err(error) = sys::link_update(link, before) {
                tracing::warn!(%error, "an adopted hook keeps a program of the agent that did not start");
            }
        }
        if let Some(tables) = &self.tables {
            tables.give_back();
        }
        for path in self.pinned.iter().rev() {
            if let Err(error) = Pins::remove(path) {
                tracing::warn!(path = %path.display(), %error, "cannot unpin what was pinned in vain");
            }
        }
        self.pins.remove_empty();
    }
}
