//! Direct flows as telemetry: the kernel's events of their ends, and a look now and then at those that stay open.
//!
//! Invariants: a byte is counted once, by the report on an open flow or by the rest at its end, and also when the event of
//! its end was lost; a short flow costs one event, a look-up of its pair and a few additions; what is looked at in the kernel
//! is looked at on a blocking thread. Called by `node` as a task.

mod followed;
mod pair;
mod scan;
mod short;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{enforcer::Enforcer, outcomes::Outcomes, pods::Pods};
use crate::{
    kernel::{
        EventSocket, EventStream, FlowEnd as KernelEnd, FlowEvent as KernelEvent, FlowEventKind,
        FlowName, KernelError, NetnsCookie, ShortCircuit, Tables, socket_address, sys,
    },
    proxy::Context,
    telemetry::{FlowEnd, FlowPath, FlowRecord, ResponseFlags, Telemetry},
};
use followed::{Followed, Totals};
use pair::{Pair, PairKey, Pairs};
use scan::{Found, Scan, Scanner};
use short::{Short, Shorts};

/// Flows this old are followed while they are open. All others are known by their end alone.
const LONG: Duration = Duration::from_secs(1);
/// Open flows that telemetry follows; more are still admitted, but reported only when they end.
const FOLLOWED: usize = 262_144;
/// How often the table of flows is looked through, unless that takes long.
const SCAN: Duration = Duration::from_secs(1);
/// As many scans as pods of an earlier agent may need to be back.
const EARLY_SCANS: u32 = 30;
/// Isolations that are logged in that time.
const WARNINGS: u32 = 10;
/// A scan may take this part of the time, unless the pause for it would be longer than [`LONGEST_PAUSE`].
const SCAN_SHARE: u32 = 50;
/// The longest pause between two scans, however long one took: it may have stood still with the agent, or with the machine.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Events kept for one report to log and feed.
const BATCH: usize = 1024;

/// Where flows are learnt of, and told.
pub struct Sources {
    pub tables: Arc<Tables>,
    pub enforcer: Arc<Enforcer>,
    pub pods: Arc<Pods>,
    pub context: Arc<Context>,
    /// None where no flow is short-circuited.
    pub short: Option<Arc<ShortCircuit>>,
    pub outcomes: Arc<Outcomes>,
    pub report_interval: Duration,
    /// The kernel part tells of flows.
    pub telemetry: bool,
}

/// A flow that has ended, not told to log and feed yet.
struct Ended {
    event: KernelEvent,
    pair: Arc<Pair>,
    end: FlowEnd,
    short: Short,
}

pub struct DirectFlows {
    enforcer: Arc<Enforcer>,
    telemetry: Arc<Telemetry>,
    pairs: Pairs,
    shorts: Shorts,
    scanner: Scanner,
    report_interval: Duration,
    is_told: bool,
    followed: HashMap<FlowName, Followed>,
    /// Old flows that ended while a scan was being made, which may have found them open.
    ended_during_scan: HashSet<FlowName>,
    scanning: Option<JoinHandle<Result<Scan, KernelError>>>,
    next_scan: Instant,
    next_report: Instant,
    ended: Vec<Ended>,
    /// What was counted of flows whose end was lost, until the sums of lost events say their part.
    credits: HashMap<PairKey, Totals>,
    /// Flows that were [`LONG`] by then were counted by an earlier agent.
    earlier: Duration,
    /// Scans that look at sockets also out of turn, to find how far flows of an earlier agent have come: its pods may not be
    /// back yet.
    early_scans: u32,
    /// Isolations that were logged since a moment.
    warned: (Instant, u32),
}

/// When the next scan is to begin after one that took so long.
fn pause_after(took: Duration) -> Duration {
    took.saturating_mul(SCAN_SHARE).clamp(SCAN, LONGEST_PAUSE)
}

impl DirectFlows {
    pub fn new(sources: Sources) -> Self {
        let now = Instant::now();
        Self {
            telemetry: Arc::clone(&sources.context.telemetry),
            pairs: Pairs::new(
                Arc::clone(&sources.enforcer),
                Arc::clone(&sources.pods),
                sources.context,
            ),
            earlier: sources.tables.earlier_agent(),
            early_scans: EARLY_SCANS,
            shorts: Shorts {
                outcomes: sources.outcomes,
                possible: sources.short.is_some(),
            },
            scanner: Scanner::new(sources.tables, sources.pods, sources.short),
            enforcer: sources.enforcer,
            report_interval: sources.report_interval,
            is_told: sources.telemetry,
            followed: HashMap::new(),
            ended_during_scan: HashSet::new(),
            scanning: None,
            next_scan: now,
            next_report: now,
            ended: Vec::with_capacity(BATCH),
            credits: HashMap::new(),
            warned: (now, 0),
        }
    }

    /// Reads events until `shutdown`.
    pub async fn run(mut self, mut events: EventStream, shutdown: CancellationToken) {
        let telemetry = Arc::clone(&self.telemetry);
        let mut asked = false;
        loop {
            self.begin_scan(std::mem::take(&mut asked));
            let read = async {
                tokio::select! {
                    read = events.read(|event| self.take(event)) => read.map(|()| false),
                    () = telemetry.feed.joined() => Ok(true),
                }
            };
            match shutdown.run_until_cancelled(read).await {
                None => break,
                Some(Ok(joined)) => asked = joined,
                Some(Err(error)) => {
                    tracing::error!(%error, "cannot read the kernel's events");
                    break;
                }
            }
            self.tell();
            self.finish_scan(&mut events).await;
        }
        // What has happened is reported, although nobody looks any further.
        events.empty(|event| self.take(event)).await;
        self.tell();
    }

    /// Begins to look through the open flows when it is time, or when somebody has `asked` what is open.
    fn begin_scan(&mut self, asked: bool) {
        let now = Instant::now();
        let due = now >= self.next_scan || asked;
        if self.scanning.is_some() || !due || !self.is_told {
            return;
        }
        let measures = asked || now >= self.next_report;
        if measures {
            self.next_report = now + self.report_interval;
        }
        self.ended_during_scan.clear();
        let scanner = self.scanner.clone();
        self.scanning = Some(tokio::task::spawn_blocking(move || {
            scanner.look(LONG, measures)
        }));
    }

    async fn finish_scan(&mut self, events: &mut EventStream) {
        let Some(scanning) = self.scanning.take_if(|scanning| scanning.is_finished()) else {
            return;
        };
        let scan = match scanning.await {
            Ok(Ok(scan)) => scan,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the open flows could not be looked through");
                self.next_scan = Instant::now() + SCAN;
                return;
            }
            Err(error) => {
                tracing::error!(%error, "looking through the open flows failed");
                self.next_scan = Instant::now() + SCAN;
                return;
            }
        };
        self.next_scan = Instant::now() + pause_after(scan.took);
        self.pairs.refresh();
        // Whatever ended before the scan is in the ring by now, or among the lost.
        events.empty(|event| self.take(event)).await;
        self.tell();
        self.apply(scan);
    }

    fn apply(&mut self, scan: Scan) {
        for (isolated, client_end) in &scan.isolated {
            let socket = EventSocket {
                netns: NetnsCookie(isolated.socket_netns),
                cookie: isolated.socket_cookie,
                client_end: *client_end,
            };
            let ends = isolated.key;
            let client = socket_address(ends.client, ends.client_port);
            let server = socket_address(ends.server, ends.server_port);
            self.enforcer.destroy_isolated((client, server), socket);
        }
        let mut reports = followed::Reports::new(&self.telemetry, scan.measured);
        let mut open = HashSet::with_capacity(scan.flows.len());
        let mut unknown = false;
        for found in &scan.flows {
            let Found { flow, measures, .. } = found;
            let name = flow.name();
            open.insert(name);
            if self.ended_during_scan.contains(&name) {
                continue;
            }
            if let Some(followed) = self.followed.get_mut(&name) {
                if let Some(measures) = measures {
                    followed.update(measures);
                    followed.short = self.shorts.of_open(&name, &followed.pair, found.redirected);
                    reports.open(followed);
                }
                continue;
            }
            let inherited = self.is_inherited(Duration::from_nanos(flow.flow.opened_ns));
            unknown |= inherited && measures.is_none();
            if self.followed.len() >= FOLLOWED || !self.pairs.knows(flow.flow.client_netns) {
                continue;
            }
            let pair = self.pairs.of(&PairKey::of_flow(flow));
            let mut followed = match (inherited, measures) {
                (true, None) => continue,
                (true, Some(measures)) => Followed::inherited(flow, pair, measures),
                (false, measures) => Followed::new(flow, pair, measures.as_ref()),
            };
            followed.short = self.shorts.of_open(&name, &followed.pair, found.redirected);
            reports.first(&followed);
            self.followed.insert(name, followed);
        }
        if unknown && let Some(left) = self.early_scans.checked_sub(1) {
            self.early_scans = left;
            self.next_report = Instant::now();
        }
        for (name, followed) in self.followed.extract_if(|name, _| !open.contains(name)) {
            tracing::debug!(client = %followed.client(), sequence = name.1, "the end of a flow was not told");
            self.credits
                .entry(followed.pair_key)
                .or_default()
                .add(&followed.counted);
        }
        for (key, lost) in scan.lost {
            self.count_lost(PairKey::of_lost(&key), &lost);
        }
    }

    /// Whether an earlier agent has counted what there was of a flow.
    fn is_inherited(&self, opened: Duration) -> bool {
        opened.saturating_add(LONG) < self.earlier
    }

    /// Counts what lost events would have said, less what was counted of those flows while they were open.
    fn count_lost(&mut self, key: PairKey, lost: &culvert_abi::Lost) {
        let pair = self.pairs.of(&key);
        let mut totals = Totals {
            flows: lost.closed,
            bytes_sent: lost.bytes_sent,
            bytes_received: lost.bytes_received,
        };
        if let Some(credit) = self.credits.get_mut(&key) {
            totals.spend(credit);
            if *credit == Totals::default() {
                self.credits.remove(&key);
            }
        }
        pair.series.opened(totals.flows);
        pair.series.bytes(totals.bytes_received, totals.bytes_sent);
        pair.series.closed(ResponseFlags::None, lost.closed);
        pair.series.failed(lost.failed);
        let metrics = &self.telemetry.metrics;
        metrics.retransmits(FlowPath::Direct, lost.retransmits);
        metrics.ended(
            FlowPath::Direct,
            FlowEnd::Unknown,
            lost.closed.saturating_add(lost.failed),
        );
    }

    fn take(&mut self, event: KernelEvent) {
        match event.kind {
            FlowEventKind::Closed => self.closed(event),
            FlowEventKind::Failed => {
                let pair = self.pairs.of(&PairKey::of_event(&event));
                let end = ending(event.end);
                pair.series.failed(1);
                self.telemetry.metrics.ended(FlowPath::Direct, end, 1);
                self.remember(event, pair, end, Short::default());
            }
            FlowEventKind::Refused => self.refused(&event),
            FlowEventKind::Isolated => {
                let ends = (event.client, event.server);
                self.enforcer.destroy_isolated(ends, event.socket);
                if self.may_warn() {
                    let reason = event.reason.map_or("unknown", culvert_abi::Reason::name);
                    tracing::warn!(
                        client = %event.client, server = %event.server, reason,
                        "a connection that no claim covers was cut before the application read a byte"
                    );
                }
            }
        }
    }

    /// A pod can cause isolations as fast as it connects: all are counted by the kernel part, not all are logged.
    fn may_warn(&mut self) -> bool {
        let (since, warned) = &mut self.warned;
        if since.elapsed() >= SCAN {
            (*since, *warned) = (Instant::now(), 0);
        }
        *warned += 1;
        *warned <= WARNINGS
    }

    fn closed(&mut self, event: KernelEvent) {
        let is_long = event.duration >= LONG;
        let name = event.name();
        let followed = is_long.then(|| self.followed.remove(&name)).flatten();
        let (pair, counted) = match followed {
            Some(followed) => (followed.pair, followed.counted),
            // Nobody knows how much of it an earlier agent has counted: nothing twice, rather than everything.
            None if self.is_inherited(event.at.saturating_sub(event.duration)) => (
                self.pairs.of(&PairKey::of_event(&event)),
                Totals {
                    flows: 1,
                    bytes_sent: u64::MAX,
                    bytes_received: u64::MAX,
                },
            ),
            None => (self.pairs.of(&PairKey::of_event(&event)), Totals::default()),
        };
        if is_long && self.scanning.is_some() {
            self.ended_during_scan.insert(name);
        }
        let mut end = ending(event.end);
        let mut flags = ResponseFlags::None;
        if let Some(cut) = self.enforcer.cut_as(&name) {
            end = cut;
            if cut == FlowEnd::Revoked {
                flags = ResponseFlags::Deny;
                self.telemetry.metrics.revoked(FlowPath::Direct);
            }
        }
        pair.series.opened(1 - counted.flows.min(1));
        // Telemetry sees the connection from its server, the kernel measured at its client.
        pair.series.bytes(
            event.bytes_received.saturating_sub(counted.bytes_received),
            event.bytes_sent.saturating_sub(counted.bytes_sent),
        );
        pair.series.closed(flags, 1);
        let metrics = &self.telemetry.metrics;
        metrics.measured(event.connect_latency, event.rtt);
        metrics.retransmits(FlowPath::Direct, event.retransmits.into());
        metrics.ended(FlowPath::Direct, end, 1);
        let short = self.shorts.of_ended(&event, &pair);
        self.remember(event, pair, end, short);
    }

    fn refused(&self, event: &KernelEvent) {
        let pair = self.pairs.of(&PairKey::of_event(event));
        let mut record = pair.record(event.client, event.server);
        let policy = self.enforcer.policy(event.policy);
        record.policy = policy.map(|name| name.to_string());
        record.error = Some("policy denies (known verdict)".to_owned());
        record.response_flags = ResponseFlags::Deny;
        self.telemetry.failed(record);
    }

    fn remember(&mut self, event: KernelEvent, pair: Arc<Pair>, end: FlowEnd, short: Short) {
        self.ended.push(Ended {
            event,
            pair,
            end,
            short,
        });
        if self.ended.len() >= BATCH {
            self.tell();
        }
    }

    /// Tells log and feed what has ended.
    fn tell(&mut self) {
        let spared = self.telemetry.spared(self.ended.len());
        let (clock, wall) = (sys::monotonic_now(), SystemTime::now());
        let mut nth = 0;
        let told = self.ended.drain(..).filter_map(|ended| {
            nth += 1;
            let at = ended.event.at;
            let is_ordinary = ended.end == FlowEnd::Fin;
            (nth > spared || !is_ordinary)
                .then(|| (wall - clock.saturating_sub(at), ended.record()))
        });
        let told: Vec<_> = told.collect();
        if !told.is_empty() {
            self.telemetry.tell(told);
        }
    }
}

impl Ended {
    fn record(self) -> FlowRecord {
        let Self {
            event,
            pair,
            end,
            short,
        } = self;
        let mut record = pair.record(event.client, event.server);
        record.bytes_sent = event.bytes_received;
        record.bytes_received = event.bytes_sent;
        record.duration = event.duration;
        record.retransmits = Some(event.retransmits);
        record.end = Some(end);
        if event.kind == FlowEventKind::Failed {
            record.error = Some(format!("never established: {}", end.describe().trim()));
            record.response_flags = ResponseFlags::Connect;
            return record;
        }
        short.tell(&mut record);
        record.connect_latency = Some(event.connect_latency);
        record.rtt = Some(event.rtt);
        if end == FlowEnd::Revoked {
            record.error = Some("policy changed and denies".to_owned());
            record.response_flags = ResponseFlags::Deny;
        }
        record
    }
}

fn ending(end: KernelEnd) -> FlowEnd {
    match end {
        KernelEnd::Fin => FlowEnd::Fin,
        KernelEnd::ResetByPeer => FlowEnd::ResetByPeer,
        KernelEnd::ResetByClient => FlowEnd::ResetByClient,
        KernelEnd::Timeout => FlowEnd::Timeout,
        KernelEnd::Destroyed => FlowEnd::Destroyed,
        KernelEnd::ConnectionRefused => FlowEnd::Refused,
        KernelEnd::Unreachable => FlowEnd::Unreachable,
        KernelEnd::Unknown => FlowEnd::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scans_take_a_small_share_of_the_time_and_one_that_stood_still_puts_off_the_next_by_little() {
        let pauses = [1, 100, 600_000].map(|took| pause_after(Duration::from_millis(took)));
        assert_eq!(pauses, [1, 5, 10].map(Duration::from_secs));
        assert_eq!(pause_after(Duration::MAX), LONGEST_PAUSE);
    }
}
