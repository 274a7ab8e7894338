//! The kernel's sock_diag: looks at TCP sockets of one namespace and destroys them.
//!
//! Invariants: a socket is named by its cookie, never by its addresses alone: without a cookie the kernel would take the
//! listener that a SYN of these addresses would find, which in a pod is the agent's own. Nobody waits for the kernel himself: it
//! waits for each socket that a process is busy with, and a process can be made to be busy for ever. A namespace whose
//! sockets do not answer harms only itself. Called by the enforcer (`destroy`) and by telemetry (`measure`).

mod lane;
mod message;
mod netlink;
mod threads;

use std::{net::SocketAddr, sync::Arc};

use super::{KernelError, Netns};
pub use lane::{Asked, Outcome};
pub use message::SocketMeasures;
pub use threads::DiagThreads;
use {lane::Lane, netlink::Netlink};

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketName {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub cookie: u64,
}

/// What became of a socket that was to be destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Destroyed,
    /// It was gone already, or its addresses belong to another socket by now.
    Gone,
    /// It lives: the error's number.
    Failed(i32),
}

/// Asks about the sockets of one namespace.
#[derive(Debug)]
pub struct SocketDiag {
    lane: Arc<Lane>,
}

impl SocketDiag {
    /// `pod` is what messages call the namespace.
    pub fn new(netns: &Netns, pod: &str, threads: &Arc<DiagThreads>) -> Result<Self, KernelError> {
        let lane = threads.lane(netns.cookie(), pod, || Netlink::new(netns))?;
        Ok(Self { lane })
    }

    /// Whether this kernel can destroy sockets at all.
    pub(super) fn probe() -> Result<(), KernelError> {
        Netlink::probe()
    }

    /// Begins to destroy sockets, each of which tells its peer with a reset; what became of them, in their order.
    pub fn destroy(&self, sockets: Vec<SocketName>) -> Asked<Fate> {
        self.lane.destroy(sockets)
    }

    /// Destroys a socket as soon as can be; nobody is told. A namespace that does not answer is asked when it does.
    pub fn destroy_soon(&self, socket: SocketName) {
        self.lane.destroy_soon(socket);
    }

    /// Begins to look at sockets: the index and the measures of those that are there.
    pub fn measure(&self, sockets: Vec<SocketName>) -> Asked<(usize, SocketMeasures)> {
        self.lane.measure(sockets)
    }
}

#[cfg(test)]
mod tests;
