//! The list of metrics: what `/metrics` exposes and docs/METRICS.md describes are both made from it. Names are for
//! ever: dashboards depend on them. Istio's names mean what they mean there; ours begin with `culvert_`.

use std::fmt::Write;

use super::super::record::FlowEnd;

/// What a metric counts like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises; exposed with `_total`.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Durations by size; exposed with `_bucket`, `_sum` and `_count`.
    Histogram,
}

/// One metric.
#[derive(Debug)]
pub struct Metric {
    /// Name, without a counter's `_total`.
    pub name: &'static str,
    /// Kind.
    pub kind: Kind,
    /// Labels, in order.
    pub labels: &'static [&'static str],
    /// What it says, as a sentence.
    pub help: &'static str,
}

impl Metric {
    /// The name as exposed.
    pub fn exposed_name(&self) -> String {
        match self.kind {
            Kind::Counter => format!("{}_total", self.name),
            Kind::Gauge | Kind::Histogram => self.name.to_owned(),
        }
    }
}

/// The labels of Istio's TCP metrics. A value that is not known is `unknown`.
pub const TRAFFIC_LABELS: &[&str] = &[
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
];

macro_rules! metrics {
    ($($id:ident = $kind:ident $name:literal $labels:expr, $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Metric = Metric { name: $name, kind: Kind::$kind, labels: $labels, help: $help };
        )*
        /// Every metric, in the order of the documentation.
        pub const ALL: &[&Metric] = &[$(&$id),*];
    };
}

metrics! {
    OPENED = Counter "istio_tcp_connections_opened" TRAFFIC_LABELS, "Connections established.";
    CLOSED = Counter "istio_tcp_connections_closed" TRAFFIC_LABELS, "Established connections that ended.";
    FAILED = Counter "istio_tcp_connections_failed" TRAFFIC_LABELS, "Connections refused or never established; `response_flags` says why.";
    SENT = Counter "istio_tcp_sent_bytes" TRAFFIC_LABELS, "Bytes from server to client (sent during response), counted while connections are open.";
    RECEIVED = Counter "istio_tcp_received_bytes" TRAFFIC_LABELS, "Bytes from client to server (received during request), counted while connections are open.";
    BUILD = Gauge "istio_build" &["component", "tag"], "Always 1; the labels name this build.";
    XDS_MESSAGES = Counter "istio_xds_message" &["url"], "Messages received from istiod, by resource type.";
    XDS_BYTES = Counter "istio_xds_message_bytes" &["url"], "Bytes of those messages.";
    XDS_TERMINATIONS = Counter "istio_xds_connection_terminations" &["reason"], "Ends of the connection to istiod.";
    ACTIVE_PODS = Gauge "workload_manager_active_proxy_count" &[], "Pods that are served.";
    PENDING_PODS = Gauge "workload_manager_pending_proxy_count" &[], "Pods whose enrolment is not complete.";
    FLOWS = Counter "culvert_flows" &["path"], "Connections established, by the way their bytes take.";
    OPEN_FLOWS = Gauge "culvert_open_flows" &["path"], "Connections open now, by the way their bytes take.";
    ENDED = Counter "culvert_flows_ended" &["path", "end"], "Connections that ended, or were refused or never established, by the way their bytes took and how they ended; the ends are below.";
    RETRANSMITS = Counter "culvert_flow_retransmits" &["path"], "Segments that clients of direct connections sent again, counted when connections end.";
    CONNECT = Histogram "culvert_flow_connect_seconds" &[], "Direct connections by the time from SYN to establishment, as the kernel measured it, counted when they end.";
    RTT = Histogram "culvert_flow_rtt_seconds" &[], "Direct connections by their smoothed round-trip time when they ended.";
    REVOKED = Counter "culvert_revoked_flows" &["path"], "Open connections cut because policy came to forbid them, or because the certificate at the other end of their tunnel was revoked.";
    REVOKED_PEERS = Counter "culvert_revoked_peers" &["at"], "Peers met whose certificate is on a revocation list: refused in a `handshake`, or the `tunnel` closed that was open.";
    CRL_UPDATES = Counter "culvert_crl_updates" &["result"], "Attempts to take over a changed file of revocation lists; `rejected` ones left the old lists in force.";
    CRL_LISTS = Gauge "culvert_crl_lists" &[], "Revocation lists in force.";
    CRL_CERTIFICATES = Gauge "culvert_crl_revoked_certificates" &[], "Certificates that they name.";
    SHORT_CIRCUIT = Counter "culvert_short_circuited_flows" &["outcome"], "Direct flows that were worth a short-circuit: `entered`, or why it was not to be.";
    SHORT_OPEN = Gauge "culvert_short_circuited_flows_open" &[], "Direct flows open now whose sockets have been entered into the short-circuit.";
    SHORT_BYTES = Counter "culvert_short_circuited_bytes" &["way"], "Bytes that direct flows have sent since they were entered into the short-circuit, counted while they are open: `redirected`, or by `tcp` after all. Since the maps of the kernel part were made, whichever agent was there.";
    SHORT_MESSAGES = Counter "culvert_short_circuited_messages" &["outcome"], "The same in messages (what a system call sends at once): `redirected`, or why they went by TCP; the reasons are below.";
    STUCK_PODS = Gauge "culvert_stuck_pods" &[], "Pods one of whose sockets is kept busy by a process, so that the kernel can neither look at their sockets nor destroy them; connections that policy forbids are cut at their other end meanwhile.";
    DECISIONS = Counter "culvert_kernel_decisions" &["reason"], "What the hooks of the kernel part decided, by reason; the reasons are below.";
    LOST_EVENTS = Counter "culvert_flow_events_lost" &[], "Flow events that the kernel could not hand over; their connections are missing from the log; their bytes and numbers are in the metrics all the same.";
    MESH_UPDATES = Counter "culvert_mesh_updates" &["result"], "Attempts to take over a changed mesh; `rejected` ones left the old state.";
    CONNECTED = Gauge "culvert_control_plane_connected" &[], "1 while there is a connection to the control plane, 0 while there is none and the mesh stays as it was; absent where the mesh comes from a file.";
    MESH_CHANGED = Gauge "culvert_mesh_changed_timestamp_seconds" &[], "When what is in force of the mesh came into force, in seconds since 1970; absent before.";
    LOST_LOG_LINES = Counter "culvert_log_lines_lost" &[], "Log lines dropped because the log is not read fast enough.";
    SERIES = Gauge "culvert_traffic_series" &[], "Label sets held for the istio_tcp metrics.";
    SERIES_OVERFLOW = Counter "culvert_traffic_series_overflow" &[], "Connections counted under the labels `overflow`, because there are too many label sets.";
}

/// The content of docs/METRICS.md.
pub fn metrics_reference() -> String {
    let mut out = String::from(
        "# Metrics\n\n\
         Served at `:15020/metrics` and `:15020/stats/prometheus` in the OpenMetrics text format.\n\
         This page is generated from `userspace/src/telemetry/metrics/reference.rs`; after a change there, run\n\
         `UPDATE_DOCS=1 cargo test -p culvert metrics_page`.\n\n\
         | metric | type | labels | meaning |\n| --- | --- | --- | --- |\n",
    );
    for metric in ALL {
        let kind = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let labels = match metric.labels {
            [] => "none".to_owned(),
            TRAFFIC_LABELS => "traffic labels, below".to_owned(),
            labels => format!("`{}`", labels.join("`, `")),
        };
        let name = metric.exposed_name();
        let _ = writeln!(out, "| `{name}` | {kind} | {labels} | {} |", metric.help);
    }
    let _ = write!(
        out,
        "\n## Traffic labels\n\n`{}`.\n\n\
         A value that is not known is `unknown`. Both reporters count the same way, as in Istio: \"sent\" is what the server sent to\n\
         the client, \"received\" what the client sent to the server. `connection_security_policy` is `mutual_tls` where both identities were verified: by\n\
         TLS, or by the kernel for a connection between pods of one node, which is not encrypted.\n\n\
         Series of workloads that are gone are dropped once their last connection has ended. There are at most\n\
         {} label sets; connections beyond that are counted with every workload label set to `overflow`.\n",
        TRAFFIC_LABELS.join("`, `"),
        super::traffic::MAX_SERIES,
    );
    out.push_str(
        "\n## Ends of `culvert_flows_ended_total`\n\nThe access log and `culvert flows` use the same words.\n\n\
         | end | meaning |\n| --- | --- |\n",
    );
    for end in FlowEnd::ALL {
        let _ = writeln!(out, "| `{}` | {} |", end.as_str(), end.describe().trim());
    }
    out.push_str(
        "\n## Outcomes of `culvert_short_circuited_messages_total`\n\nWhatever is sent by TCP, the next message may be redirected again.\n\n\
         | outcome | meaning |\n| --- | --- |\n| `redirected` | It went straight into the peer's receive queue. |\n",
    );
    for (name, meaning) in culvert_abi::kept::ALL {
        let _ = writeln!(out, "| `{name}` | {} |", meaning.trim());
    }
    out.push_str(
        "\n## Reasons of `culvert_kernel_decisions_total`\n\n| reason | meaning |\n| --- | --- |\n",
    );
    for reason in culvert_abi::Reason::ALL {
        let _ = writeln!(
            out,
            "| `{}` | {} |",
            reason.name(),
            reason.describe().trim()
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_page_is_current() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/METRICS.md");
        let reference = metrics_reference();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(page, &reference).unwrap();
        }
        let written = std::fs::read_to_string(page).unwrap_or_default();
        let mend = "UPDATE_DOCS=1 cargo test -p culvert metrics_page";
        assert!(
            written == reference,
            "docs/METRICS.md is out of date: run `{mend}`"
        );
    }

    #[test]
    fn names_are_unique_and_ours_have_the_prefix() {
        let mut names: Vec<_> = ALL.iter().map(|metric| metric.name).collect();
        for name in &names {
            let istio = name.starts_with("istio_") || name.starts_with("workload_manager_");
            assert!(istio || name.starts_with("culvert_"), "{name}");
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
