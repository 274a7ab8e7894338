//! Into a pod: policy, then the application. Plaintext connections arrive here; `hbone_server` shares the rest.

use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::{
    Context, ProxyKnobs,
    arrival::{Arrival, names_application},
    dial,
    open::OpenConnection,
    pod::Ours,
    report::Report,
};
use crate::{
    enrol::LocalPod,
    mesh::{Mesh, Workload},
    policy::{Connection, Decision, DenyReason, PolicyName},
    telemetry::{Direction, FlowPath, Reporter},
};

/// Why a connection into a pod is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Denial {
    #[error("policy denies: {0}")]
    Policy(DenyReason),
    #[error("the pod is not a workload of the mesh (yet): what may reach it is not known")]
    UnknownWorkload,
}

impl Denial {
    pub fn policy(&self) -> Option<&PolicyName> {
        match self {
            Self::Policy(DenyReason::MatchedDeny(name) | DenyReason::UnknownPolicy(name)) => {
                Some(name)
            }
            Self::Policy(DenyReason::NoAllowMatched) | Self::UnknownWorkload => None,
        }
    }
}

/// Asks policy; `Ok` names the policy that allows, if one had to. With `opened_to` about a connection that is open, which policies leave
/// alone that the workload did not list then.
pub(super) fn authorize(
    mesh: &Mesh,
    pod: &LocalPod,
    connection: &Connection,
    opened_to: Option<&Workload>,
    knobs: ProxyKnobs,
) -> Result<Option<PolicyName>, Denial> {
    if !knobs.asks_policy() {
        return Ok(None);
    }
    let workload = pod.workload(mesh).ok_or(Denial::UnknownWorkload)?;
    let evaluation = match opened_to {
        Some(then) => mesh.authorize_open(workload, connection, |policy| {
            then.authorization_policies.contains(policy)
        }),
        None => mesh.authorize(workload, connection),
    };
    for policy in &evaluation.would_deny {
        tracing::info!(%policy, source = %connection.source_ip(), destination = %connection.destination(), "a dry-run policy would deny this connection");
    }
    match evaluation.decision {
        Decision::Allow(permit) => Ok(permit.policy().cloned()),
        Decision::Deny(reason) => Err(Denial::Policy(reason)),
    }
}

/// Enters a connection among the open ones, which `stop` cuts, if policy allows it; then also the name of the policy, if one had to.
pub(super) fn admit(
    ours: &Ours,
    connection: &Connection,
    stop: &CancellationToken,
) -> Result<(OpenConnection, Option<PolicyName>), Denial> {
    let Context {
        open, mesh, knobs, ..
    } = &*ours.context;
    // In this order: a mesh that replaces the one that is asked here finds the connection among the open ones.
    let entered = open.enter(&ours.pod, &mesh.load(), connection, &ours.worker, stop);
    let policy = authorize(&mesh.load(), &ours.pod, connection, None, *knobs)?;
    Ok((entered, policy))
}

/// A plaintext connection from outside the mesh, or from somebody who bypassed it.
pub(super) async fn handle_plaintext(ours: Ours, stream: TcpStream) {
    let Ok(arrival) = Arrival::of(&ours.pod, &stream) else {
        return;
    };
    let Arrival {
        source,
        destination,
    } = arrival;
    let mesh = ours.context.mesh.load();
    let mut report = Report::new(&ours.context.telemetry, source, destination);
    report.describe(
        Direction::Inbound,
        Reporter::Destination,
        FlowPath::Plaintext,
    );
    report.destination(
        ours.pod.workload(&mesh).map(AsRef::as_ref),
        Some(&ours.pod.identity),
    );
    report.source(
        mesh.workload_by_ip(&ours.context.network, source.ip())
            .map(AsRef::as_ref),
        None,
    );
    if !names_application(&ours.pod, destination) {
        dial::reset(stream);
        report.refused("the destination is not this pod's application");
        return;
    }
    let connection = Connection::new(None, source.ip(), destination);
    drop(mesh);
    let open = match admit(&ours, &connection, &ours.stop.close) {
        Ok((open, policy)) => {
            report.policy(policy.as_ref());
            open
        }
        Err(denial) => {
            dial::reset(stream);
            report.denied(&denial.to_string(), denial.policy());
            return;
        }
    };
    // The client's own port is taken in this namespace, by the very connection that was accepted.
    let seen_as = dial::with_port(source, 0);
    match dial::to_application(&ours.pod, seen_as, destination).await {
        Ok(application) => {
            report
                .carry(stream, application, &open.cancel, || open.cut())
                .await
        }
        Err(error) => {
            dial::reset(stream);
            report.unreachable(&format!("the application refused: {error}"));
        }
    }
}
