//! The access log: one line per connection when it ends, target `access`, error level for failures. Field names and
//! their order are those of ztunnel, so that parsers made for it work; `path`, `not_direct`, `end`, `connect_latency`, `rtt`,
//! `retransmits`, `short_circuit`, `redirected_*` and `policy` are ours. Lines are rendered by the log's own thread, from a record that others share.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use tracing::Level;

use super::flows::FlowEvent;
use super::line::{Fields, Head};
use super::record::{FlowRecord, Party};
use super::writer::LogWriter;
use crate::config::LogFormat;

const TARGET: &str = "access";

/// Where ended and refused connections are logged; the default is nowhere.
#[derive(Clone, Default)]
pub struct AccessLog(Option<Open>);

#[derive(Clone)]
struct Open {
    writer: LogWriter,
    format: LogFormat,
}

/// A connection that has ended, not rendered yet.
#[derive(Clone, Debug)]
pub(super) struct AccessLine {
    pub time: SystemTime,
    pub event: Arc<FlowEvent>,
}

impl std::fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AccessLog")
    }
}

impl AccessLog {
    pub(super) fn new(writer: LogWriter, format: LogFormat) -> Self {
        Self(Some(Open { writer, format }))
    }

    /// Whether connections that ended well are logged: without, their records need not be made.
    pub fn has_every_line(&self) -> bool {
        self.0.is_some() && is_enabled(false)
    }

    /// Lines dropped because the log is not read fast enough; for the metrics.
    pub fn lost_lines(&self) -> Option<Arc<AtomicU64>> {
        self.0.as_ref().map(|open| open.writer.lost())
    }

    /// Logs connections as the filter says.
    pub(super) fn log(&self, mut lines: Vec<AccessLine>) {
        let Some(open) = &self.0 else {
            return;
        };
        let (well, failed) = (is_enabled(false), is_enabled(true));
        lines.retain(|line| {
            if line.event.flow().error.is_some() {
                failed
            } else {
                well
            }
        });
        open.writer.access(lines, open.format);
    }
}

fn is_enabled(failure: bool) -> bool {
    if failure {
        tracing::enabled!(target: TARGET, Level::ERROR)
    } else {
        tracing::enabled!(target: TARGET, Level::INFO)
    }
}

impl AccessLine {
    /// Appends the line.
    pub fn render(&self, format: LogFormat, out: &mut String) {
        render(self.event.flow(), self.time, format, out);
    }
}

#[cfg(test)]
impl Default for AccessLine {
    fn default() -> Self {
        let event = FlowEvent::Closed {
            time_ms: 0,
            flow: FlowRecord::default(),
        };
        Self {
            time: SystemTime::UNIX_EPOCH,
            event: Arc::new(event),
        }
    }
}

fn render(record: &FlowRecord, time: SystemTime, format: LogFormat, out: &mut String) {
    let head = Head {
        time,
        level: if record.error.is_some() {
            "error"
        } else {
            "info"
        },
        target: TARGET,
        message: "connection complete",
    };
    let mut line = Fields::after(&head, format, out);
    line.address("src.addr", record.source_addr);
    name(&mut line, "src.workload", "src.namespace", &record.source);
    identity(&mut line, "src.identity", &record.source);
    line.address("dst.addr", record.destination_addr);
    if let Some(address) = record.hbone_addr {
        line.address("dst.hbone_addr", address);
    }
    if let Some(service) = &record.service {
        line.text("dst.service", &service.hostname);
    }
    let destination = &record.destination;
    name(&mut line, "dst.workload", "dst.namespace", destination);
    identity(&mut line, "dst.identity", destination);
    line.text("direction", record.direction.as_str());
    line.number("bytes_sent", record.bytes_sent);
    line.number("bytes_recv", record.bytes_received);
    line.amount("duration", record.duration.as_millis(), "ms");
    line.text("path", record.path.as_str());
    if let Some(reason) = &record.not_direct {
        line.text("not_direct", reason.name());
    }
    if let Some(end) = record.end {
        line.text("end", end.as_str());
    }
    if let Some(latency) = record.connect_latency {
        line.amount("connect_latency", latency.as_micros(), "us");
    }
    if let Some(rtt) = record.rtt {
        line.amount("rtt", rtt.as_micros(), "us");
    }
    if let Some(retransmits) = record.retransmits {
        line.number("retransmits", retransmits.into());
    }
    if let Some(word) = record.short_circuit_word() {
        line.text("short_circuit", word);
    }
    if let Some(bytes) = record.redirected_sent {
        line.number("redirected_sent", bytes);
    }
    if let Some(bytes) = record.redirected_received {
        line.number("redirected_recv", bytes);
    }
    if let Some(policy) = &record.policy {
        line.text("policy", policy);
    }
    if let Some(error) = &record.error {
        line.text("error", error);
    }
    line.end();
}

fn name(line: &mut Fields<'_>, workload: &str, namespace: &str, party: &Party) {
    if let Some(value) = &party.name {
        line.text(workload, value);
    }
    if let Some(value) = &party.namespace {
        line.text(namespace, value);
    }
}

fn identity(line: &mut Fields<'_>, field: &str, party: &Party) {
    if let Some(identity) = &party.identity {
        line.text(field, &identity.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::{Direction, FlowEnd, FlowPath, ServiceName};
    use super::*;
    use crate::policy::Identity;
    use std::time::Duration;

    fn logged(record: &FlowRecord, format: LogFormat) -> String {
        let mut text = String::new();
        render(record, SystemTime::now(), format, &mut text);
        assert_eq!(text.matches('\n').count(), 1);
        text
    }

    fn party(name: &str) -> Arc<Party> {
        Arc::new(Party {
            name: Some(name.to_owned()),
            namespace: Some("shop".to_owned()),
            identity: Some(
                Identity::parse(&format!("spiffe://cluster.local/ns/shop/sa/{name}")).unwrap(),
            ),
            ..Party::default()
        })
    }

    fn record() -> FlowRecord {
        FlowRecord {
            source: party("client"),
            destination: party("server"),
            hbone_addr: Some("10.0.0.2:80".parse().unwrap()),
            service: Some(Arc::new(ServiceName {
                hostname: "server.shop.svc".to_owned(),
                ..ServiceName::default()
            })),
            direction: Direction::Inbound,
            path: FlowPath::Hbone,
            not_direct: Some(culvert_abi::Reason::SteeredRemote),
            bytes_sent: 175,
            bytes_received: 80,
            duration: Duration::from_micros(1500),
            end: Some(FlowEnd::ResetByPeer),
            connect_latency: Some(Duration::from_micros(300)),
            rtt: Some(Duration::from_micros(120)),
            retransmits: Some(2),
            policy: Some("shop/allow".to_owned()),
            ..FlowRecord::new(
                "10.0.0.1:4000".parse().unwrap(),
                "10.0.0.2:15008".parse().unwrap(),
            )
        }
    }

    #[test]
    fn a_connection_is_one_line_of_named_fields() {
        let line = logged(&record(), LogFormat::Text);
        let (_, rest) = line.split_once('\t').unwrap();
        assert_eq!(
            rest,
            "info\taccess\tconnection complete\t\
             src.addr=10.0.0.1:4000 src.workload=\"client\" src.namespace=\"shop\" \
             src.identity=\"spiffe://cluster.local/ns/shop/sa/client\" \
             dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 dst.service=\"server.shop.svc\" \
             dst.workload=\"server\" dst.namespace=\"shop\" \
             dst.identity=\"spiffe://cluster.local/ns/shop/sa/server\" direction=\"inbound\" \
             bytes_sent=175 bytes_recv=80 duration=\"1ms\" path=\"hbone\" not_direct=\"steered_remote\" \
             end=\"reset_by_peer\" connect_latency=\"300us\" rtt=\"120us\" retransmits=2 policy=\"shop/allow\"\n"
        );
    }

    #[test]
    fn a_short_circuit_is_told_where_somebody_asked_for_it() {
        let record = |word: &'static str, redirected| FlowRecord {
            short_circuit: Some(word.into()),
            redirected_sent: redirected,
            redirected_received: redirected,
            ..FlowRecord::default()
        };
        let yes = logged(&record("yes", Some(3)), LogFormat::Text);
        let told = " short_circuit=\"yes\" redirected_sent=3 redirected_recv=3\n";
        assert!(yes.ends_with(told), "{yes}");
        let blocking = logged(&record("blocking", None), LogFormat::Text);
        assert!(blocking.ends_with(" short_circuit=\"blocking\"\n"));
        let off = logged(&record("off", None), LogFormat::Text);
        assert!(off.ends_with(" path=\"plaintext\"\n"), "{off}");
    }

    #[test]
    fn json_has_the_same_fields() {
        let line: serde_json::Value =
            serde_json::from_str(&logged(&record(), LogFormat::Json)).unwrap();
        assert_eq!(line["scope"], "access");
        assert_eq!(line["src.addr"], "10.0.0.1:4000");
        assert_eq!(line["dst.hbone_addr"], "10.0.0.2:80");
        assert_eq!(line["bytes_recv"], 80);
        assert_eq!(line["retransmits"], 2);
        assert!(line.get("error").is_none());
    }

    #[test]
    fn a_failure_is_an_error_and_absent_values_are_left_out() {
        let failed = FlowRecord {
            error: Some("policy \"a/b\"\nrefused".to_owned()),
            ..FlowRecord::new(
                "10.0.0.1:4000".parse().unwrap(),
                "[fd00::2]:80".parse().unwrap(),
            )
        };
        let line = logged(&failed, LogFormat::Text);
        assert!(line.contains("\terror\taccess\t"));
        assert!(
            line.ends_with(" path=\"plaintext\" error=\"policy \\\"a/b\\\"\\nrefused\"\n"),
            "{line}"
        );
        assert!(line.contains("dst.addr=[fd00::2]:80"));
        assert!(!line.contains("workload") && !line.contains("rtt"));
    }
}
