//! The one place that a connection is reported to: metrics, access log and live feed together.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::access_log::{AccessLine, AccessLog};
use super::flows::RECENT;
use super::record::FlowEnd;
use super::{Feed, FlowEvent, FlowRecord, Metrics, OpenFlow, ResponseFlags};

/// Everything that hears of connections.
#[derive(Default)]
pub struct Telemetry {
    pub metrics: Metrics,
    pub feed: Feed,
    pub access: AccessLog,
}

impl Telemetry {
    /// Telemetry that logs connections.
    pub fn logging_to(access: AccessLog) -> Self {
        let telemetry = Self {
            access,
            ..Self::default()
        };
        if let Some(lost) = telemetry.access.lost_lines() {
            telemetry.metrics.set_lost_log_lines(lost);
        }
        telemetry
    }

    /// A connection is established; hand the result to [`Self::closed`].
    pub fn opened(&self, record: &FlowRecord) -> OpenFlow {
        self.feed.publish(FlowEvent::Opened {
            time_ms: milliseconds(SystemTime::now()),
            flow: record.clone(),
        });
        self.metrics.opened(record)
    }

    /// A connection ended.
    pub fn closed(&self, open: OpenFlow, mut record: FlowRecord) {
        let end = *record.end.get_or_insert(FlowEnd::Fin);
        open.close(&record);
        self.metrics.ended(record.path, end, 1);
        self.tell(vec![(SystemTime::now(), record)]);
    }

    /// A connection was refused or could not be established.
    pub fn failed(&self, mut record: FlowRecord) {
        let end = *record.end.get_or_insert(match record.response_flags {
            ResponseFlags::Deny => FlowEnd::Denied,
            _ => FlowEnd::Failed,
        });
        self.metrics.failed(&record);
        self.metrics.ended(record.path, end, 1);
        self.tell(vec![(SystemTime::now(), record)]);
    }

    /// Of so many connections that ended well, this many of the oldest are of no interest to log and feed.
    pub fn spared(&self, ended: usize) -> usize {
        if self.access.has_every_line() || self.feed.is_followed() {
            0
        } else {
            ended.saturating_sub(RECENT)
        }
    }

    /// Tells log and feed, but not the metrics, of connections that have ended.
    pub fn tell(&self, ended: Vec<(SystemTime, FlowRecord)>) {
        let (lines, events): (Vec<_>, Vec<_>) = ended
            .into_iter()
            .map(|(time, flow)| {
                let time_ms = milliseconds(time);
                let event = Arc::new(FlowEvent::Closed { time_ms, flow });
                let line = AccessLine {
                    time,
                    event: Arc::clone(&event),
                };
                (line, event)
            })
            .unzip();
        self.access.log(lines);
        self.feed.publish_all(&events);
    }
}

/// Since 1970.
pub(crate) fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
