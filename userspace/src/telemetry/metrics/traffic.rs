//! The series behind the istio_tcp metrics. Invariants: at most `MAX_SERIES` label sets; a workload that was forgotten
//! keeps its series only while it has open connections; bytes of a connection are counted once, while it is open.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::super::record::{
    FlowPath, FlowRecord, Party, Reporter, ResponseFlags, Security, ServiceName,
};

/// Label sets at most: with 23 labels and five metrics each, 10,000 are some 30 MB a scrape.
pub const MAX_SERIES: usize = 10_000;

/// A label set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    reporter: Reporter,
    source: Arc<Party>,
    destination: Arc<Party>,
    service: Option<Arc<ServiceName>>,
    response_flags: ResponseFlags,
    security: Security,
}

impl Key {
    fn of(record: &FlowRecord, response_flags: ResponseFlags) -> Self {
        Self {
            reporter: record.reporter,
            source: record.source.clone(),
            destination: record.destination.clone(),
            service: record.service.clone(),
            response_flags,
            security: record.security,
        }
    }

    /// Where connections are counted for which there is no room.
    fn overflow(&self) -> Self {
        let party = Arc::new(Party {
            workload_name: Some("overflow".to_owned()),
            namespace: Some("overflow".to_owned()),
            ..Party::default()
        });
        Self {
            source: party.clone(),
            destination: party,
            service: None,
            ..self.clone()
        }
    }

    fn names(&self, namespace: &str, workload: &str) -> bool {
        [&self.source, &self.destination].into_iter().any(|party| {
            party.namespace.as_deref() == Some(namespace)
                && party.workload_name.as_deref() == Some(workload)
        })
    }

    /// Values in the order of `TRAFFIC_LABELS`.
    fn labels(&self) -> Vec<String> {
        let mut values = vec![self.reporter.as_str().to_owned()];
        values.extend(party_labels(&self.source));
        let service = self.service.as_deref();
        let known = |text: Option<&String>| known(text.filter(|text| !text.is_empty()));
        values.push(known(service.map(|service| &service.hostname)));
        values.push(known(service.map(|service| &service.namespace)));
        values.push(known(service.map(|service| &service.name)));
        values.extend(party_labels(&self.destination));
        values.push("tcp".to_owned());
        values.push(self.response_flags.as_str().to_owned());
        values.push(self.security.as_str().to_owned());
        values
    }
}

fn party_labels(party: &Party) -> [String; 8] {
    [
        known(party.workload_name.as_ref()),
        known(party.canonical_service.as_ref()),
        known(party.canonical_revision.as_ref()),
        known(party.namespace.as_ref()),
        known(party.identity.as_ref().map(ToString::to_string).as_ref()),
        known(party.app.as_ref()),
        known(party.version.as_ref()),
        known(party.cluster.as_ref()),
    ]
}

fn known(value: Option<&String>) -> String {
    value.map_or_else(|| "unknown".to_owned(), String::clone)
}

/// The counters of one label set.
#[derive(Debug, Default)]
pub(super) struct Series {
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    pub failed: AtomicU64,
    pub sent: AtomicU64,
    pub received: AtomicU64,
    open: AtomicU64,
    forgotten: AtomicBool,
}

/// Gives the totals of a connection's bytes so far: sent, received.
type Sampler = Box<dyn Fn() -> (u64, u64) + Send + Sync>;

/// An open connection's part in its series.
struct Live {
    key: Key,
    series: Arc<Series>,
    sent: AtomicU64,
    received: AtomicU64,
    sampler: OnceLock<Sampler>,
}

impl Live {
    /// Totals only rise; a smaller one, come late, adds nothing.
    fn report(&self, sent: u64, received: u64) {
        for (last, total, series) in [
            (&self.sent, sent, &self.series.sent),
            (&self.received, received, &self.series.received),
        ] {
            let before = last.fetch_max(total, Ordering::Relaxed);
            series.fetch_add(total.saturating_sub(before), Ordering::Relaxed);
        }
    }

    fn sample(&self) {
        if let Some(sampler) = self.sampler.get() {
            let (sent, received) = sampler();
            self.report(sent, received);
        }
    }
}

/// All series and all open connections.
#[derive(Default)]
pub(super) struct Traffic {
    series: Mutex<HashMap<Key, Arc<Series>>>,
    live: Mutex<HashMap<u64, Arc<Live>>>,
    next: AtomicU64,
    overflowed: AtomicU64,
    max: Option<usize>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Traffic {
    #[cfg(test)]
    pub fn with_max(max: usize) -> Self {
        Self {
            max: Some(max),
            ..Self::default()
        }
    }

    /// The series of a label set, with one more connection open in it if `open`.
    fn series(&self, key: Key, open: bool) -> (Key, Arc<Series>) {
        let mut all = locked(&self.series);
        let room = all.len() < self.max.unwrap_or(MAX_SERIES);
        let key = if room || all.contains_key(&key) {
            key
        } else {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            key.overflow()
        };
        let series = all.entry(key.clone()).or_default().clone();
        if open {
            series.open.fetch_add(1, Ordering::Relaxed);
            series.forgotten.store(false, Ordering::Relaxed);
        }
        (key, series)
    }

    pub fn failed(&self, record: &FlowRecord) {
        let (_, series) = self.series(Key::of(record, record.response_flags), false);
        series.failed.fetch_add(1, Ordering::Relaxed);
    }

    fn opened(&self, record: &FlowRecord) -> (u64, Arc<Live>) {
        let (key, series) = self.series(Key::of(record, ResponseFlags::None), true);
        series.opened.fetch_add(1, Ordering::Relaxed);
        let live = Arc::new(Live {
            key,
            series,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sampler: OnceLock::new(),
        });
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        locked(&self.live).insert(id, live.clone());
        (id, live)
    }

    fn closed(&self, id: u64, live: &Live, flags: ResponseFlags) {
        live.sample();
        locked(&self.live).remove(&id);
        self.count_closed(&live.key, &live.series, flags, 1);
        self.release(&live.key, &live.series);
    }

    /// Counts ends, under the flags that they ended with.
    fn count_closed(&self, key: &Key, series: &Series, flags: ResponseFlags, count: u64) {
        // A series made now for a workload that was forgotten would never be dropped.
        let forgotten = series.forgotten.load(Ordering::Relaxed);
        if flags == key.response_flags || forgotten {
            series.closed.fetch_add(count, Ordering::Relaxed);
        } else {
            let key = Key {
                response_flags: flags,
                ..key.clone()
            };
            let (_, series) = self.series(key, false);
            series.closed.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// One that kept a series alive lets go of it.
    fn release(&self, key: &Key, series: &Series) {
        let mut all = locked(&self.series);
        let last = series.open.fetch_sub(1, Ordering::Relaxed) == 1;
        if last && series.forgotten.load(Ordering::Relaxed) {
            all.remove(key);
        }
    }

    /// Drops the series that name the workload; those with open connections once these have ended.
    pub fn forget(&self, namespace: &str, workload: &str) {
        locked(&self.series).retain(|key, series| {
            let gone = key.names(namespace, workload);
            if gone {
                series.forgotten.store(true, Ordering::Relaxed);
            }
            !gone || series.open.load(Ordering::Relaxed) > 0
        });
    }

    /// Brings the bytes of open connections up to date and returns every label set with its counters.
    pub fn snapshot(&self) -> Vec<(Vec<String>, Arc<Series>)> {
        let live: Vec<Arc<Live>> = locked(&self.live).values().cloned().collect();
        live.iter().for_each(|live| live.sample());
        let all = locked(&self.series);
        let pairs: Vec<_> = all
            .iter()
            .map(|(key, series)| (key.clone(), series.clone()))
            .collect();
        drop(all);
        let mut rows: Vec<_> = pairs
            .into_iter()
            .map(|(key, series)| (key.labels(), series))
            .collect();
        rows.sort_by(|left, right| left.0.cmp(&right.0));
        rows
    }

    pub fn len(&self) -> u64 {
        locked(&self.series).len() as u64
    }

    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }
}

/// The series of both ends of direct flows between the same two parties: looked up once, used for many. While it is held,
/// its series stay.
pub struct PairSeries {
    state: Arc<super::State>,
    ends: [(Key, Arc<Series>); 2],
}

impl std::fmt::Debug for PairSeries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PairSeries")
    }
}

impl PairSeries {
    pub(super) fn new(state: Arc<super::State>, record: &FlowRecord) -> Self {
        let ends = [Reporter::Source, Reporter::Destination].map(|reporter| {
            let key = Key {
                reporter,
                ..Key::of(record, ResponseFlags::None)
            };
            state.traffic.series(key, true)
        });
        Self { state, ends }
    }

    /// So many were established.
    pub fn opened(&self, count: u64) {
        self.add(|series| &series.opened, count);
        let flows = &self.state.flows;
        flows.add(FlowPath::Direct, count);
    }

    /// So many bytes more from server to client, and from client to server.
    pub fn bytes(&self, sent: u64, received: u64) {
        self.add(|series| &series.sent, sent);
        self.add(|series| &series.received, received);
    }

    /// So many ended.
    pub fn closed(&self, flags: ResponseFlags, count: u64) {
        for (key, series) in &self.ends {
            self.state.traffic.count_closed(key, series, flags, count);
        }
    }

    /// So many were never established, for another reason than policy.
    pub fn failed(&self, count: u64) {
        for (key, series) in &self.ends {
            // Nobody at the destination has seen it.
            if key.reporter == Reporter::Destination {
                continue;
            }
            if series.forgotten.load(Ordering::Relaxed) {
                series.failed.fetch_add(count, Ordering::Relaxed);
                continue;
            }
            let key = Key {
                response_flags: ResponseFlags::Connect,
                ..key.clone()
            };
            let (_, series) = self.state.traffic.series(key, false);
            series.failed.fetch_add(count, Ordering::Relaxed);
        }
    }

    fn add(&self, counter: impl Fn(&Series) -> &AtomicU64, count: u64) {
        if count > 0 {
            for (_, series) in &self.ends {
                counter(series).fetch_add(count, Ordering::Relaxed);
            }
        }
    }
}

impl Drop for PairSeries {
    fn drop(&mut self) {
        for (key, series) in &self.ends {
            self.state.traffic.release(key, series);
        }
    }
}

/// An open connection, as the metrics know it. Dropped without `close`, it counts as closed all the same.
#[must_use = "the connection counts as closed when this is dropped"]
pub struct OpenFlow {
    state: Arc<super::State>,
    id: u64,
    live: Arc<Live>,
    path: FlowPath,
    flags: ResponseFlags,
}

impl std::fmt::Debug for OpenFlow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpenFlow({})", self.id)
    }
}

impl OpenFlow {
    pub(super) fn new(state: Arc<super::State>, record: &FlowRecord) -> Self {
        let (id, live) = state.traffic.opened(record);
        state.flows.add(record.path, 1);
        state.open_flows.add(record.path, 1);
        Self {
            state,
            id,
            live,
            path: record.path,
            flags: ResponseFlags::None,
        }
    }

    /// Reports the totals of bytes so far; call it as often as news come.
    pub fn report(&self, bytes_sent: u64, bytes_received: u64) {
        self.live.report(bytes_sent, bytes_received);
    }

    /// Has the totals (sent, received) read at every scrape instead; `sample` must not block. The first one stays.
    pub fn follow(&self, sample: impl Fn() -> (u64, u64) + Send + Sync + 'static) {
        let _ = self.live.sampler.set(Box::new(sample));
    }

    /// The connection ended as the record says.
    pub fn close(mut self, record: &FlowRecord) {
        self.report(record.bytes_sent, record.bytes_received);
        self.flags = record.response_flags;
    }
}

impl Drop for OpenFlow {
    fn drop(&mut self) {
        self.state.traffic.closed(self.id, &self.live, self.flags);
        self.state.open_flows.sub(self.path, 1);
    }
}
