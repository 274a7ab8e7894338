//! Who talks to whom: worked out once for many flows, and forgotten after a moment, because pods and mesh change.

use std::{cell::RefCell, collections::HashMap, net::SocketAddr, sync::Arc};

use culvert_abi::{Address, LostKey};

use super::{Enforcer, KernelEvent, Pods};
use crate::{
    kernel::{NetnsCookie, OpenFlow, socket_address},
    mesh::{Mesh, ShortCircuitMode, Workload},
    proxy::Context,
    telemetry::{
        Direction, FlowPath, FlowRecord, PairSeries, Party, Reporter, Security, ServiceName,
    },
};

/// More pairs than a node has in one moment; beyond, they are worked out again.
const KEPT: usize = 16_384;

/// What the parties of a flow follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PairKey {
    client_netns: u64,
    server: Address,
    /// Number of the service that was connected to, 0 for none.
    service: u32,
}

impl PairKey {
    pub fn of_event(event: &KernelEvent) -> Self {
        Self {
            client_netns: event.client_netns.0,
            server: event.key.server,
            service: event.service,
        }
    }

    pub fn of_flow(flow: &OpenFlow) -> Self {
        Self {
            client_netns: flow.flow.client_netns,
            server: flow.key.server,
            service: flow.flow.service,
        }
    }

    pub fn of_lost(key: &LostKey) -> Self {
        Self {
            client_netns: key.client_netns,
            server: key.server,
            service: key.service,
        }
    }
}

/// The parties of many flows.
#[derive(Debug)]
pub struct Pair {
    pub series: PairSeries,
    /// A record with everything that all their flows share.
    shared: FlowRecord,
    /// The client's workload and the server's, as far as the mesh knows them.
    workloads: [Option<Arc<Workload>>; 2],
}

impl Pair {
    /// Whether the mesh has the short-circuit on for both at this port of the server.
    pub fn is_on(&self, server_port: u16) -> bool {
        self.workloads.iter().all(|workload| {
            let mode = |workload: &Arc<Workload>| workload.short_circuit.mode(server_port);
            workload.as_ref().map(mode) == Some(ShortCircuitMode::On)
        })
    }

    pub fn record(&self, client: SocketAddr, server: SocketAddr) -> FlowRecord {
        FlowRecord {
            source_addr: client,
            destination_addr: server,
            ..self.shared.clone()
        }
    }
}

/// The pairs of the moment.
pub struct Pairs {
    enforcer: Arc<Enforcer>,
    pods: Arc<Pods>,
    context: Arc<Context>,
    known: RefCell<HashMap<PairKey, Arc<Pair>>>,
}

impl Pairs {
    pub fn new(enforcer: Arc<Enforcer>, pods: Arc<Pods>, context: Arc<Context>) -> Self {
        Self {
            enforcer,
            pods,
            context,
            known: RefCell::default(),
        }
    }

    /// Forgets what may have changed.
    pub fn refresh(&self) {
        self.known.borrow_mut().clear();
    }

    pub fn knows(&self, client_netns: u64) -> bool {
        self.pods.by_cookie(NetnsCookie(client_netns)).is_some()
    }

    pub fn of(&self, key: &PairKey) -> Arc<Pair> {
        let mut known = self.known.borrow_mut();
        if let Some(pair) = known.get(key) {
            return Arc::clone(pair);
        }
        if known.len() >= KEPT {
            known.clear();
        }
        let pair = Arc::new(self.make(key));
        known.insert(*key, Arc::clone(&pair));
        pair
    }

    fn make(&self, key: &PairKey) -> Pair {
        let mesh = self.context.mesh.load();
        let server = socket_address(key.server, 0);
        let mut shared = FlowRecord::new(server, server);
        shared.direction = Direction::Outbound;
        shared.reporter = Reporter::Source;
        shared.path = FlowPath::Direct;
        shared.security = Security::MutualTls;
        let source = self.pods.by_cookie(NetnsCookie(key.client_netns));
        let workload = source.as_deref().and_then(|pod| pod.workload(&mesh));
        let identity = source.as_deref().map(|pod| &pod.identity);
        shared.source = Arc::new(Party::of(workload.map(AsRef::as_ref), identity));
        let destination = mesh.workload_by_ip(&self.context.network, server.ip());
        shared.destination = Arc::new(Party::of(
            destination.map(AsRef::as_ref),
            destination.map(|workload| workload.identity()),
        ));
        shared.service = self.service(&mesh, key.service);
        Pair {
            series: self.context.telemetry.metrics.pair(&shared),
            shared,
            workloads: [workload.cloned(), destination.cloned()],
        }
    }

    fn service(&self, mesh: &Mesh, number: u32) -> Option<Arc<ServiceName>> {
        if number == 0 {
            return None;
        }
        let name = self.enforcer.service(number)?;
        let service = mesh.service_by_name(name.as_str())?;
        Some(Arc::new(ServiceName::of(service)))
    }
}
