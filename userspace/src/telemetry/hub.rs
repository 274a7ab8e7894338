//! The one place that a connection is reported to: metrics, access log and live feed together.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{Feed, FlowEvent, FlowRecord, Metrics, OpenFlow, log_connection};

/// Everything that hears of connections.
#[derive(Default)]
pub struct Telemetry {
    pub metrics: Metrics,
    pub feed: Feed,
}

impl Telemetry {
    /// A connection is established; hand the result to [`Self::closed`].
    pub fn opened(&self, record: &FlowRecord) -> OpenFlow {
        self.feed.publish(FlowEvent::Opened {
            time_ms: now_ms(),
            flow: record.clone(),
        });
        self.metrics.opened(record)
    }

    /// A connection ended.
    pub fn closed(&self, open: OpenFlow, record: FlowRecord) {
        open.close(&record);
        log_connection(&record);
        self.feed.publish(FlowEvent::Closed {
            time_ms: now_ms(),
            flow: record,
        });
    }

    /// A connection was refused or could not be established.
    pub fn failed(&self, record: FlowRecord) {
        self.metrics.failed(&record);
        log_connection(&record);
        self.feed.publish(FlowEvent::Closed {
            time_ms: now_ms(),
            flow: record,
        });
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
