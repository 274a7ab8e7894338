//! `culvert unload`: takes away what an agent left in the kernel and in its pods, and proves that it is gone.

use std::{path::Path, sync::Arc, time::Duration};

use serde::Serialize;

use crate::{
    enrol::{Enrolment, KnownPod, Memory},
    kernel::{KernelError, Netns, RedirectMode, Removed, RoutingSettings, Unload},
};

/// What was done.
#[derive(Clone, Debug, Serialize)]
pub struct Unloaded {
    #[serde(flatten)]
    pub removed: Removed,
    /// Connections that were on their way when the time was over; they end as the kernel decides without us.
    pub in_flight: usize,
    /// Short-circuited flows with bytes that nobody had read when the time was over; they were reset.
    pub unread: usize,
    pub pods: Vec<UndonePod>,
}

/// A pod whose network is as it was before it was enrolled.
#[derive(Clone, Debug, Serialize)]
pub struct UndonePod {
    pub uid: String,
    /// Why it is not.
    pub error: Option<String>,
}

/// Unloads the kernel part of `pin_dir`; `None` when there is none.
///
/// The pods are those that the agent at `admin_socket` remembered; without that list the routing in them stays as it is.
pub fn unload(
    pin_dir: &Path,
    admin_socket: &Path,
    packet_mark: u32,
    timeout: Duration,
) -> Result<Option<Unloaded>, KernelError> {
    let Some(unload) = Unload::begin(pin_dir, timeout)? else {
        return Ok(None);
    };
    let known = Memory::beside(admin_socket).recall();
    let in_flight = unload.leave()?;
    // One that has gone has no sockets.
    let namespaces = known.iter().filter_map(|pod| open(pod).ok().flatten());
    let unread = unload.drain(&namespaces.collect::<Vec<_>>());
    let settings = RoutingSettings {
        redirect: RedirectMode::Ebpf,
        packet_mark,
        original_source: true,
        keep_fast_open: false,
    };
    let pods = known
        .into_iter()
        .map(|pod| UndonePod {
            uid: pod.spec.uid.to_string(),
            error: undo(pod, settings).err().map(|error| error.to_string()),
        })
        .collect();
    let removed = unload.remove()?;
    Ok(Some(Unloaded {
        removed,
        in_flight,
        unread,
        pods,
    }))
}

fn undo(pod: KnownPod, settings: RoutingSettings) -> Result<(), KernelError> {
    if let Some(netns) = open(&pod)? {
        Enrolment::undo(pod, &netns, settings)?;
    }
    Ok(())
}

/// The path may have come to mean another namespace since it was read.
fn open(pod: &KnownPod) -> Result<Option<Arc<Netns>>, KernelError> {
    let netns = pod.spec.netns.open()?;
    Ok((netns.cookie() == pod.cookie).then_some(netns))
}
