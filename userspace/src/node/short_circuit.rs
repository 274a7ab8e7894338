//! Direct flows that are worth it are taken into the short-circuit, where both pods may be; they leave it when that changes, and are
//! reset when they are stuck. Called by `node` as a task.

use std::{collections::HashSet, sync::Arc, time::Duration};

use culvert_abi::{Candidate, news};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{enforcer::Enforcer, outcomes::Outcomes, pods::Pods};
use crate::{
    kernel::{Candidates, Entrant, FlowName, NetnsCookie, OpenFlow, ShortCircuit, Tables},
    mesh::{ShortCircuitMode, Store},
    telemetry::Telemetry,
};

/// News taken in one go.
const BATCH: usize = 256;
/// How often those that have been entered are looked through, without a change of the mesh.
const REVIEW: Duration = Duration::from_secs(1);

/// What is needed to decide about flows.
pub struct Sources {
    pub short: Arc<ShortCircuit>,
    pub tables: Arc<Tables>,
    pub pods: Arc<Pods>,
    pub mesh: Arc<Store>,
    pub enforcer: Arc<Enforcer>,
    pub telemetry: Arc<Telemetry>,
    pub outcomes: Arc<Outcomes>,
}

/// Takes flows in and out.
pub struct Entries {
    sources: Arc<Sources>,
    /// Flows that redirect nothing any more.
    stopped: HashSet<FlowName>,
}

impl Entries {
    pub fn new(sources: Sources) -> Self {
        Self {
            sources: Arc::new(sources),
            stopped: HashSet::new(),
        }
    }

    /// Follows what the kernel part tells, and the mesh, until `shutdown`.
    pub async fn run(mut self, mut candidates: Candidates, shutdown: CancellationToken) {
        let mut changes = self.sources.mesh.subscribe();
        let mut reviews = tokio::time::interval(REVIEW);
        reviews.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let found = async {
                tokio::select! {
                    found = candidates.some(BATCH) => found,
                    _ = changes.changed() => Ok(Vec::new()),
                    _ = reviews.tick() => Ok(Vec::new()),
                }
            };
            match shutdown.run_until_cancelled(found).await {
                None => return,
                Some(Ok(found)) => self.handle(found).await,
                Some(Err(error)) => {
                    tracing::error!(%error, "cannot read which flows are worth a short-circuit");
                    return;
                }
            }
        }
    }

    /// Does what is due: with news what they ask for, without them a review.
    async fn handle(&mut self, found: Vec<Candidate>) {
        let sources = Arc::clone(&self.sources);
        let stopped = std::mem::take(&mut self.stopped);
        let done = tokio::task::spawn_blocking(move || {
            if found.is_empty() {
                return sources.review(stopped);
            }
            let (worth, stuck): (Vec<_>, Vec<_>) = found
                .iter()
                .partition(|candidate| candidate.news == news::WORTH);
            // The stuck first: somebody waits.
            for candidate in stuck {
                sources.reset(candidate);
            }
            sources.enter(&worth);
            stopped
        });
        match done.await {
            Ok(stopped) => self.stopped = stopped,
            Err(error) => tracing::error!(%error, "looking after short-circuited flows failed"),
        }
    }
}

impl Sources {
    fn enter(&self, candidates: &[&Candidate]) {
        let flows = candidates
            .iter()
            .filter_map(|candidate| self.tables.flow(&candidate.flow, candidate.sequence));
        let mut entrants = Vec::new();
        for flow in flows {
            match self.entrant(flow) {
                Some(entrant) => entrants.push(entrant),
                // Its pods have it on at other ports, or not any more.
                None => self.leave_out(&flow, "off"),
            }
        }
        if entrants.is_empty() {
            return;
        }
        let outcomes = self.short.enter(&entrants);
        for (entrant, outcome) in entrants.iter().zip(outcomes) {
            let outcome = match outcome {
                Ok(()) => "entered",
                Err(unfit) => {
                    self.leave_out(&entrant.flow, unfit.name());
                    unfit.name()
                }
            };
            self.telemetry.metrics.short_circuited(outcome);
        }
    }

    /// Remembers why, for what is told of the flow.
    fn leave_out(&self, flow: &OpenFlow, reason: &'static str) {
        let is_open = |(key, sequence): &FlowName| self.tables.flow(key, *sequence).is_some();
        self.outcomes.note(flow.name(), reason, is_open);
    }

    /// A flow whose pods may both at its server's port, as the mesh says now.
    fn entrant(&self, flow: OpenFlow) -> Option<Entrant> {
        let mesh = self.mesh.load();
        let port = flow.key.server_port;
        let netns = |cookie| {
            let pod = self.pods.by_cookie(NetnsCookie(cookie))?;
            let mode = pod.workload(&mesh)?.short_circuit.mode(port);
            (mode == ShortCircuitMode::On).then(|| Arc::clone(pod.sockets.netns()))
        };
        Some(Entrant {
            client: netns(flow.flow.client_netns)?,
            server: netns(flow.flow.server_netns)?,
            flow,
        })
    }

    /// Bytes that were redirected are there, and their reader does not see them: it hears of a reset at least.
    fn reset(&self, candidate: &Candidate) {
        let Some(flow) = self.tables.flow(&candidate.flow, candidate.sequence) else {
            return;
        };
        if !self.enforcer.cut_stuck(&flow) {
            return;
        }
        self.telemetry.metrics.short_circuited("stuck");
        let reader = if candidate.news == news::STUCK_CLIENT {
            flow.flow.client_netns
        } else {
            flow.flow.server_netns
        };
        let pod = self.pods.by_cookie(NetnsCookie(reader));
        tracing::warn!(
            client = %flow.client(),
            server = %flow.server(),
            reader = pod.map(|pod| pod.spec.uid.to_string()),
            "a short-circuited flow was reset: one of its programs uses splice(2), FIONREAD or SO_ZEROCOPY, which do not go with redirected bytes on this kernel; no flow of that pod is short-circuited from now on"
        );
    }

    /// Stops what may not be any more; returns the flows that are stopped by now.
    fn review(&self, stopped: HashSet<FlowName>) -> HashSet<FlowName> {
        let mut now = HashSet::new();
        for (key, counted) in self.short.entered() {
            let open = self.tables.flow_at(&key).filter(|flow| {
                counted.sockets == [flow.flow.client_socket, flow.flow.server_socket]
            });
            let Some(flow) = open else {
                // It ended while it was entered.
                self.short.forget(&key, counted.sockets);
                continue;
            };
            let name = flow.name();
            if self.entrant(flow).is_some() {
                continue;
            }
            let known = |cookie| {
                let pod = self.pods.by_cookie(cookie)?;
                Some(Arc::clone(pod.sockets.netns()))
            };
            if stopped.contains(&name) || self.short.stop(&flow, known) {
                now.insert(name);
            }
        }
        // By the kernel part's own list: an agent that has just started does not serve the pods of the one before yet.
        if let Ok(pods) = self.tables.pods() {
            let pods: HashSet<_> = pods.into_iter().map(|(cookie, _)| cookie).collect();
            self.short.keep_pods(|cookie| pods.contains(&cookie));
        }
        now
    }
}
