//! What becomes of one connection, told to telemetry whichever way it ends.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{task::yield_now, time::sleep};
use tokio_util::sync::CancellationToken;

use super::relay::{IntoSide, RelayCounters, RelayEnd, relay};
use crate::{
    mesh::{Service, Workload},
    policy::{Identity, PolicyName},
    telemetry::{
        Direction, FlowEnd, FlowPath, FlowRecord, OpenFlow, Party, Reporter, ResponseFlags,
        Security, Telemetry,
    },
};

/// How long the report of a connection that was cut waits, and the closing of its sockets, for others that are cut with it: their
/// resets matter more.
const OTHERS_FIRST: Duration = Duration::from_millis(50);

/// What took an open connection its right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// A change of policy.
    Policy,
    /// A revocation list: the certificate at the tunnel's other end.
    Certificate,
}

impl Cut {
    fn error(self) -> &'static str {
        match self {
            Self::Policy => "policy changed and denies",
            Self::Certificate => "the certificate of the tunnel's other end was revoked (CRL_PATH)",
        }
    }

    fn flags(self) -> ResponseFlags {
        match self {
            Self::Policy => ResponseFlags::Deny,
            Self::Certificate => ResponseFlags::TlsFailure,
        }
    }
}

/// A connection that has not ended yet.
pub(super) struct Report {
    telemetry: Arc<Telemetry>,
    record: FlowRecord,
    started: Instant,
}

/// Reports a connection's end when dropped, which may be in the middle of a wait.
struct Ended {
    telemetry: Arc<Telemetry>,
    told: Option<(OpenFlow, FlowRecord)>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let Some((open, record)) = self.told.take() else {
            return;
        };
        if record.end == Some(FlowEnd::Revoked) {
            self.telemetry.metrics.revoked(record.path);
        }
        self.telemetry.closed(open, record);
    }
}

impl Report {
    pub fn new(telemetry: &Arc<Telemetry>, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            telemetry: Arc::clone(telemetry),
            record: FlowRecord::new(source, destination),
            started: Instant::now(),
        }
    }

    pub fn describe(&mut self, direction: Direction, reporter: Reporter, path: FlowPath) {
        self.record.direction = direction;
        self.record.reporter = reporter;
        self.record.path = path;
        self.record.security = match path {
            FlowPath::Plaintext => Security::Unknown,
            FlowPath::Hbone | FlowPath::Direct => Security::MutualTls,
        };
    }

    pub fn source(&mut self, workload: Option<&Workload>, identity: Option<&Identity>) {
        self.record.source = Arc::new(Party::of(workload, identity));
    }

    pub fn destination(&mut self, workload: Option<&Workload>, identity: Option<&Identity>) {
        self.record.destination = Arc::new(Party::of(workload, identity));
    }

    pub fn service(&mut self, service: Option<&Service>) {
        self.record.service =
            service.map(|service| Arc::new(crate::telemetry::ServiceName::of(service)));
    }

    /// The client's side of a tunnel.
    pub fn through_tunnel(&mut self, tunnel: SocketAddr, target: SocketAddr) {
        self.record.destination_addr = tunnel;
        self.record.hbone_addr = Some(target);
    }

    /// The server's side of a tunnel.
    pub fn inside_tunnel(&mut self, target: SocketAddr) {
        self.record.hbone_addr = Some(target);
    }

    /// Why the kernel part gave the connection to the agent.
    pub fn not_direct(&mut self, reason: Option<culvert_abi::Reason>) {
        self.record.not_direct = reason;
    }

    pub fn policy(&mut self, policy: Option<&PolicyName>) {
        self.record.policy = policy.map(ToString::to_string);
    }

    /// Relays to the end and reports it.
    pub async fn carry<C: IntoSide, U: IntoSide>(
        mut self,
        client: C,
        upstream: U,
        cancel: &CancellationToken,
        cut: impl Fn() -> Option<Cut>,
    ) {
        let counters = Arc::<RelayCounters>::default();
        let open = self.telemetry.opened(&self.record);
        let sampled = Arc::clone(&counters);
        // Telemetry sees the connection from its server, the relay from its client.
        open.follow(move || (sampled.received(), sampled.sent()));
        let (outcome, mut remains) = relay(client, upstream, &counters, cancel).await;
        // Of a tunnel that is closed the streams fail.
        let revoked = match outcome.end {
            RelayEnd::Cancelled | RelayEnd::UpstreamReset(_) => cut(),
            RelayEnd::Closed | RelayEnd::ClientReset(_) => None,
        };
        // Many are revoked together, and by turns: first their tunnels learn of it, so that the other ends are cut meanwhile,
        // then the applications; the sockets are closed after that.
        if revoked.is_some() {
            yield_now().await;
        }
        let storm = revoked.is_some() || matches!(outcome.end, RelayEnd::UpstreamReset(_));
        if storm {
            remains.hasten();
        }
        self.record.duration = self.started.elapsed();
        self.record.bytes_sent = outcome.received;
        self.record.bytes_received = outcome.sent;
        match outcome.end {
            _ if let Some(cut) = revoked => {
                self.record.end = Some(FlowEnd::Revoked);
                self.record.error = Some(cut.error().to_owned());
                self.record.response_flags = cut.flags();
            }
            RelayEnd::Closed => self.record.end = Some(FlowEnd::Fin),
            RelayEnd::ClientReset(error) => {
                self.record.end = Some(FlowEnd::ResetByClient);
                self.record.error = Some(format!("the client's side failed: {error}"))
            }
            RelayEnd::UpstreamReset(error) => {
                self.record.end = Some(FlowEnd::ResetByPeer);
                self.record.error = Some(format!("the server's side failed: {error}"))
            }
            RelayEnd::Cancelled => {
                self.record.end = Some(FlowEnd::Stopped);
                self.record.error = Some("the agent or the pod stopped".to_owned())
            }
        }
        let ended = Ended {
            telemetry: self.telemetry,
            told: Some((open, self.record)),
        };
        if storm {
            sleep(OTHERS_FIRST).await;
        }
        drop((remains, ended));
    }

    /// Not a connection that the agent could carry at all.
    pub fn refused(self, error: &str) {
        self.failed(ResponseFlags::Deny, error);
    }

    pub fn denied(mut self, error: &str, policy: Option<&PolicyName>) {
        self.policy(policy);
        self.failed(ResponseFlags::Deny, error);
    }

    pub fn unreachable(self, error: &str) {
        self.failed(ResponseFlags::Connect, error);
    }

    pub fn failed(mut self, flags: ResponseFlags, error: &str) {
        self.record.response_flags = flags;
        self.record.error = Some(error.to_owned());
        self.record.duration = self.started.elapsed();
        self.telemetry.failed(self.record);
    }
}
