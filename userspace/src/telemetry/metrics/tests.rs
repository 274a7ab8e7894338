//! What the metrics promise, over the text that is scraped.

use std::collections::BTreeSet;

use super::super::record::{
    FlowEnd, FlowPath, Party, Reporter, ResponseFlags, Security, ServiceName,
};
use super::*;
use crate::policy::Identity;

fn party(namespace: &str, workload: &str) -> Arc<Party> {
    Arc::new(Party {
        workload_name: Some(workload.to_owned()),
        namespace: Some(namespace.to_owned()),
        identity: Some(Identity::parse("spiffe://cluster.local/ns/a/sa/b").unwrap()),
        ..Party::default()
    })
}

fn record(source: &str, destination: &str) -> FlowRecord {
    FlowRecord {
        source: party("shop", source),
        destination: party("shop", destination),
        service: Some(Arc::new(ServiceName {
            hostname: "db.shop.svc".to_owned(),
            name: "db".to_owned(),
            namespace: "shop".to_owned(),
        })),
        reporter: Reporter::Source,
        path: FlowPath::Hbone,
        security: Security::MutualTls,
        ..FlowRecord::default()
    }
}

/// The value of the only sample that starts with `name` and has all of `parts`.
fn sample(metrics: &Metrics, name: &str, parts: &[&str]) -> Option<u64> {
    let text = metrics.render();
    let mut found = text.lines().filter(|line| {
        let named = line.starts_with(&format!("{name} ")) || line.starts_with(&format!("{name}{{"));
        named && parts.iter().all(|part| line.contains(part))
    });
    let value = found.next()?.rsplit(' ').next()?.parse().ok();
    assert_eq!(found.next(), None, "ambiguous: {name} {parts:?}");
    value
}

#[test]
fn a_connection_is_counted_open_and_closed_with_all_labels() {
    let metrics = Metrics::default();
    let open = metrics.opened(&record("web", "db"));
    let path = ["path=\"hbone\""];
    assert_eq!(sample(&metrics, "culvert_open_flows", &path), Some(1));
    open.close(&FlowRecord {
        bytes_sent: 10,
        bytes_received: 20,
        ..record("web", "db")
    });
    let labels = "{reporter=\"source\",source_workload=\"web\",source_canonical_service=\"unknown\",\
        source_canonical_revision=\"unknown\",source_workload_namespace=\"shop\",\
        source_principal=\"spiffe://cluster.local/ns/a/sa/b\",source_app=\"unknown\",source_version=\"unknown\",\
        source_cluster=\"unknown\",destination_service=\"db.shop.svc\",destination_service_namespace=\"shop\",\
        destination_service_name=\"db\",destination_workload=\"db\",destination_canonical_service=\"unknown\",\
        destination_canonical_revision=\"unknown\",destination_workload_namespace=\"shop\",\
        destination_principal=\"spiffe://cluster.local/ns/a/sa/b\",destination_app=\"unknown\",\
        destination_version=\"unknown\",destination_cluster=\"unknown\",request_protocol=\"tcp\",\
        response_flags=\"-\",connection_security_policy=\"mutual_tls\"} ";
    let text = metrics.render();
    for (name, value) in [
        ("istio_tcp_connections_opened_total", 1),
        ("istio_tcp_connections_closed_total", 1),
        ("istio_tcp_sent_bytes_total", 10),
        ("istio_tcp_received_bytes_total", 20),
    ] {
        let line = format!("{name}{labels}{value}\n");
        assert!(text.contains(&line), "no {line} in {text}");
    }
    assert_eq!(sample(&metrics, "culvert_open_flows", &path), Some(0));
    assert_eq!(sample(&metrics, "culvert_flows_total", &[]), Some(1));
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn bytes_of_open_connections_are_counted_once_while_they_are_open() {
    let metrics = Metrics::default();
    let reported = metrics.opened(&record("web", "db"));
    reported.report(5, 0);
    reported.report(7, 1);
    reported.report(6, 0);
    let sent = |metrics: &Metrics| sample(metrics, "istio_tcp_sent_bytes_total", &[]);
    assert_eq!(sent(&metrics), Some(7));
    let followed = metrics.opened(&record("web", "db"));
    let bytes = Arc::new(AtomicU64::new(100));
    let source = bytes.clone();
    followed.follow(move || (source.load(Ordering::Relaxed), 0));
    assert_eq!(sent(&metrics), Some(107));
    bytes.store(150, Ordering::Relaxed);
    assert_eq!(sent(&metrics), Some(157));
    bytes.store(160, Ordering::Relaxed);
    drop(followed);
    reported.close(&FlowRecord {
        bytes_sent: 8,
        ..record("web", "db")
    });
    assert_eq!(sent(&metrics), Some(168));
    assert_eq!(
        sample(&metrics, "istio_tcp_connections_closed_total", &[]),
        Some(2)
    );
}

#[test]
fn a_refusal_counts_as_failed_with_its_reason_and_nothing_else() {
    let metrics = Metrics::default();
    metrics.failed(&FlowRecord {
        response_flags: ResponseFlags::Deny,
        ..record("intruder", "db")
    });
    let parts = ["response_flags=\"DENY\"", "source_workload=\"intruder\""];
    assert_eq!(
        sample(&metrics, "istio_tcp_connections_failed_total", &parts),
        Some(1)
    );
    assert!(!metrics.render().contains("opened_total{"));
}

#[test]
fn a_revoked_connection_closes_under_its_reason() {
    let metrics = Metrics::default();
    metrics.opened(&record("web", "db")).close(&FlowRecord {
        response_flags: ResponseFlags::Deny,
        ..record("web", "db")
    });
    metrics.revoked(FlowPath::Direct);
    let denied = ["response_flags=\"DENY\""];
    assert_eq!(
        sample(&metrics, "istio_tcp_connections_closed_total", &denied),
        Some(1)
    );
    assert_eq!(
        sample(&metrics, "culvert_revoked_flows_total", &["direct"]),
        Some(1)
    );
}

#[test]
fn series_of_a_workload_that_is_gone_are_dropped_after_its_last_connection() {
    let metrics = Metrics::default();
    metrics
        .opened(&record("web", "db"))
        .close(&record("web", "db"));
    let open = metrics.opened(&record("old", "db"));
    metrics.failed(&FlowRecord {
        response_flags: ResponseFlags::Connect,
        ..record("db", "old")
    });
    metrics.forget_workload("shop", "old");
    assert_eq!(metrics.state.traffic.len(), 2);
    open.report(3, 0);
    assert_eq!(
        sample(&metrics, "istio_tcp_sent_bytes_total", &["\"old\""]),
        Some(3)
    );
    drop(open);
    assert!(!metrics.render().contains("\"old\""));
    assert!(metrics.render().contains("\"web\""));
    metrics.forget_workload("other", "web");
    assert_eq!(metrics.state.traffic.len(), 1);
}

#[test]
fn the_number_of_series_is_bounded_and_no_connection_goes_uncounted() {
    let metrics = Metrics::over(State {
        traffic: Traffic::with_max(3),
        ..State::default()
    });
    for n in 0..50 {
        metrics.failed(&record(&format!("w{n}"), "db"));
    }
    assert_eq!(metrics.state.traffic.len(), 4);
    assert_eq!(
        sample(&metrics, "culvert_traffic_series_overflow_total", &[]),
        Some(47)
    );
    let overflow = ["source_workload=\"overflow\""];
    assert_eq!(
        sample(&metrics, "istio_tcp_connections_failed_total", &overflow),
        Some(47)
    );
}

#[test]
fn a_hostile_label_stays_inside_its_quotes() {
    let metrics = Metrics::default();
    metrics.failed(&record("a\"} 1\nfake_metric 1\\", "db"));
    let text = metrics.render();
    assert!(!text.lines().any(|line| line.starts_with("fake_metric")));
    assert!(text.contains("source_workload=\"a\\\"} 1\\nfake_metric 1\\\\\""));
}

#[test]
fn what_is_exposed_is_what_is_listed() {
    let metrics = Metrics::default();
    metrics.failed(&record("a", "b"));
    let open = metrics.opened(&record("a", "b"));
    open.report(1, 1);
    metrics.opened(&record("a", "b")).close(&record("a", "b"));
    metrics.revoked(FlowPath::Hbone);
    metrics.mesh_update(false);
    metrics.xds_messages("type", 1);
    metrics.xds_bytes("type", 1);
    metrics.xds_terminated("error", 1);
    metrics.pods(1, 0);
    metrics.set_kernel_source(|| KernelCounters {
        decisions: vec![("no_claim", 3)],
        lost_events: 2,
        open_flows: 1,
        stuck_pods: 0,
        short_circuited: ShortCircuited {
            open: 1,
            bytes: vec![("redirected", 7)],
            messages: vec![("unread", 2)],
        },
    });
    metrics.set_revocation_source(|| RevocationCounters {
        peers: vec![("handshake", 1)],
        updates: vec![("accepted", 1)],
        lists: 1,
        certificates: 2,
    });
    metrics.set_freshness_source(|| MeshFreshness {
        connected: Some(true),
        changed_at: Some(UNIX_EPOCH),
    });
    metrics.ended(FlowPath::Direct, FlowEnd::Fin, 1);
    metrics.retransmits(FlowPath::Direct, 1);
    metrics.short_circuited("entered");
    let text = metrics.render();
    let exposed: BTreeSet<String> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next().map(str::to_owned))
        .collect();
    let listed: BTreeSet<String> = reference::ALL
        .iter()
        .flat_map(|metric| match metric.kind {
            Kind::Histogram => ["bucket", "sum", "count"]
                .map(|part| format!("{}_{part}", metric.name))
                .to_vec(),
            Kind::Counter | Kind::Gauge => vec![metric.exposed_name()],
        })
        .collect();
    assert_eq!(exposed, listed);
    for metric in reference::ALL {
        let name = metric.exposed_name();
        let line = text.lines().find(|line| line.starts_with(&name)).unwrap();
        for label in metric.labels {
            assert!(line.contains(&format!("{label}=\"")), "{label} in {line}");
        }
    }
    assert_eq!(
        sample(&metrics, "culvert_kernel_decisions_total", &["no_claim"]),
        Some(3)
    );
}

#[test]
fn a_direct_connection_is_one_flow_though_both_ends_report_it() {
    let metrics = Metrics::default();
    metrics.set_kernel_source(|| KernelCounters {
        open_flows: 4,
        ..KernelCounters::default()
    });
    let pair = metrics.pair(&record("web", "db"));
    pair.opened(2);
    pair.bytes(5, 6);
    pair.closed(ResponseFlags::None, 1);
    pair.closed(ResponseFlags::Deny, 1);
    pair.failed(1);
    assert_eq!(sample(&metrics, "culvert_flows_total", &[]), Some(2));
    let direct = ["path=\"direct\""];
    assert_eq!(sample(&metrics, "culvert_open_flows", &direct), Some(4));
    for reporter in ["reporter=\"source\"", "reporter=\"destination\""] {
        let denied = [reporter, "response_flags=\"DENY\""];
        let well = [reporter, "response_flags=\"-\""];
        let closed = "istio_tcp_connections_closed_total";
        assert_eq!(sample(&metrics, closed, &denied), Some(1));
        assert_eq!(sample(&metrics, closed, &well), Some(1));
        let sent = "istio_tcp_sent_bytes_total";
        assert_eq!(sample(&metrics, sent, &well), Some(5));
    }
    let failed = "istio_tcp_connections_failed_total";
    assert_eq!(sample(&metrics, failed, &["reporter=\"source\""]), Some(1));
    assert_eq!(
        sample(&metrics, failed, &["reporter=\"destination\""]),
        None
    );
}

#[test]
fn the_series_of_a_pair_stay_while_the_pair_is_held() {
    let metrics = Metrics::default();
    let pair = metrics.pair(&record("old", "db"));
    metrics.forget_workload("shop", "old");
    pair.opened(1);
    assert!(metrics.render().contains("\"old\""));
    drop(pair);
    assert!(!metrics.render().contains("\"old\""));
}

#[test]
fn durations_are_exposed_as_cumulative_buckets() {
    let metrics = Metrics::default();
    for micros in [30, 40, 300] {
        metrics.measured(Duration::from_micros(micros), Duration::ZERO);
    }
    let name = "culvert_flow_connect_seconds";
    for (bound, count) in [("0.000025", 0), ("0.00005", 2), ("0.0005", 3), ("+Inf", 3)] {
        let le = format!("le=\"{bound}\"");
        let bucket = format!("{name}_bucket");
        assert_eq!(
            sample(&metrics, &bucket, &[&le]),
            Some(count),
            "{}",
            metrics.render()
        );
    }
    assert_eq!(sample(&metrics, &format!("{name}_count"), &[]), Some(3));
}
