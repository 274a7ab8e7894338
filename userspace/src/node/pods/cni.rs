//! The pods of istio-cni: what [`zds`] asks for, and those that have ended without a word.

use std::collections::HashSet;

use super::{Pods, Released, Running};
use crate::{
    enrol::{EnrolError, NetnsPlace, Origin, PodSpec, PodUid, zds},
    kernel::NetnsCookie,
};

impl zds::PodHost for Pods {
    async fn enrol(&self, spec: PodSpec) -> Result<(), EnrolError> {
        self.learn(std::slice::from_ref(&spec)).await;
        let mut running = self.running.lock().await;
        if running.workers.is_none() {
            return Err(EnrolError::Stopping);
        }
        let netns = spec.netns.open()?;
        let released = match self.in_other_netns(&running, &spec.uid, netns.cookie()) {
            true => Some(self.release(&mut running, &spec.uid).await?),
            false => None,
        };
        let enrolled = self.admit_or_wait(&mut running, spec).await;
        drop(running);
        if let Some(released) = released {
            self.finish_quietly(released).await;
        }
        enrolled
    }

    async fn release(&self, uid: &PodUid) -> Result<(), EnrolError> {
        let mut running = self.running.lock().await;
        match self.release_cni(&mut running, uid).await {
            Some(released) => {
                drop(running);
                self.finish(released?).await
            }
            None => Ok(()),
        }
    }

    async fn keep_only(&self, named: &HashSet<PodUid>) {
        let mut running = self.running.lock().await;
        let gone = self.of_cni(&running).into_iter();
        let gone: Vec<PodUid> = gone.filter(|uid| !named.contains(uid)).collect();
        self.release_all(&mut running, gone, "istio-cni does not name it any more")
            .await;
    }
}

impl Pods {
    /// Takes down what no connection needs any more, and releases pods of istio-cni's that have ended: whoever holds their namespace open, their devices are gone. One look is not
    /// enough: a device may be on its way.
    pub async fn release_ended(&self) {
        let mut running = self.running.lock().await;
        self.end_idle(&mut running).await;
        let bare: HashSet<PodUid> = self
            .of_cni(&running)
            .into_iter()
            .filter(|uid| is_bare(&running, uid))
            .collect();
        let ended = bare.intersection(&running.bare).cloned().collect();
        running.bare = bare;
        self.release_all(&mut running, ended, "it has no network device any more")
            .await;
    }

    /// Whether a pod of istio-cni's is served in another namespace.
    fn in_other_netns(&self, running: &Running, uid: &PodUid, netns: NetnsCookie) -> bool {
        running.pods.get(uid).is_some_and(|(enrolment, _)| {
            enrolment.pod.spec.origin == Origin::Cni && enrolment.pod.cookie() != netns
        })
    }

    /// Everything that istio-cni has named, also what waits.
    fn of_cni(&self, running: &Running) -> Vec<PodUid> {
        let served = running
            .pods
            .values()
            .map(|(enrolment, _)| &enrolment.pod.spec);
        let waiting = running.waiting.values().map(|waiting| &waiting.spec);
        served
            .chain(waiting)
            .filter(|spec| spec.origin == Origin::Cni)
            .map(|spec| spec.uid.clone())
            .collect()
    }

    async fn release_all(&self, running: &mut Running, uids: Vec<PodUid>, why: &'static str) {
        for uid in uids {
            tracing::info!(pod = %uid, why, "a pod is released");
            match self.release_cni(running, &uid).await {
                Some(Ok(released)) => self.finish_quietly(released).await,
                Some(Err(error)) => tracing::warn!(pod = %uid, %error, "a pod was not released"),
                None => {}
            }
        }
    }

    /// Releases a pod; `None` if istio-cni has no such pod here.
    async fn release_cni(
        &self,
        running: &mut Running,
        uid: &PodUid,
    ) -> Option<Result<Released, EnrolError>> {
        if running
            .waiting
            .get(uid)
            .is_some_and(|waiting| waiting.spec.origin == Origin::Cni)
        {
            let waiting = running.waiting.remove(uid)?;
            if let Some(known) = waiting.known {
                self.forget(running, known);
            }
            self.remember(running);
            return None;
        }
        let (enrolment, _) = running.pods.get(uid)?;
        if enrolment.pod.spec.origin != Origin::Cni {
            return None;
        }
        if running.kernel.is_taken_over() {
            // Its kernel part, and the list of pods, are another agent's by now: only what is open here ends.
            let (enrolment, proxy) = running.pods.remove(uid)?;
            self.registry.remove(uid);
            proxy.close().await;
            tracing::info!(pod = %enrolment.pod.uid(), "the connections of a pod that left were ended");
            return None;
        }
        let released = self.release(running, uid).await;
        self.remember(running);
        Some(released)
    }

    /// Nobody is there to be told.
    async fn finish_quietly(&self, released: Released) {
        if let Err(error) = self.finish(released).await {
            tracing::info!(%error, "not everything of a pod that has gone could be taken down");
        }
    }
}

/// Whether a pod has no device. One of which nothing can be seen has not ended for that.
fn is_bare(running: &Running, uid: &PodUid) -> bool {
    let served = running
        .pods
        .get(uid)
        .map(|(enrolment, _)| &enrolment.pod.spec);
    let waiting = running.waiting.get(uid).map(|waiting| &waiting.spec);
    let Some(NetnsPlace::Held(netns)) = served.or(waiting).map(|spec| &spec.netns) else {
        return false;
    };
    netns.has_devices().is_ok_and(|has| !has)
}
