//! Direct flows that are worth it are taken into the short-circuit, where both pods may be. Called by `node` as a task.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::pods::Pods;
use crate::{
    kernel::{Candidates, Entrant, NetnsCookie, OpenFlow, ShortCircuit, Tables},
    mesh::{ShortCircuitMode, Store},
    telemetry::Telemetry,
};

/// Flows entered in one go.
const BATCH: usize = 256;

/// Takes flows in.
pub struct Entries {
    short: Arc<ShortCircuit>,
    tables: Arc<Tables>,
    pods: Arc<Pods>,
    mesh: Arc<Store>,
    telemetry: Arc<Telemetry>,
}

impl Entries {
    pub fn new(
        short: Arc<ShortCircuit>,
        tables: Arc<Tables>,
        pods: Arc<Pods>,
        mesh: Arc<Store>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        Self {
            short,
            tables,
            pods,
            mesh,
            telemetry,
        }
    }

    /// Follows the kernel part's proposals until `shutdown`.
    pub async fn run(self, mut candidates: Candidates, shutdown: CancellationToken) {
        loop {
            let found = match shutdown.run_until_cancelled(candidates.some(BATCH)).await {
                None => return,
                Some(Ok(found)) => found,
                Some(Err(error)) => {
                    tracing::error!(%error, "cannot read which flows are worth a short-circuit");
                    return;
                }
            };
            let flows = found
                .iter()
                .filter_map(|candidate| self.tables.flow(&candidate.flow, candidate.sequence));
            let entrants: Vec<_> = flows.filter_map(|flow| self.entrant(flow)).collect();
            if entrants.is_empty() {
                continue;
            }
            let short = Arc::clone(&self.short);
            let entered = tokio::task::spawn_blocking(move || short.enter(&entrants)).await;
            for outcome in entered.unwrap_or_default() {
                let outcome = outcome.map_or_else(|unfit| unfit.name(), |()| "entered");
                self.telemetry.metrics.short_circuited(outcome);
            }
        }
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
}
