//! Out of a pod: which way a connection goes, and taking it there.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher as _, Hasher as _},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use culvert_abi::{HBONE_PORT, OWN_PORTS};
use tokio::{net::TcpStream, time::timeout};

use super::{
    arrival::{Arrival, is_own},
    dial,
    hbone::{ConnectRequest, HboneError, PoolKey},
    passthrough,
    pod::Ours,
    report::Report,
    tls::ExpectedServer,
};
use crate::{
    mesh::{Destination, LoadBalancerMode, Mesh, Revision, Service, TunnelProtocol, Workload},
    policy::{Decision, DenyReason},
    telemetry::{Direction, FlowPath, Reporter, ResponseFlags},
};

/// How long a connection waits for its pod's first certificate.
const CERTIFICATE_DEADLINE: Duration = Duration::from_secs(10);

/// Where a connection goes.
#[derive(Debug)]
enum Route {
    /// Through a tunnel to this workload.
    Tunnel {
        workload: Arc<Workload>,
        target: SocketAddr,
        service: Option<Arc<Service>>,
    },
    /// As plain TCP.
    Plain {
        workload: Option<Arc<Workload>>,
        target: SocketAddr,
        service: Option<Arc<Service>>,
    },
    /// Nowhere.
    Nowhere(&'static str),
}

pub(super) async fn handle(ours: Ours, stream: TcpStream) {
    let Ok(Arrival {
        source,
        destination,
    }) = Arrival::of(&stream)
    else {
        return;
    };
    // Before the mesh: who sees a revision finds a mesh at least that new.
    let known =
        ours.context.mesh.revision() > Revision::default() || !ours.context.knobs.awaits_mesh();
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
    let route = if known {
        route(
            &mesh,
            &ours.context.network,
            destination,
            client.as_deref(),
            steered.chosen,
        )
    } else {
        Route::Nowhere("the mesh is not known yet")
    };
    drop(mesh);
    match route {
        Route::Nowhere(reason) => {
            dial::reset(stream);
            report.unreachable(reason);
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
        Route::Tunnel {
            workload,
            target,
            service,
        } => {
            report.describe(Direction::Outbound, Reporter::Source, FlowPath::Hbone);
            report.destination(Some(&workload), Some(workload.identity()));
            report.service(service.as_deref());
            if let Some(evaluation) = ours.context.judge.judge(&ours.pod, source.ip(), target)
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
            tunnel(
                &ours,
                stream,
                source,
                &workload,
                target,
                service.as_deref(),
                client.as_deref(),
                report,
            )
            .await;
        }
    }
}

/// Decides the way: service by its rules, workload by what it speaks, everything else as it is.
///
/// `chosen` is the endpoint that the kernel part has chosen already, so that the shares are those of one choice, not of two.
fn route(
    mesh: &Mesh,
    network: &str,
    destination: SocketAddr,
    client: Option<&Workload>,
    chosen: Option<SocketAddr>,
) -> Route {
    match mesh.lookup(network, destination.ip(), client) {
        Destination::Unknown => Route::Plain {
            workload: None,
            target: destination,
            service: None,
        },
        Destination::Workload(workload) => to_workload(workload, destination, network, None),
        Destination::Service(service) if service.waypoint.is_some() => {
            Route::Nowhere("the service is behind a waypoint, which this version cannot reach yet")
        }
        Destination::Service(service)
            if service.load_balancer.mode == LoadBalancerMode::Passthrough =>
        {
            Route::Plain {
                workload: None,
                target: destination,
                service: Some(service),
            }
        }
        Destination::Service(service) => {
            // The mesh may have changed since: what is not a candidate any more is not taken.
            let chosen = chosen.and_then(|chosen| {
                let workload = mesh.endpoint_at(&service, destination, client, chosen)?;
                Some((workload, chosen))
            });
            match chosen
                .or_else(|| mesh.choose_endpoint(&service, destination, client, &mut random))
            {
                Some((workload, target)) => to_workload(workload, target, network, Some(service)),
                None => Route::Nowhere("the service has no healthy endpoint for this port"),
            }
        }
    }
}

fn to_workload(
    workload: Arc<Workload>,
    target: SocketAddr,
    network: &str,
    service: Option<Arc<Service>>,
) -> Route {
    if service.is_none() && workload.waypoint.is_some() {
        return Route::Nowhere(
            "the workload is behind a waypoint, which this version cannot reach yet",
        );
    }
    if *workload.network != *network {
        return Route::Nowhere(
            "the workload is on another network, which this version cannot reach yet",
        );
    }
    if OWN_PORTS.contains(&target.port()) && workload.protocol == TunnelProtocol::Hbone {
        return Route::Nowhere("the port belongs to the agent of the destination");
    }
    match workload.protocol {
        TunnelProtocol::Hbone => Route::Tunnel {
            workload,
            target,
            service,
        },
        TunnelProtocol::Tcp => Route::Plain {
            workload: Some(workload),
            target,
            service,
        },
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "each is one thing that the request or the report names"
)]
async fn tunnel(
    ours: &Ours,
    stream: TcpStream,
    source: SocketAddr,
    workload: &Workload,
    target: SocketAddr,
    service: Option<&Service>,
    client: Option<&Workload>,
    mut report: Report,
) {
    let tunnel_address = SocketAddr::new(target.ip(), HBONE_PORT);
    report.through_tunnel(tunnel_address, target);
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
    let from = dial::tunnel_source(&ours.pod, source.ip(), target.ip());
    let key = PoolKey {
        from,
        source: ours.pod.uid().as_str().into(),
        identity: ours.pod.identity.clone(),
        destination: tunnel_address,
        expected: expected(workload, service),
    };
    let request = ConnectRequest {
        authority: target.to_string(),
        forwarded: Some(format!("for=\"{source}\"")),
        baggage: client.map(baggage),
        traceparent: None,
    };
    let sockets = ours.pod.sockets.clone();
    let dial = move || dial::tunnel(sockets.clone(), from, tunnel_address);
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
            report
                .carry(stream, upstream, &ours.stop.close, || false)
                .await
        }
        Err(error) => {
            dial::reset(stream);
            report.failed(flags(&error), &error.to_string());
        }
    }
}

/// Whom the tunnel's other end may be.
fn expected(workload: &Workload, service: Option<&Service>) -> ExpectedServer {
    let mut identities = vec![workload.identity().clone()];
    let names = service
        .into_iter()
        .flat_map(|service| service.subject_alt_names.iter());
    identities.extend(names.filter_map(|name| crate::policy::Identity::parse(name).ok()));
    ExpectedServer::any_of(identities)
}

fn flags(error: &HboneError) -> ResponseFlags {
    match error {
        HboneError::Refused { status, .. } if status.as_u16() == 401 => ResponseFlags::Deny,
        HboneError::Tls { .. } => ResponseFlags::TlsFailure,
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

/// Good enough to balance load; not for secrets.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
