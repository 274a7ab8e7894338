//! The agent's metrics. `reference` lists them, `traffic` holds the istio_tcp series, this file has the rest and the
//! exposition. Every other label has values from our own code only, so nothing from outside can make a series.

mod histogram;
pub mod reference;
mod traffic;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::record::{FlowEnd, FlowPath, FlowRecord};
use histogram::{Histogram, Reading};
pub use reference::metrics_reference;
use reference::{Kind, Metric};
pub use traffic::{OpenFlow, PairSeries};
use traffic::{Series, Traffic};

/// The media type of the exposition.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the kernel part counts, read at every scrape.
#[derive(Clone, Debug, Default)]
pub struct KernelCounters {
    /// What the hooks decided, each reason with its count since the maps were made.
    pub decisions: Vec<(&'static str, u64)>,
    /// Flow events that found no room in the ring buffer.
    pub lost_events: u64,
    /// Direct flows that are open.
    pub open_flows: u64,
    /// Pods whose sockets the kernel does not come to an end with.
    pub stuck_pods: u64,
    pub short_circuited: ShortCircuited,
}

/// What flows have carried that were entered into the short-circuit, since they were.
#[derive(Clone, Debug, Default)]
pub struct ShortCircuited {
    /// Flows that are open.
    pub open: u64,
    /// Bytes by their way.
    pub bytes: Vec<(&'static str, u64)>,
    /// Messages by what was done with them.
    pub messages: Vec<(&'static str, u64)>,
}

/// What revocation lists say and have done, read at every scrape.
#[derive(Clone, Debug, Default)]
pub struct RevocationCounters {
    /// Peers on a list, by where they were met.
    pub peers: Vec<(&'static str, u64)>,
    /// Changed files by what became of them.
    pub updates: Vec<(&'static str, u64)>,
    /// Lists in force.
    pub lists: u64,
    /// Certificates that they name.
    pub certificates: u64,
}

/// How fresh the mesh is, read at every scrape.
#[derive(Clone, Copy, Debug, Default)]
pub struct MeshFreshness {
    /// Whether there is a connection to the control plane; none where the mesh does not come from one.
    pub connected: Option<bool>,
    /// Since when what is in force is so; none before there is a mesh.
    pub changed_at: Option<SystemTime>,
}

type FreshnessSource = Box<dyn Fn() -> MeshFreshness + Send + Sync>;
type RevocationSource = Box<dyn Fn() -> RevocationCounters + Send + Sync>;
type KernelSource = Box<dyn Fn() -> KernelCounters + Send + Sync>;

/// Counts by a word of our own.
#[derive(Debug, Default)]
struct Tally(Mutex<BTreeMap<&'static str, u64>>);

impl Tally {
    fn with(&self, word: &'static str, change: impl FnOnce(u64) -> u64) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(word).or_default();
        *count = change(*count);
    }

    fn add(&self, word: &'static str, by: u64) {
        self.with(word, |count| count.saturating_add(by));
    }

    /// Makes no row of what has not happened.
    fn add_some(&self, word: &'static str, by: u64) {
        if by > 0 {
            self.add(word, by);
        }
    }

    fn rows(&self) -> Vec<(Vec<String>, u64)> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts
            .iter()
            .map(|(word, count)| (vec![(*word).to_owned()], *count))
            .collect()
    }
}

/// Counts by path, without a lock.
#[derive(Debug, Default)]
struct PathCounts([AtomicU64; FlowPath::ALL.len()]);

impl PathCounts {
    fn of(&self, path: FlowPath) -> Option<&AtomicU64> {
        self.0.get(path as usize)
    }

    fn add(&self, path: FlowPath, by: u64) {
        if let Some(count) = self.of(path) {
            count.fetch_add(by, Ordering::Relaxed);
        }
    }

    fn sub(&self, path: FlowPath, by: u64) {
        if let Some(count) = self.of(path) {
            count.fetch_sub(by, Ordering::Relaxed);
        }
    }

    fn read(&self) -> impl Iterator<Item = (FlowPath, u64)> {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        FlowPath::ALL.into_iter().zip(counts)
    }

    fn rows(&self) -> Vec<(Vec<String>, u64)> {
        let counted = self.read().filter(|(_, count)| *count > 0);
        counted
            .map(|(path, count)| (vec![path.as_str().to_owned()], count))
            .collect()
    }
}

/// Everything that is counted.
#[derive(Default)]
struct State {
    traffic: Traffic,
    flows: PathCounts,
    open_flows: PathCounts,
    revoked: PathCounts,
    retransmits: PathCounts,
    /// By the number of the end.
    ended: [PathCounts; FlowEnd::ALL.len()],
    connect: Histogram,
    rtt: Histogram,
    short_circuit: Tally,
    mesh_updates: Tally,
    xds_messages: Tally,
    xds_bytes: Tally,
    xds_terminations: Tally,
    active_pods: AtomicU64,
    pending_pods: AtomicU64,
    lost_log_lines: OnceLock<Arc<AtomicU64>>,
    kernel: OnceLock<KernelSource>,
    revocation: OnceLock<RevocationSource>,
    freshness: OnceLock<FreshnessSource>,
}

/// The metrics of this agent. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    state: Arc<State>,
    registry: Arc<Registry>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::over(State::default())
    }
}

impl Metrics {
    fn over(state: State) -> Self {
        let state = Arc::new(state);
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Exposition(state.clone())));
        Self {
            state,
            registry: Arc::new(registry),
        }
    }

    /// A connection was established.
    pub fn opened(&self, record: &FlowRecord) -> OpenFlow {
        OpenFlow::new(self.state.clone(), record)
    }

    /// A connection was refused or could not be established; the record's response flags say why.
    pub fn failed(&self, record: &FlowRecord) {
        self.state.traffic.failed(record);
    }

    /// An open connection was cut because policy came to forbid it.
    pub fn revoked(&self, path: FlowPath) {
        self.state.revoked.add(path, 1);
    }

    /// The series of direct flows between the parties of a record.
    pub fn pair(&self, record: &FlowRecord) -> PairSeries {
        PairSeries::new(self.state.clone(), record)
    }

    /// So many connections ended in this way, or never began.
    pub fn ended(&self, path: FlowPath, end: FlowEnd, count: u64) {
        if let Some(paths) = self.state.ended.get(end as usize) {
            paths.add(path, count);
        }
    }

    /// What the kernel measured of a direct flow.
    pub fn measured(&self, connect: Duration, rtt: Duration) {
        self.state.connect.observe(connect);
        self.state.rtt.observe(rtt);
    }

    /// Segments that were sent again.
    pub fn retransmits(&self, path: FlowPath, count: u64) {
        if count > 0 {
            self.state.retransmits.add(path, count);
        }
    }

    /// A direct flow was worth a short-circuit: what became of it.
    pub fn short_circuited(&self, outcome: &'static str) {
        self.state.short_circuit.add(outcome, 1);
    }

    /// The last pod of a workload is gone: its series go, once its connections have ended.
    pub fn forget_workload(&self, namespace: &str, workload_name: &str) {
        self.state.traffic.forget(namespace, workload_name);
    }

    /// A changed mesh was taken over, or rejected and the old one kept.
    pub fn mesh_update(&self, accepted: bool) {
        let result = if accepted { "accepted" } else { "rejected" };
        self.state.mesh_updates.add(result, 1);
    }

    /// So many messages of this resource type came from the control plane.
    pub fn xds_messages(&self, type_url: &'static str, count: u64) {
        self.state.xds_messages.add_some(type_url, count);
    }

    /// They had so many bytes.
    pub fn xds_bytes(&self, type_url: &'static str, count: u64) {
        self.state.xds_bytes.add_some(type_url, count);
    }

    /// So many connections to the control plane ended for this reason.
    pub fn xds_terminated(&self, reason: &'static str, count: u64) {
        self.state.xds_terminations.add_some(reason, count);
    }

    /// How many pods are served, and how many wait to be.
    pub fn pods(&self, active: usize, pending: usize) {
        self.state
            .active_pods
            .store(active as u64, Ordering::Relaxed);
        self.state
            .pending_pods
            .store(pending as u64, Ordering::Relaxed);
    }

    /// Where the kernel's counters are read; must not block. The first one stays.
    pub fn set_kernel_source(&self, read: impl Fn() -> KernelCounters + Send + Sync + 'static) {
        let _ = self.state.kernel.set(Box::new(read));
    }

    /// Where the revocation lists are looked at. Without that, there are none of their metrics.
    pub fn set_revocation_source(
        &self,
        read: impl Fn() -> RevocationCounters + Send + Sync + 'static,
    ) {
        let _ = self.state.revocation.set(Box::new(read));
    }

    /// Where it is known how fresh the mesh is.
    pub fn set_freshness_source(&self, read: impl Fn() -> MeshFreshness + Send + Sync + 'static) {
        let _ = self.state.freshness.set(Box::new(read));
    }

    /// Where the log counts its lost lines.
    pub fn set_lost_log_lines(&self, lost: Arc<AtomicU64>) {
        let _ = self.state.lost_log_lines.set(lost);
    }

    /// The exposition in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

struct Exposition(Arc<State>);

impl fmt::Debug for Exposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exposition")
    }
}

impl Collector for Exposition {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let state = &self.0;
        let series = state.traffic.snapshot();
        let kernel = state.kernel.get().map(|read| read()).unwrap_or_default();
        let traffic = |counter: fn(&Series) -> &AtomicU64| -> Vec<_> {
            let value = |series: &Series| counter(series).load(Ordering::Relaxed);
            series
                .iter()
                .map(|(labels, series)| (labels.clone(), value(series)))
                .filter(|(_, value)| *value > 0)
                .collect()
        };
        let words = |counts: Vec<(&str, u64)>| -> Vec<_> {
            let rows = counts.into_iter();
            rows.map(|(word, count)| (vec![word.to_owned()], count))
                .collect()
        };
        let single = |value: u64| vec![(Vec::new(), value)];
        let loaded = |value: &AtomicU64| single(value.load(Ordering::Relaxed));
        let open_flows = state.open_flows.read().map(|(path, count)| {
            let of_kernel = match path {
                FlowPath::Direct => kernel.open_flows,
                FlowPath::Hbone | FlowPath::Plaintext => 0,
            };
            (vec![path.as_str().to_owned()], count + of_kernel)
        });
        let open_flows = open_flows.collect();
        let ended = FlowEnd::ALL
            .iter()
            .zip(&state.ended)
            .flat_map(|(end, paths)| {
                let counted = paths.read().filter(|(_, count)| *count > 0);
                counted.map(|(path, count)| {
                    let labels = vec![path.as_str().to_owned(), end.as_str().to_owned()];
                    (labels, count)
                })
            });
        let ended = ended.collect();
        let build = vec!["culvert".to_owned(), env!("CARGO_PKG_VERSION").to_owned()];
        let mut put =
            |metric: &Metric, rows: Vec<(Vec<String>, u64)>| family(&mut encoder, metric, &rows);

        put(&reference::OPENED, traffic(|series| &series.opened))?;
        put(&reference::CLOSED, traffic(|series| &series.closed))?;
        put(&reference::FAILED, traffic(|series| &series.failed))?;
        put(&reference::SENT, traffic(|series| &series.sent))?;
        put(&reference::RECEIVED, traffic(|series| &series.received))?;
        put(&reference::BUILD, vec![(build, 1)])?;
        put(&reference::XDS_MESSAGES, state.xds_messages.rows())?;
        put(&reference::XDS_BYTES, state.xds_bytes.rows())?;
        put(&reference::XDS_TERMINATIONS, state.xds_terminations.rows())?;
        put(&reference::ACTIVE_PODS, loaded(&state.active_pods))?;
        put(&reference::PENDING_PODS, loaded(&state.pending_pods))?;
        put(&reference::FLOWS, state.flows.rows())?;
        put(&reference::OPEN_FLOWS, open_flows)?;
        put(&reference::ENDED, ended)?;
        put(&reference::RETRANSMITS, state.retransmits.rows())?;
        put(&reference::REVOKED, state.revoked.rows())?;
        if let Some(read) = state.revocation.get() {
            let revocation = read();
            put(&reference::REVOKED_PEERS, words(revocation.peers))?;
            put(&reference::CRL_UPDATES, words(revocation.updates))?;
            put(&reference::CRL_LISTS, single(revocation.lists))?;
            put(
                &reference::CRL_CERTIFICATES,
                single(revocation.certificates),
            )?;
        }
        put(&reference::SHORT_CIRCUIT, state.short_circuit.rows())?;
        let short = kernel.short_circuited;
        put(&reference::SHORT_OPEN, single(short.open))?;
        put(&reference::SHORT_BYTES, words(short.bytes))?;
        put(&reference::SHORT_MESSAGES, words(short.messages))?;
        put(&reference::STUCK_PODS, single(kernel.stuck_pods))?;
        put(&reference::DECISIONS, words(kernel.decisions))?;
        put(&reference::LOST_EVENTS, single(kernel.lost_events))?;
        put(&reference::MESH_UPDATES, state.mesh_updates.rows())?;
        if let Some(read) = state.freshness.get() {
            let MeshFreshness {
                connected,
                changed_at,
            } = read();
            let seconds = changed_at.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
            let connected = connected.map(u64::from);
            put(
                &reference::CONNECTED,
                connected.map_or_else(Vec::new, single),
            )?;
            let seconds = seconds.map(|at| at.as_secs());
            put(
                &reference::MESH_CHANGED,
                seconds.map_or_else(Vec::new, single),
            )?;
        }
        let lost = state.lost_log_lines.get();
        put(
            &reference::LOST_LOG_LINES,
            lost.map_or(single(0), |lost| loaded(lost)),
        )?;
        put(&reference::SERIES, single(state.traffic.len()))?;
        put(
            &reference::SERIES_OVERFLOW,
            single(state.traffic.overflowed()),
        )?;
        durations(&mut encoder, &reference::CONNECT, &state.connect.read())?;
        durations(&mut encoder, &reference::RTT, &state.rtt.read())
    }
}

/// Writes a histogram.
fn durations(
    encoder: &mut DescriptorEncoder<'_>,
    metric: &Metric,
    reading: &Reading,
) -> fmt::Result {
    let mut encoder =
        encoder.encode_descriptor(metric.name, metric.help, None, MetricType::Histogram)?;
    encoder.encode_histogram::<NoLabelSet>(reading.sum, reading.count, &reading.buckets, None)
}

/// Writes one metric with its rows of label values; the values come in the order of the metric's labels.
fn family(
    encoder: &mut DescriptorEncoder<'_>,
    metric: &Metric,
    rows: &[(Vec<String>, u64)],
) -> fmt::Result {
    if rows.is_empty() {
        return Ok(());
    }
    let kind = match metric.kind {
        Kind::Counter => MetricType::Counter,
        Kind::Gauge => MetricType::Gauge,
        Kind::Histogram => MetricType::Histogram,
    };
    let mut family = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
    for (values, value) in rows {
        let labels: Vec<(&str, &str)> = metric
            .labels
            .iter()
            .copied()
            .zip(values.iter().map(String::as_str))
            .collect();
        let mut sample = family.encode_family(&labels)?;
        match metric.kind {
            Kind::Counter => sample.encode_counter::<NoLabelSet, u64, u64>(value, None)?,
            Kind::Gauge | Kind::Histogram => sample.encode_gauge(value)?,
        }
    }
    Ok(())
}
