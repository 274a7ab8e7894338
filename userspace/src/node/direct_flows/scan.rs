//! One look through the open flows: which there are, what their sockets have seen, and what lost events would have said.
//! Blocking; runs on a thread for that.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use culvert_abi::{Isolated, Lost, LostKey};

use super::{Pods, short::Redirected};
use crate::kernel::{KernelError, NetnsCookie, OpenFlow, ShortCircuit, SocketMeasures, Tables};

#[derive(Clone)]
pub struct Scanner {
    tables: Arc<Tables>,
    pods: Arc<Pods>,
    short: Option<Arc<ShortCircuit>>,
    untold: Arc<Mutex<Untold>>,
}

/// What lost events would have said, and no look has told yet.
#[derive(Default)]
struct Untold(HashMap<LostKey, Lost>);

/// What was found.
pub struct Scan {
    /// Taken before the flows were read: a flow whose end is in here is not among them.
    pub lost: HashMap<LostKey, Lost>,
    pub flows: Vec<Found>,
    /// Whose alarm may have been lost, and whether it is the client's end.
    pub isolated: Vec<(Isolated, bool)>,
    /// Sockets were asked.
    pub measured: bool,
    pub took: Duration,
}

/// An open flow.
pub struct Found {
    pub flow: OpenFlow,
    /// What its client's socket has seen, and what was redirected past it; none where it was not asked.
    pub measures: Option<SocketMeasures>,
    /// None where its sockets were not entered, or not asked.
    pub redirected: Option<Redirected>,
}

impl Scanner {
    pub fn new(tables: Arc<Tables>, pods: Arc<Pods>, short: Option<Arc<ShortCircuit>>) -> Self {
        Self {
            tables,
            pods,
            short,
            untold: Arc::default(),
        }
    }

    /// Looks at the flows that are at least this old, and at their clients' sockets if `measured`.
    pub fn look(&self, at_least: Duration, measured: bool) -> Result<Scan, KernelError> {
        let began = Instant::now();
        // The kernel part has it no more: a look that fails leaves it to the next.
        let mut untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner);
        untold.add(self.tables.take_lost()?);
        // Not the time now: a later agent takes the younger ones for untold.
        let beat = self.tables.last_beat();
        let is_old = |flow: &OpenFlow| {
            beat.saturating_sub(Duration::from_nanos(flow.flow.opened_ns)) >= at_least
        };
        let flows = self.tables.flows()?.into_iter().filter(is_old);
        let found = |flow| Found {
            flow,
            measures: None,
            redirected: None,
        };
        let mut flows: Vec<_> = flows.map(found).collect();
        if measured {
            self.measure(&mut flows);
        }
        Ok(Scan {
            lost: std::mem::take(&mut untold.0),
            flows,
            isolated: self.tables.isolated(),
            measured,
            took: began.elapsed(),
        })
    }

    fn redirected(&self, flow: &OpenFlow) -> Option<Redirected> {
        let [client, server] = self.short.as_deref()?.counted(&flow.key)?.sides;
        Some(Redirected {
            by_client: client.redirected,
            by_server: server.redirected,
        })
    }

    fn measure(&self, flows: &mut [Found]) {
        let mut by_netns = HashMap::<u64, (Vec<usize>, Vec<_>)>::new();
        for (place, Found { flow, .. }) in flows.iter().enumerate() {
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
                if let Some(found) = place {
                    found.redirected = self.redirected(&found.flow);
                    found.measures = Some(found.with_redirected(measures));
                }
            }
        }
    }
}

impl Untold {
    fn add(&mut self, lost: Vec<(LostKey, Lost)>) {
        for (key, more) in lost {
            let total = self.0.entry(key).or_default();
            for (total, more) in [
                (&mut total.closed, more.closed),
                (&mut total.failed, more.failed),
                (&mut total.bytes_sent, more.bytes_sent),
                (&mut total.bytes_received, more.bytes_received),
                (&mut total.retransmits, more.retransmits),
            ] {
                *total = total.saturating_add(more);
            }
        }
    }
}

impl Found {
    /// TCP does not know of what was redirected.
    fn with_redirected(&self, mut measures: SocketMeasures) -> SocketMeasures {
        if let Some(redirected) = self.redirected {
            measures.bytes_acked = measures.bytes_acked.saturating_add(redirected.by_client);
            measures.bytes_received = measures.bytes_received.saturating_add(redirected.by_server);
        }
        measures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_look_has_told_adds_up_by_whose_it_is() {
        let key = |service| LostKey {
            client_netns: 1,
            server: [0; 16],
            service,
            padding: 0,
        };
        let lost = |closed, bytes_sent| Lost {
            closed,
            bytes_sent,
            ..Lost::default()
        };
        let mut untold = Untold::default();
        untold.add(vec![(key(1), lost(1, 10)), (key(2), lost(2, 20))]);
        untold.add(vec![(key(1), lost(3, u64::MAX))]);
        assert_eq!(untold.0.len(), 2);
        assert_eq!(untold.0[&key(1)], lost(4, u64::MAX));
        assert_eq!(untold.0[&key(2)], lost(2, 20));
    }
}
