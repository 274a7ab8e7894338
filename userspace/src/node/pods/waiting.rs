//! Pods that are to be served and cannot be yet: those of an earlier agent, whose traffic is refused meanwhile, and those of istio-cni
//! that could not be enrolled, whose traffic is as it was.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use super::{Pods, Running};
use crate::{
    enrol::{KnownPod, NetnsPlace, PodSpec},
    kernel::NetnsCookie,
};

/// How long a pod that no agent has served yet waits for the next attempt, as with ztunnel.
const PAUSE: Duration = Duration::from_secs(5);

/// A pod that waits.
pub(super) struct Waiting {
    pub spec: PodSpec,
    /// What an earlier agent set up: it stays in force.
    pub known: Option<KnownPod>,
    reason: String,
    next: Next,
}

/// When a pod is tried again.
enum Next {
    At(Instant),
    /// When istio-cni names it, and hands its namespace over again.
    Snapshot,
}

/// A pod that waits, for those who only look.
#[derive(Clone, Debug)]
pub struct WaitingPod {
    pub spec: PodSpec,
    pub ips: Vec<IpAddr>,
    pub cookie: Option<NetnsCookie>,
    pub reason: String,
}

impl Waiting {
    /// A pod to be tried again: soon where its traffic is refused.
    pub fn again(spec: PodSpec, known: Option<KnownPod>, reason: String) -> Self {
        let pause = known.as_ref().map_or(PAUSE, |_| Duration::ZERO);
        Self {
            spec,
            known,
            reason,
            next: Next::At(Instant::now() + pause),
        }
    }

    /// A pod that an earlier agent had from istio-cni.
    pub fn for_snapshot(known: KnownPod) -> Self {
        Self {
            spec: known.spec.clone(),
            known: Some(known),
            reason: "istio-cni has not named it again yet".to_owned(),
            next: Next::Snapshot,
        }
    }

    /// Whether it is to be tried again now.
    fn is_due(&self) -> bool {
        matches!(self.next, Next::At(at) if at <= Instant::now())
    }

    pub fn told(&self) -> WaitingPod {
        let known = self.known.as_ref();
        let held = match &self.spec.netns {
            NetnsPlace::Held(netns) => Some(netns.cookie()),
            NetnsPlace::Path(_) | NetnsPlace::Remembered { .. } => None,
        };
        WaitingPod {
            spec: self.spec.clone(),
            ips: known.map(|known| known.ips.clone()).unwrap_or_default(),
            cookie: known.map(|known| known.cookie).or(held),
            reason: self.reason.clone(),
        }
    }
}

impl Pods {
    /// Tries to serve the pods that wait, as far as it is time.
    pub async fn retry(&self) {
        let due = due(&*self.running.lock().await);
        self.learn(&due).await;
        let mut running = self.running.lock().await;
        // They go on waiting meanwhile: who asks is told of all of them, and none is forgotten.
        for spec in self::due(&running) {
            // What fails waits again, and says so.
            let _ = self.admit_or_wait(&mut running, spec).await;
        }
    }

    /// Enrols a pod, or has it wait.
    pub(super) async fn admit_or_wait(
        &self,
        running: &mut Running,
        spec: PodSpec,
    ) -> Result<(), crate::enrol::EnrolError> {
        let uid = spec.uid.clone();
        let Err(error) = self.admit(running, spec.clone()).await else {
            return Ok(());
        };
        let known = running.waiting.remove(&uid).and_then(|old| old.known);
        let known = known.map(|known| KnownPod {
            spec: spec.clone(),
            ..known
        });
        let waiting = Waiting::again(spec, known, error.to_string());
        running.waiting.insert(uid, waiting);
        self.remember(running);
        Err(error)
    }
}

/// The pods that are to be tried again now.
fn due(running: &Running) -> Vec<PodSpec> {
    let due = running.waiting.values().filter(|waiting| waiting.is_due());
    due.map(|waiting| waiting.spec.clone()).collect()
}
