//! The kernel's events as telemetry: direct flows opened and closed, refusals, isolations.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{
    enforcer::Enforcer,
    pods::Pods,
};
use crate::{
    kernel::{EventStream, FlowEvent, FlowEventKind, FlowName},
    policy::Identity,
    proxy::Context,
    telemetry::{
        Direction, FlowPath, FlowRecord, OpenFlow, Party, Reporter, ResponseFlags, Security,
    },
};

/// Open direct flows that telemetry follows; more are still admitted, but reported only when they end.
const FOLLOWED: usize = 262_144;
/// How often what is followed is compared with what is open: the event of an end may have been lost.
const RECONCILE: Duration = Duration::from_secs(30);

/// Both ends' view of one open flow.
struct Open {
    source: OpenFlow,
    destination: OpenFlow,
    since: Instant,
}

pub struct DirectFlows {
    tables: Arc<crate::kernel::Tables>,
    enforcer: Arc<Enforcer>,
    pods: Arc<Pods>,
    context: Arc<Context>,
    open: HashMap<FlowName, Open>,
    reconciled: Instant,
}

impl DirectFlows {
    pub fn new(tables: Arc<crate::kernel::Tables>, enforcer: Arc<Enforcer>, pods: Arc<Pods>, context: Arc<Context>) -> Self {
        Self {
            tables,
            enforcer,
            pods,
            context,
            open: HashMap::new(),
            reconciled: Instant::now(),
        }
    }

    /// Reads events until `shutdown`.
    pub async fn run(mut self, mut events: EventStream, shutdown: CancellationToken) {
        loop {
            if self.reconciled.elapsed() >= RECONCILE {
                self.reconcile();
            }
            let read = events.read(|event| self.take(&event));
            match shutdown.run_until_cancelled(read).await {
                None => return,
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    tracing::error!(%error, "cannot read the kernel's events");
                    return;
                }
            }
        }
    }

    /// Lets go of flows that ended without telling; dropped, they count as closed.
    fn reconcile(&mut self) {
        let Ok(open) = self.tables.flows() else {
            return;
        };
        let open: std::collections::HashSet<_> = open.iter().map(crate::kernel::OpenFlow::name).collect();
        self.open
            .retain(|name, followed| open.contains(name) || followed.since.elapsed() < RECONCILE);
        self.reconciled = Instant::now();
    }

    fn take(&mut self, event: &FlowEvent) {
        let telemetry = Arc::clone(&self.context.telemetry);
        match event.kind {
            FlowEventKind::Opened => {
                let record = self.record(event);
                if self.open.len() < FOLLOWED {
                    let source = telemetry.opened(&record);
                    let destination = telemetry.metrics.opened(&as_destination(&record));
                    self.open.insert(
                        (event.key, event.sequence),
                        Open {
                            source,
                            destination,
                            since: Instant::now(),
                        },
                    );
                }
            }
            FlowEventKind::Closed => {
                let mut record = self.record(event);
                // Telemetry sees the connection from its server, the kernel measured at its client.
                record.bytes_sent = event.bytes_received;
                record.bytes_received = event.bytes_sent;
                record.duration = event.duration;
                record.rtt = Some(event.rtt);
                record.retransmits = Some(event.retransmits);
                if self.enforcer.was_revoked(&(event.key, event.sequence)) {
                    record.error = Some("policy changed and denies".to_owned());
                    record.response_flags = ResponseFlags::Deny;
                    telemetry.metrics.revoked(FlowPath::Direct);
                }
                if let Some(open) = self.open.remove(&(event.key, event.sequence)) {
                    open.destination.close(&as_destination(&record));
                    telemetry.closed(open.source, record);
                } else {
                    let open = telemetry.metrics.opened(&record);
                    telemetry.closed(open, record);
                }
            }
            FlowEventKind::Failed => {
                let mut record = self.record(event);
                record.duration = event.duration;
                record.retransmits = Some(event.retransmits);
                record.error = Some("never established".to_owned());
                record.response_flags = ResponseFlags::Connect;
                telemetry.failed(record);
            }
            FlowEventKind::Refused => {
                let mut record = self.record(event);
                record.policy = self
                    .enforcer
                    .policy(event.policy)
                    .map(|name| name.to_string());
                record.error = Some("policy denies (known verdict)".to_owned());
                record.response_flags = ResponseFlags::Deny;
                telemetry.failed(record);
            }
            FlowEventKind::Isolated => {
                self.enforcer.destroy_isolated(event);
                let reason = event.reason.map_or("unknown", culvert_abi::Reason::name);
                tracing::warn!(
                    client = %event.client, server = %event.server, reason,
                    "a connection that no claim covers was cut before the application read a byte"
                );
            }
        }
    }

    /// What is known about the two ends.
    fn record(&self, event: &FlowEvent) -> FlowRecord {
        let mesh = self.context.mesh.load();
        let mut record = FlowRecord::new(event.client, event.server);
        record.direction = Direction::Outbound;
        record.reporter = Reporter::Source;
        record.path = FlowPath::Direct;
        record.security = Security::MutualTls;
        let source = self.pods.by_cookie(event.client_netns);
        let identity: Option<&Identity> = source.as_deref().map(|pod| &pod.identity);
        let workload = source.as_deref().and_then(|pod| pod.workload(&mesh));
        record.source = Arc::new(Party::of(workload.map(AsRef::as_ref), identity));
        let destination = mesh.workload_by_ip(&self.context.network, event.server.ip());
        record.destination = Arc::new(Party::of(
            destination.map(AsRef::as_ref),
            destination.map(|workload| workload.identity()),
        ));
        record.service = self
            .enforcer
            .service(event.service)
            .and_then(|name| mesh.service_by_name(name.as_str()))
            .map(|service| Arc::new(crate::telemetry::ServiceName::of(service)));
        record
    }
}

/// The same flow as the server's side reports it.
fn as_destination(record: &FlowRecord) -> FlowRecord {
    FlowRecord {
        direction: Direction::Inbound,
        reporter: Reporter::Destination,
        ..record.clone()
    }
}
