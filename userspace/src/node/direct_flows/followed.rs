//! A flow that stays open: what has been counted of it so far, and how it is reported meanwhile.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    pair::{Pair, PairKey},
    short::Short,
};
use crate::{
    kernel::{OpenFlow, SocketMeasures, sys},
    telemetry::{FlowEvent, FlowRecord, Telemetry, milliseconds},
};

/// Open flows that those who follow are told of in one round.
const REPORTED: usize = 512;

/// What the metrics have counted, seen from the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub flows: u64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
}

impl Totals {
    pub fn add(&mut self, other: &Self) {
        for (total, more) in
            self.parts()
                .into_iter()
                .zip([other.flows, other.bytes_sent, other.bytes_received])
        {
            *total = total.saturating_add(more);
        }
    }

    /// Takes off what there is credit for, and the credit with it.
    pub fn spend(&mut self, credit: &mut Self) {
        for (total, credit) in self.parts().into_iter().zip(credit.parts()) {
            let spent = (*total).min(*credit);
            *total -= spent;
            *credit -= spent;
        }
    }

    fn parts(&mut self) -> [&mut u64; 3] {
        [
            &mut self.flows,
            &mut self.bytes_sent,
            &mut self.bytes_received,
        ]
    }
}

/// An open flow.
pub struct Followed {
    pub pair: Arc<Pair>,
    pub pair_key: PairKey,
    pub counted: Totals,
    /// As it was when its sockets were last looked at.
    pub short: Short,
    client: SocketAddr,
    server: SocketAddr,
    /// By the clock of [`sys::monotonic_now`].
    opened: Duration,
    measures: Option<SocketMeasures>,
}

impl Followed {
    /// One that this agent sees first.
    pub fn new(flow: &OpenFlow, pair: Arc<Pair>, measures: Option<&SocketMeasures>) -> Self {
        let mut followed = Self::unseen(flow, pair);
        followed.pair.series.opened(1);
        if let Some(measures) = measures {
            followed.update(measures);
        }
        followed
    }

    /// One that an earlier agent has counted: this one counts what comes.
    pub fn inherited(flow: &OpenFlow, pair: Arc<Pair>, measures: &SocketMeasures) -> Self {
        let mut followed = Self::unseen(flow, pair);
        (followed.counted.bytes_sent, followed.counted.bytes_received) = bytes(measures);
        followed.measures = Some(*measures);
        followed
    }

    fn unseen(flow: &OpenFlow, pair: Arc<Pair>) -> Self {
        Self {
            pair,
            pair_key: PairKey::of_flow(flow),
            counted: Totals {
                flows: 1,
                ..Totals::default()
            },
            short: Short::default(),
            client: flow.client(),
            server: flow.server(),
            opened: Duration::from_nanos(flow.flow.opened_ns),
            measures: None,
        }
    }

    pub fn client(&self) -> SocketAddr {
        self.client
    }

    /// Counts what has come since. Totals only rise; smaller ones add nothing.
    pub fn update(&mut self, measures: &SocketMeasures) {
        let (sent, received) = bytes(measures);
        let counted = &mut self.counted;
        // Telemetry sees the connection from its server.
        self.pair.series.bytes(
            received.saturating_sub(counted.bytes_received),
            sent.saturating_sub(counted.bytes_sent),
        );
        counted.bytes_sent = counted.bytes_sent.max(sent);
        counted.bytes_received = counted.bytes_received.max(received);
        self.measures = Some(*measures);
    }

    fn record(&self, now: Duration) -> FlowRecord {
        let mut record = self.pair.record(self.client, self.server);
        record.duration = now.saturating_sub(self.opened);
        self.short.tell(&mut record);
        if let Some(measures) = &self.measures {
            let (sent, received) = bytes(measures);
            record.bytes_sent = received;
            record.bytes_received = sent;
            record.rtt = Some(measures.rtt);
            record.retransmits = Some(measures.retransmits);
        }
        record
    }
}

/// Bytes sent and received. SYN and FIN count as an octet each; where a FIN may have been counted, one is taken off: what
/// is missing by that comes with the end.
fn bytes(measures: &SocketMeasures) -> (u64, u64) {
    let fin = u64::from(!measures.established);
    (
        measures.bytes_acked.saturating_sub(1 + fin),
        measures.bytes_received.saturating_sub(fin),
    )
}

/// Tells those who follow of open flows.
pub struct Reports<'a> {
    telemetry: &'a Telemetry,
    wall: SystemTime,
    clock: Duration,
    left: usize,
}

impl<'a> Reports<'a> {
    pub fn new(telemetry: &'a Telemetry, measured: bool) -> Self {
        let wanted = measured && telemetry.feed.is_followed();
        Self {
            telemetry,
            wall: SystemTime::now(),
            clock: sys::monotonic_now(),
            left: if wanted { REPORTED } else { 0 },
        }
    }

    /// A flow that was not known before.
    pub fn first(&self, flow: &Followed) {
        let opened = self.wall - self.clock.saturating_sub(flow.opened);
        self.telemetry.feed.publish(FlowEvent::Opened {
            time_ms: milliseconds(opened),
            flow: flow.record(self.clock),
        });
    }

    /// A flow that is still there.
    pub fn open(&mut self, flow: &Followed) {
        if let Some(left) = self.left.checked_sub(1) {
            self.left = left;
            self.telemetry.feed.whisper(FlowEvent::Report {
                time_ms: milliseconds(self.wall),
                flow: flow.record(self.clock),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_is_spent_once_and_the_rest_is_kept() {
        let mut credit = Totals {
            flows: 1,
            bytes_sent: 100,
            bytes_received: 5,
        };
        let lost = |bytes_sent| Totals {
            flows: 1,
            bytes_sent,
            bytes_received: 5,
        };
        let mut first = lost(70);
        first.spend(&mut credit);
        assert_eq!(first, Totals::default());
        let mut second = lost(70);
        second.spend(&mut credit);
        assert_eq!((second.flows, second.bytes_sent), (1, 40));
        assert_eq!(credit, Totals::default());
    }

    #[test]
    fn a_socket_that_is_closing_counts_no_octet_that_may_be_a_fin() {
        let mut measures = SocketMeasures {
            established: true,
            bytes_acked: 11,
            bytes_received: 4,
            ..SocketMeasures::default()
        };
        assert_eq!(bytes(&measures), (10, 4));
        measures.established = false;
        assert_eq!(bytes(&measures), (9, 3));
        assert_eq!(bytes(&SocketMeasures::default()), (0, 0));
    }
}
