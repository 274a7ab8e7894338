//! Out of a pod: taking a connection the way that `route` says.

use std::{net::SocketAddr, time::Duration};

use tokio::{net::TcpStream, time::timeout};

use super::{
    arrival::{Arrival, is_own},
    dial,
    hbone::{ConnectRequest, HboneError, PoolKey},
    passthrough,
    pod::Ours,
    report::{Cut, Report},
    route::{Route, Tunnel, TunnelEnd, route},
    tls::ExpectedServer,
};
use crate::{
    mesh::{Destination, GatewayAddress, GatewayDestination, Revision, Workload},
    policy::{Decision, DenyReason},
    telemetry::{Direction, FlowPath, Reporter, ResponseFlags},
    xds::DemandError,
};

/// How long a connection waits for its pod's first certificate.
const CERTIFICATE_DEADLINE: Duration = Duration::from_secs(10);

pub(super) async fn handle(ours: Ours, stream: TcpStream) {
    let Ok(Arrival {
        source,
        destination,
    }) = Arrival::of(&ours.pod, &stream)
    else {
        return;
    };
    // Before the mesh: who sees a revision finds a mesh at least that new.
    let known =
        ours.context.mesh.revision() > Revision::default() || !ours.context.knobs.awaits_mesh();
    let asked = learn(&ours, destination).await;
    let mesh = ours.context.mesh.load();
    let client = ours.pod.workload(&mesh).cloned();
    let mut report = Report::new(&ours.context.telemetry, source, destination);
    report.describe(Direction::Outbound, Reporter::Source, FlowPath::Plaintext);
    report.source(client.as_deref(), Some(&ours.pod.identity));
    let steered = ours.pod.sockets.steered(&stream);
    report.not_direct(steered.reason);
    // Somebody in the pod connected to the agent's port, not through it.
    if is_own(&ours.pod, destination.ip()) {
        dial::reset(stream);
        report.refused("port 15001 of the pod belongs to the agent");
        return;
    }
    // Without a mesh nothing is known to be outside of it, and a pod of it must not be reached in plaintext.
    let route = if let Err(error) = asked {
        Route::Nowhere(error.to_string().into())
    } else if known {
        route(
            &mesh,
            &ours.context.network,
            destination,
            client.as_deref(),
            steered.chosen,
        )
    } else {
        Route::Nowhere("the mesh is not known yet".into())
    };
    drop(mesh);
    match route {
        Route::Nowhere(reason) => {
            dial::reset(stream);
            report.unreachable(&reason);
        }
        Route::Plain {
            workload,
            target,
            service,
        } => {
            report.destination(workload.as_deref(), None);
            report.service(service.as_deref());
            passthrough::carry(&ours, stream, source, target, report).await;
        }
        Route::Tunnel(tunnel) => {
            report.describe(Direction::Outbound, Reporter::Source, FlowPath::Hbone);
            let end = &tunnel.end;
            report.destination(Some(&end.workload), Some(end.workload.identity()));
            report.service(tunnel.service.as_deref());
            // What a waypoint lets through is the waypoint's to say.
            if !tunnel.is_waypoint
                && let Some(evaluation) =
                    ours.context
                        .judge
                        .judge(&ours.pod, source.ip(), tunnel.target)
                && let Decision::Deny(reason) = evaluation.decision
                && ours.context.knobs.asks_policy()
            {
                dial::reset(stream);
                let policy = match &reason {
                    DenyReason::MatchedDeny(name) | DenyReason::UnknownPolicy(name) => Some(name),
                    DenyReason::NoAllowMatched => None,
                };
                report.denied(&format!("policy denies: {reason}"), policy);
                return;
            }
            carry(&ours, stream, source, &tunnel, client.as_deref(), report).await;
        }
    }
}

/// Asks the control plane what is at the destination, and what is in front of that, where it says so only when it is asked.
async fn learn(ours: &Ours, destination: SocketAddr) -> Result<(), DemandError> {
    let context = &ours.context;
    let Some(demand) = &context.demand else {
        return Ok(());
    };
    if !context.knobs.asks_control_plane() {
        return Ok(());
    }
    demand.address(&context.network, destination.ip()).await?;
    let mesh = context.mesh.load();
    // Of several services there it is the one that the connection will go to.
    let client = ours.pod.workload(&mesh).map(AsRef::as_ref);
    let found = mesh.lookup(&context.network, destination.ip(), client);
    drop(mesh);
    let gateways: Vec<GatewayAddress> = match found {
        Destination::Service(service) => {
            let waypoints = service.waypoints.iter();
            waypoints.map(|one| one.gateway.clone()).collect()
        }
        Destination::Workload(workload) => workload.waypoint.iter().cloned().collect(),
        Destination::Unknown => Vec::new(),
    };
    for gateway in gateways {
        match gateway.destination {
            GatewayDestination::Service(name) => demand.service(&name).await?,
            GatewayDestination::Address(address) => {
                demand.address(&address.network, address.ip).await?;
            }
        }
    }
    Ok(())
}

/// Carries a connection through a tunnel.
async fn carry(
    ours: &Ours,
    stream: TcpStream,
    source: SocketAddr,
    tunnel: &Tunnel,
    client: Option<&Workload>,
    mut report: Report,
) {
    let Tunnel { end, target, .. } = tunnel;
    report.through_tunnel(end.address, *target);
    let ready = timeout(
        CERTIFICATE_DEADLINE,
        ours.context.certificates.ready(&ours.pod.identity),
    );
    let ready = tokio::select! {
        ready = ready => ready,
        () = ours.stop.close.cancelled() => {
            dial::reset(stream);
            return report.unreachable("the agent or the pod is stopping");
        }
    };
    let certificate = match ready {
        Ok(Ok(certificate)) => certificate,
        Ok(Err(error)) => {
            dial::reset(stream);
            return report.failed(ResponseFlags::IdentityFailure, &error.to_string());
        }
        Err(_) => {
            dial::reset(stream);
            return report.failed(
                ResponseFlags::IdentityFailure,
                "the pod has no certificate yet",
            );
        }
    };
    let from = dial::tunnel_source(&ours.pod, source.ip(), end.address.ip());
    let key = PoolKey {
        from,
        source: ours.pod.uid().as_str().into(),
        identity: ours.pod.identity.clone(),
        destination: end.address,
        expected: expected(end),
    };
    let request = ConnectRequest {
        authority: target.to_string(),
        forwarded: Some(format!("for=\"{source}\"")),
        baggage: client.map(baggage),
        traceparent: None,
    };
    let sockets = ours.pod.sockets.clone();
    let to = end.address;
    let dial = move || dial::tunnel(sockets.clone(), from, to);
    let connecting = ours.worker.pool.connect(&key, &certificate, &request, dial);
    let connected = tokio::select! {
        connected = connecting => connected,
        () = ours.stop.close.cancelled() => {
            dial::reset(stream);
            return report.unreachable("the agent or the pod is stopping");
        }
    };
    match connected {
        Ok(upstream) => {
            let revoked = upstream.peer_revoked();
            let cut = || {
                let revoked = revoked.as_ref()?.is_cancelled();
                revoked.then_some(Cut::Certificate)
            };
            report.carry(stream, upstream, &ours.stop.close, cut).await
        }
        Err(error) => {
            dial::reset(stream);
            report.failed(flags(&error), &error.to_string());
        }
    }
}

/// Whom the tunnel's other end may be.
fn expected(end: &TunnelEnd) -> ExpectedServer {
    let mut identities = vec![end.workload.identity().clone()];
    let names = end.service.iter().flat_map(|it| &it.subject_alt_names);
    identities.extend(names.filter_map(|name| crate::policy::Identity::parse(name).ok()));
    ExpectedServer::any_of(identities)
}

fn flags(error: &HboneError) -> ResponseFlags {
    match error {
        HboneError::Refused { status, .. } if status.as_u16() == 401 => ResponseFlags::Deny,
        HboneError::Tls { .. } | HboneError::Revoked(_) => ResponseFlags::TlsFailure,
        HboneError::Http2 { .. } => ResponseFlags::Http2Failure,
        HboneError::Config(_) => ResponseFlags::IdentityFailure,
        _ => ResponseFlags::Connect,
    }
}

/// The client's workload, for the other end's telemetry.
fn baggage(client: &Workload) -> String {
    let encoded = |text: &str| {
        text.bytes()
            .map(|byte| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                    char::from(byte).to_string()
                }
                _ => format!("%{byte:02X}"),
            })
            .collect::<String>()
    };
    [
        ("k8s.cluster.name", &client.cluster_id),
        ("k8s.namespace.name", &client.namespace),
        ("k8s.deployment.name", &client.workload_name),
        ("service.name", &client.canonical_name),
        ("service.version", &client.canonical_revision),
        ("cloud.region", &client.locality.region),
        ("cloud.availability_zone", &client.locality.zone),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    .map(|(name, value)| format!("{name}={}", encoded(value)))
    .collect::<Vec<_>>()
    .join(",")
}
