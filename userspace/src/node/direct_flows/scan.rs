//! One look through the open flows: which there are, what their sockets have seen, and what lost events would have said.
//! Blocking; runs on a thread for that.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_abi::{Isolated, Lost, LostKey};

use super::Pods;
use crate::kernel::{KernelError, NetnsCookie, OpenFlow, ShortCircuit, SocketMeasures, Tables};

#[derive(Clone)]
pub struct Scanner {
    tables: Arc<Tables>,
    pods: Arc<Pods>,
    short: Option<Arc<ShortCircuit>>,
}

/// What was found.
pub struct Scan {
    /// Taken before the flows were read: a flow whose end is in here is not among them.
    pub lost: Vec<(LostKey, Lost)>,
    pub flows: Vec<(OpenFlow, Option<SocketMeasures>)>,
    /// Whose alarm may have been lost, and whether it is the client's end.
    pub isolated: Vec<(Isolated, bool)>,
    /// Sockets were asked.
    pub measured: bool,
    pub took: Duration,
}

impl Scanner {
    pub fn new(tables: Arc<Tables>, pods: Arc<Pods>, short: Option<Arc<ShortCircuit>>) -> Self {
        Self {
            tables,
            pods,
            short,
        }
    }

    /// Looks at the flows that are at least this old, and at their clients' sockets if `measured`.
    pub fn look(&self, at_least: Duration, measured: bool) -> Result<Scan, KernelError> {
        let began = Instant::now();
        let lost = self.tables.take_lost()?;
        // Not the time now: a later agent takes the younger ones for untold.
        let beat = self.tables.last_beat();
        let is_old = |flow: &OpenFlow| {
            beat.saturating_sub(Duration::from_nanos(flow.flow.opened_ns)) >= at_least
        };
        let flows = self.tables.flows()?.into_iter().filter(is_old);
        let mut flows: Vec<_> = flows.map(|flow| (flow, None)).collect();
        if measured {
            self.measure(&mut flows);
        }
        Ok(Scan {
            lost,
            flows,
            isolated: self.tables.isolated(),
            measured,
            took: began.elapsed(),
        })
    }

    /// TCP does not know of what was redirected.
    fn with_redirected(&self, flow: &OpenFlow, mut measures: SocketMeasures) -> SocketMeasures {
        let short = self.short.as_deref();
        if let Some(counted) = short.and_then(|short| short.counted(&flow.key)) {
            let [client, server] = counted.sides;
            measures.bytes_acked = measures.bytes_acked.saturating_add(client.redirected);
            measures.bytes_received = measures.bytes_received.saturating_add(server.redirected);
        }
        measures
    }

    fn measure(&self, flows: &mut [(OpenFlow, Option<SocketMeasures>)]) {
        let mut by_netns = HashMap::<u64, (Vec<usize>, Vec<_>)>::new();
        for (place, (flow, _)) in flows.iter().enumerate() {
            let (places, names) = by_netns.entry(flow.flow.client_netns).or_default();
            places.push(place);
            names.push(flow.client_end());
        }
        // All namespaces at once: one that does not answer holds no other up. Its flows are counted when they end.
        let asked: Vec<_> = by_netns
            .into_iter()
            .filter_map(|(netns, (places, names))| {
                let pod = self.pods.by_cookie(NetnsCookie(netns))?;
                Some((places, pod.diag.measure(names)))
            })
            .collect();
        for (places, asked) in asked {
            for (index, measures) in asked.wait().unwrap_or_default() {
                let place = places.get(index).and_then(|place| flows.get_mut(*place));
                if let Some((flow, found)) = place {
                    *found = Some(self.with_redirected(flow, measures));
                }
            }
        }
    }
}
