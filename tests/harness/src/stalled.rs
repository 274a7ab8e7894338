//! A process that keeps a socket busy for as long as it likes: it sends a page of memory that is not there, and the kernel holds
//! the socket while it waits for the page. Called by `culvert-probe`.

use std::{io, os::fd::AsFd};

use crate::sys::AbsentPage;

/// A send that does not come to an end.
pub struct StalledSend(AbsentPage);

impl StalledSend {
    pub fn new() -> io::Result<Self> {
        AbsentPage::new().map(Self)
    }

    /// Returns after [`Self::release`] only.
    pub fn send(&self, socket: impl AsFd) -> io::Result<usize> {
        self.0.send(socket.as_fd())
    }

    /// Returns once the kernel holds the socket.
    pub fn wait_until_held(&self) -> io::Result<()> {
        self.0.wait_for_reader()
    }

    pub fn release(&self) {
        self.0.release();
    }
}
