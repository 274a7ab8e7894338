//! Answers of the agent for people: tables and lines. Pure. Names come from the cluster, so nothing that a terminal
//! would obey is passed on.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;

use crate::admin::{PodInfo, PodState, ShortCircuitStatus, Status};
use crate::telemetry::{FlowEvent, FlowRecord, Party};

/// Text without control characters.
pub(super) fn clean(text: &str) -> String {
    text.chars()
        .flat_map(
            |c| match c.is_control() || ('\u{2028}'..='\u{202e}').contains(&c) {
                true => c
                    .escape_unicode()
                    .collect::<String>()
                    .chars()
                    .collect::<Vec<_>>(),
                false => vec![c],
            },
        )
        .collect()
}

/// Columns as wide as their widest cell.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or_default();
    let widths: Vec<usize> = (0..count)
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or_default()
        })
        .collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// `culvert pod list`.
pub(super) fn pods(pods: &[PodInfo]) -> String {
    if pods.is_empty() {
        return "no pods are enrolled; add one with `culvert pod add --netns PATH --uid UID`\n"
            .to_owned();
    }
    let header = [
        "UID",
        "NAMESPACE",
        "NAME",
        "STATE",
        "ADDRESSES",
        "IDENTITY",
        "REASON",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(pods.iter().map(|pod| {
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        let state = match pod.state {
            PodState::Pending => "pending",
            PodState::Active => "active",
            PodState::Draining => "draining",
        };
        let cell = |text: &str| match text {
            "" => "-".to_owned(),
            text => clean(text),
        };
        vec![
            cell(&pod.uid),
            cell(&pod.namespace),
            cell(&pod.name),
            state.to_owned(),
            cell(&addresses.join(",")),
            cell(pod.identity.as_deref().unwrap_or_default()),
            clean(pod.reason.as_deref().unwrap_or_default()),
        ]
    }));
    columns(&rows)
}

/// `culvert status`.
pub(super) fn status(status: &Status) -> String {
    let ready = match status.pending.as_slice() {
        [] => "yes".to_owned(),
        pending => format!("no, waiting for {}", pending.join(", ")),
    };
    let up = Duration::from_secs(status.uptime_seconds);
    let row = |name: &str, value: String| vec![name.to_owned(), clean(&value)];
    let mut rows = vec![
        row(
            "agent",
            format!(
                "version {}, pid {}, up {}",
                status.version,
                status.pid,
                span(up)
            ),
        ),
        row("node", status.node.clone()),
        row("ready", ready),
        row("pods", status.pods.to_string()),
        row(
            "mesh",
            format!(
                "{} workloads, {} services, {} policies; {}",
                status.workloads, status.services, status.policies, status.mesh
            ),
        ),
    ];
    let annotations = status.annotations.iter();
    rows.extend(annotations.map(|said| row("annotations", said.clone())));
    rows.extend(
        status
            .revocation_lists
            .as_ref()
            .map(|lists| row("revocation lists", lists.clone())),
    );
    rows.extend(
        status
            .short_circuit
            .as_ref()
            .map(|short| row("short-circuit", short_circuit(short))),
    );
    rows.extend(
        status
            .certificates
            .iter()
            .map(|held| row("certificate", held.clone())),
    );
    rows.extend(
        status
            .warnings
            .iter()
            .map(|warning| row("warning", warning.clone())),
    );
    columns(&rows)
}

fn short_circuit(status: &ShortCircuitStatus) -> String {
    if let Some(reason) = &status.reason {
        return format!("off everywhere on this kernel: {reason}");
    }
    let auto = if status.auto { "on" } else { "off" };
    let mut text = format!(
        "{} of {} open direct flows; on this kernel `auto` means {auto}",
        status.flows, status.direct_flows
    );
    if status.unfit_pods > 0 {
        let _ = write!(
            text,
            "; never for {} pods, by how they read",
            status.unfit_pods
        );
    }
    text
}

/// The head of `culvert flows`.
pub(super) const FLOWS_HEADER: &str =
    "TIME          EVENT   PATH       SOURCE -> DESTINATION  SENT/RECEIVED  DURATION\n";

/// One line of `culvert flows`.
pub(super) fn flow(event: &FlowEvent) -> String {
    let (time_ms, word, flow) = match event {
        FlowEvent::Opened { time_ms, flow } => (*time_ms, "open", flow),
        FlowEvent::Report { time_ms, flow } => (*time_ms, "report", flow),
        FlowEvent::Closed { time_ms, flow } if flow.error.is_some() => (*time_ms, "failed", flow),
        FlowEvent::Closed { time_ms, flow } => (*time_ms, "closed", flow),
    };
    let destination = flow.hbone_addr.unwrap_or(flow.destination_addr);
    let mut line = format!(
        "{}  {word:<6}  {:<9}  {} -> {}",
        clock(time_ms),
        flow.path.as_str(),
        party(&flow.source, flow.source_addr),
        party(&flow.destination, destination),
    );
    if word != "open" {
        let _ = write!(
            line,
            "  {}/{}  {}",
            flow.bytes_sent,
            flow.bytes_received,
            span(flow.duration)
        );
    }
    let _ = write!(line, "{}", notes(flow));
    line.push('\n');
    line
}

fn party(party: &Party, address: std::net::SocketAddr) -> String {
    match (&party.namespace, &party.name) {
        (Some(namespace), Some(name)) => format!("{}/{}({address})", clean(namespace), clean(name)),
        _ => address.to_string(),
    }
}

fn notes(flow: &FlowRecord) -> String {
    let end = flow.end.map(|end| format!("  end={}", end.as_str()));
    let reason = flow
        .not_direct
        .map(|reason| format!("  not_direct={}", reason.name()));
    let connect = flow
        .connect_latency
        .map(|latency| format!("  connect={}", span(latency)));
    let rtt = flow.rtt.map(|rtt| format!("  rtt={}", span(rtt)));
    let retransmits = flow
        .retransmits
        .map(|count| format!("  retransmits={count}"));
    let service = flow
        .service
        .as_ref()
        .map(|service| format!("  service={}", clean(&service.hostname)));
    let short_circuit = flow.short_circuit_word().map(|word| {
        let redirected = flow.redirected_sent.zip(flow.redirected_received);
        let bytes = redirected.map(|(sent, received)| format!("  redirected={sent}/{received}"));
        format!(
            "  short_circuit={}{}",
            clean(word),
            bytes.unwrap_or_default()
        )
    });
    let policy = flow
        .policy
        .as_ref()
        .map(|policy| format!("  policy={}", clean(policy)));
    let error = flow
        .error
        .as_ref()
        .map(|error| format!("  error={}", clean(error)));
    [
        end,
        reason,
        connect,
        rtt,
        retransmits,
        short_circuit,
        service,
        policy,
        error,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The time of day in UTC.
fn clock(time_ms: u64) -> String {
    // Within what the calendar takes: a hostile value is no reason to panic.
    let since = Duration::from_millis(time_ms.min(4_102_444_800_000));
    let t = OffsetDateTime::from(SystemTime::UNIX_EPOCH + since);
    format!(
        "{:02}:{:02}:{:02}.{:03}",
        t.hour(),
        t.minute(),
        t.second(),
        t.millisecond()
    )
}

/// A duration in the unit that suits it.
fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 if duration < Duration::from_millis(1) => format!("{}us", duration.as_micros()),
        0..10 => format!("{}ms", duration.as_millis()),
        10..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
