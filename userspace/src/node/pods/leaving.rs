//! Pods that were released while connections of theirs went through the agent: these go on, and what they need stays until they end.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{Pods, Running};
use crate::{
    enrol::{EnrolError, Enrolment, KnownPod},
    kernel::{Kernel, NetnsCookie},
    proxy::PodProxy,
};

/// How long a connection takes from the decision about it to a listener, and from there to be accepted.
pub(super) const UNDER_WAY: Duration = Duration::from_millis(50);
/// How long it may take at most: on a node that is too busy to do it at once, or where the SYN was lost, which is sent again after
/// a second.
const LONG_UNDER_WAY: Duration = Duration::from_millis(1500);
/// How long who releases a pod waits for its connections to end.
const SHORTLY: Duration = Duration::from_millis(200);

/// A pod with its last connections.
pub(super) struct Leaving {
    enrolment: Enrolment,
    proxy: PodProxy,
}

impl Leaving {
    /// What a later agent needs to take it down.
    pub fn known(&self) -> KnownPod {
        KnownPod {
            leaves: true,
            ..self.enrolment.known()
        }
    }

    /// What cuts its connections.
    pub fn closing(&self) -> CancellationToken {
        self.proxy.closing()
    }

    /// Whether nobody is left to carry for: connections, or their pod.
    fn has_ended(&self) -> bool {
        let netns = self.enrolment.pod.sockets.netns();
        self.proxy.is_idle() || netns.has_devices().is_ok_and(|has| !has)
    }
}

impl Pods {
    /// Takes down a pod whose new connections are not the mesh's any more. What was on its way arrives, what is open goes on.
    pub(super) async fn leave(
        &self,
        running: &mut Running,
        mut enrolment: Enrolment,
        proxy: PodProxy,
    ) -> Result<(), EnrolError> {
        let pod = Arc::clone(&enrolment.pod);
        if pod.sockets.netns().has_devices().unwrap_or(false) {
            sleep(UNDER_WAY).await;
            self.arrived(&running.kernel, pod.cookie()).await;
            let withdrawn = tokio::task::block_in_place(|| enrolment.withdraw());
            sleep(UNDER_WAY).await;
            proxy.leave();
            withdrawn?;
            if timeout(SHORTLY, proxy.idle()).await.is_err() {
                tracing::info!(pod = %pod.uid(), "connections of a pod that was released go on");
                let leaving = Leaving { enrolment, proxy };
                running.leaving.insert(pod.cookie(), leaving);
                return Ok(());
            }
        }
        self.end(Leaving { enrolment, proxy }).await
    }

    /// Waits until the SYNs of connections that were decided while the pod was in the mesh have found their listeners; not for long, as
    /// one to an address that nobody has any more never does.
    async fn arrived(&self, kernel: &Kernel, pod: NetnsCookie) {
        let tables = kernel.tables();
        let deadline = Instant::now() + LONG_UNDER_WAY;
        while Instant::now() < deadline
            && tokio::task::block_in_place(|| tables.has_claims_under_way(pod)).unwrap_or(false)
        {
            sleep(UNDER_WAY).await;
        }
    }

    /// Takes down the pods whose last connections have ended.
    pub(super) async fn end_idle(&self, running: &mut Running) {
        let ended: Vec<NetnsCookie> = running
            .leaving
            .iter()
            .filter(|(_, leaving)| leaving.has_ended())
            .map(|(cookie, _)| *cookie)
            .collect();
        for cookie in &ended {
            if let Some(leaving) = running.leaving.remove(cookie)
                && let Err(error) = self.end(leaving).await
            {
                tracing::info!(%error, "not everything of a pod that has gone could be taken down");
            }
        }
        if !ended.is_empty() {
            self.remember(running);
        }
    }

    /// A pod is enrolled again before its last connections from before have ended: they go on, beside the new ones. Returns what
    /// its enrolment from before replaced.
    pub(super) fn come_back(
        &self,
        leaving: &mut HashMap<NetnsCookie, Leaving>,
        cookie: NetnsCookie,
    ) -> Option<KnownPod> {
        let left = leaving.remove(&cookie)?;
        self.context
            .certificates
            .release(&left.enrolment.pod.identity);
        Some(left.enrolment.known())
    }

    async fn end(&self, leaving: Leaving) -> Result<(), EnrolError> {
        let Leaving { enrolment, proxy } = leaving;
        let pod = Arc::clone(&enrolment.pod);
        // Before the routing that brings its connections here: a steered socket must not find another way.
        proxy.close().await;
        let ended = tokio::task::block_in_place(|| enrolment.end());
        self.context.certificates.release(&pod.identity);
        ended
    }
}
