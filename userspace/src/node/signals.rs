//! The signals that an operator, or kubelet, ends the agent with: SIGTERM and SIGINT. Heard from the moment this is made, also
//! while nobody waits.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::NodeError;

pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub fn new() -> Result<Self, NodeError> {
        let heard = |kind| signal(kind).map_err(NodeError::Signals);
        Ok(Self {
            terminate: heard(SignalKind::terminate())?,
            interrupt: heard(SignalKind::interrupt())?,
        })
    }

    pub async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
