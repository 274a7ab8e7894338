//! The access log: one line per connection when it ends, target `access`, error level for failures. Field names and
//! their order are those of ztunnel, so that parsers made for it work; `path`, `rtt`, `retransmits` and `policy` are ours.

use std::time::Duration;

use tracing::Level;

use super::record::FlowRecord;

/// Logs one ended or refused connection.
pub fn log_connection(record: &FlowRecord) {
    macro_rules! line {
        ($level:expr) => {
            tracing::event!(
                target: "access",
                $level,
                src.addr = %record.source_addr,
                src.workload = record.source.name.as_deref(),
                src.namespace = record.source.namespace.as_deref(),
                src.identity = identity(&record.source).as_deref(),
                dst.addr = %record.destination_addr,
                dst.hbone_addr = record.hbone_addr.map(tracing::field::display),
                dst.service = record.service.as_ref().map(|service| service.hostname.as_str()),
                dst.workload = record.destination.name.as_deref(),
                dst.namespace = record.destination.namespace.as_deref(),
                dst.identity = identity(&record.destination).as_deref(),
                direction = record.direction.as_str(),
                bytes_sent = record.bytes_sent,
                bytes_recv = record.bytes_received,
                duration = format!("{}ms", record.duration.as_millis()).as_str(),
                path = record.path.as_str(),
                rtt = record.rtt.map(micros).as_deref(),
                retransmits = record.retransmits,
                policy = record.policy.as_deref(),
                error = record.error.as_deref(),
                "connection complete"
            )
        };
    }
    match record.error {
        None => line!(Level::INFO),
        Some(_) => line!(Level::ERROR),
    }
}

fn identity(party: &super::Party) -> Option<String> {
    party.identity.as_ref().map(ToString::to_string)
}

fn micros(rtt: Duration) -> String {
    format!("{}us", rtt.as_micros())
}

#[cfg(test)]
mod tests {
    use super::super::logging::{Kept, subscriber};
    use super::super::record::{Direction, FlowPath, Party, ServiceName};
    use super::*;
    use crate::config::{LogFilter, LogFormat};
    use crate::policy::Identity;
    use std::sync::Arc;

    fn logged(record: &FlowRecord, format: LogFormat) -> String {
        let kept = Kept::default();
        let filter = LogFilter::parse("info").unwrap();
        let subscriber = subscriber(&filter, format, kept.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || log_connection(record));
        let lines = kept.0.lock().unwrap();
        assert_eq!(lines.len(), 1);
        lines[0].clone()
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
            bytes_sent: 175,
            bytes_received: 80,
            duration: Duration::from_micros(1500),
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
             bytes_sent=175 bytes_recv=80 duration=\"1ms\" path=\"hbone\" rtt=\"120us\" retransmits=2 \
             policy=\"shop/allow\"\n"
        );
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
