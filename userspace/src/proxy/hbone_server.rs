//! Port 15008: tunnels from other agents, each stream one connection to this pod's application.

use std::{
    convert::Infallible,
    future::pending,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{net::TcpStream, time::timeout};

use super::{
    Authority, Context,
    arrival::{Arrival, names_application},
    budget::{Budget, Permit},
    dial,
    hbone::{Incoming, Refusal, Stop, serve},
    inbound,
    pod::Ours,
    report::{Cut, Report},
    tls::{self, RevocationWatch},
};
use crate::{
    mesh::Mesh,
    policy::{Connection, Identity},
    telemetry::{Direction, FlowPath, Reporter, ResponseFlags},
};

/// How long a client waits for the pod's first certificate.
const CERTIFICATE_DEADLINE: Duration = Duration::from_secs(10);

/// One connection. It holds `handshake` until its client has proved an identity, then a place among `tunnels`.
pub(super) async fn handle(
    ours: Ours,
    stream: TcpStream,
    handshake: Permit,
    tunnels: &Arc<Budget>,
) {
    let Ok(arrival) = Arrival::of(&ours.pod, &stream) else {
        return;
    };
    let failed = |flags, error: String| {
        let mut report = Report::new(&ours.context.telemetry, arrival.source, arrival.destination);
        report.describe(Direction::Inbound, Reporter::Destination, FlowPath::Hbone);
        report.failed(flags, &error);
    };
    // A pod that has just been enrolled may be reached before its first certificate is there.
    let certificate = match timeout(
        CERTIFICATE_DEADLINE,
        ours.context.certificates.ready(&ours.pod.identity),
    )
    .await
    {
        Ok(Ok(certificate)) => certificate,
        Ok(Err(error)) => {
            dial::reset(stream);
            return failed(ResponseFlags::IdentityFailure, error.to_string());
        }
        Err(_) => {
            dial::reset(stream);
            return failed(
                ResponseFlags::IdentityFailure,
                "the pod has no certificate yet".to_owned(),
            );
        }
    };
    let watch = RevocationWatch::begin(&ours.context.peers, &certificate);
    let config = match tls::server_config(&certificate, &ours.context.peers) {
        Ok(config) => config,
        Err(error) => {
            dial::reset(stream);
            return failed(ResponseFlags::IdentityFailure, error.to_string());
        }
    };
    let Context { server, peers, .. } = &*ours.context;
    let accepted = tokio::select! {
        accepted = tls::accept(stream, config, server.handshake_deadline, peers) => accepted,
        () = ours.stop.close.cancelled() => return,
    };
    let accepted = match accepted {
        Ok(accepted) => accepted,
        Err(error) => return failed(ResponseFlags::TlsFailure, error.to_string()),
    };
    let source_ip = arrival.source.ip();
    let Some(_place) = tunnels.take(source_ip) else {
        dial::reset(accepted.stream.into_inner().0);
        return failed(
            ResponseFlags::Connect,
            "the pod has too many tunnels, or too many from this address".to_owned(),
        );
    };
    drop(handshake);
    let client = Client {
        identity: accepted.peer,
        not_after: accepted.not_after,
        ip: source_ip,
    };
    let tunnel = arrival.destination;
    let peer_revoked = watch.peer_revoked(accepted.stream.get_ref().1);
    // What cuts the streams of this tunnel and no others.
    let stop = Stop {
        revoked: ours.stop.close.child_token(),
        ..ours.stop.clone()
    };
    let per_stream = Ours {
        stop: stop.clone(),
        ..ours.clone()
    };
    let revoke = {
        let (stop, identity) = (stop.clone(), client.identity.clone());
        async move {
            peer_revoked.await;
            let identity = identity.map(|identity| identity.to_string());
            tracing::warn!(peer = %arrival.source, identity, "a tunnel is closed: its client's certificate was revoked");
            stop.revoked.cancel();
            pending::<Infallible>().await
        }
    };
    let handler = move |incoming: Incoming| {
        stream_into_pod(per_stream.clone(), incoming, client.clone(), tunnel)
    };
    let end = tokio::select! {
        end = serve(accepted.stream, ours.context.server, stop, handler) => end,
        never = revoke => match never {},
    };
    tracing::debug!(peer = %arrival.source, %end, "a tunnel ended");
}

/// Who a tunnel comes from.
#[derive(Clone)]
struct Client {
    identity: Option<Identity>,
    /// The end of the certificate that proved it.
    not_after: Option<SystemTime>,
    ip: IpAddr,
}

/// One CONNECT.
async fn stream_into_pod(ours: Ours, incoming: Incoming, client: Client, tunnel: SocketAddr) {
    let Client {
        identity: peer,
        not_after,
        ip: source_ip,
    } = client;
    let target = incoming.connect().target;
    // Only the port is taken from the peer's claim, and only when it names the address that the tunnel comes from.
    let claim = incoming.connect().forwarded.as_deref();
    let source = forwarded(claim, |address| {
        address.ip().to_canonical() == source_ip || !ours.context.knobs.checks_forwarded()
    })
    .unwrap_or(SocketAddr::new(source_ip, 0));
    let mesh = ours.context.mesh.load();
    let mut report = Report::new(&ours.context.telemetry, source, tunnel);
    report.describe(Direction::Inbound, Reporter::Destination, FlowPath::Hbone);
    report.inside_tunnel(target);
    report.destination(
        ours.pod.workload(&mesh).map(AsRef::as_ref),
        Some(&ours.pod.identity),
    );
    report.source(
        mesh.workload_by_ip(&ours.context.network, source_ip)
            .map(AsRef::as_ref),
        peer.as_ref(),
    );
    let Some(destination) = application(&ours, &mesh, target, tunnel) else {
        incoming.refuse(Refusal::BadRequest);
        report.refused("the request names an address or port that is not this pod's application");
        return;
    };
    // What is open goes on, as it would with a direct flow; a client that is still who it was opens a new tunnel.
    if not_after.is_some_and(|not_after| not_after <= SystemTime::now())
        && ours.context.knobs.refuses_expired_clients()
    {
        incoming.refuse(Refusal::Denied);
        report.failed(
            ResponseFlags::TlsFailure,
            "the client's certificate has expired since the tunnel was opened",
        );
        return;
    }
    let connection = Connection::new(peer, source_ip, destination);
    drop(mesh);
    let open = match inbound::admit(&ours, &connection, &ours.stop.revoked) {
        Ok((open, policy)) => {
            report.policy(policy.as_ref());
            open
        }
        Err(denial) => {
            incoming.refuse(Refusal::Denied);
            report.denied(&denial.to_string(), denial.policy());
            return;
        }
    };
    let application = match dial::to_application(&ours.pod, source, destination).await {
        Ok(application) => application,
        Err(error) => {
            incoming.refuse(Refusal::Unavailable);
            report.unreachable(&format!("the application refused: {error}"));
            return;
        }
    };
    match incoming.accept() {
        Ok(stream) => {
            let stop = &ours.stop;
            let revoked = || stop.revoked.is_cancelled() && !stop.close.is_cancelled();
            let cut = || open.cut().or(revoked().then_some(Cut::Certificate));
            report.carry(stream, application, &open.cancel, cut).await
        }
        Err(error) => {
            dial::reset(application);
            report.unreachable(&format!("the client's agent went away: {error}"));
        }
    }
}

/// Where a request for `target` leads, that came to the pod's address `tunnel`. Never to a port of ours: the connection would come back
/// here.
fn application(
    ours: &Ours,
    mesh: &Mesh,
    target: SocketAddr,
    tunnel: SocketAddr,
) -> Option<SocketAddr> {
    let Context {
        authority,
        knobs,
        network,
        ..
    } = &*ours.context;
    if names_application(&ours.pod, target) || !knobs.checks_authority() {
        return Some(target);
    }
    let here = SocketAddr::new(tunnel.ip(), target.port());
    let is_waypoint = || {
        let workload = ours.pod.workload(mesh);
        workload.is_some_and(|workload| mesh.is_waypoint_of(workload, network, target.ip()))
    };
    let leads_here = *authority == Authority::OrBehindWaypoint
        && names_application(&ours.pod, here)
        && is_waypoint();
    leads_here.then_some(here)
}

/// The first `for="address:port"` that is admissible.
fn forwarded(
    forwarded: Option<&str>,
    admissible: impl Fn(&SocketAddr) -> bool,
) -> Option<SocketAddr> {
    forwarded
        .into_iter()
        .flat_map(|value| value.split([',', ';']))
        .filter_map(|part| part.trim().strip_prefix("for="))
        .filter_map(|address| address.trim_matches('"').parse::<SocketAddr>().ok())
        .find(admissible)
        .map(|address| SocketAddr::new(address.ip().to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_port_of_the_tunnels_own_address_is_believed() {
        for (header, port) in [
            (Some("for=\"10.0.0.7:4000\""), 4000),
            (Some("proto=tcp; for=\"10.0.0.7:4000\""), 4000),
            (Some("for=10.0.0.7:4001"), 4001),
            (Some("for=\"10.0.0.8:4000\""), 0),
            (Some("for=\"10.0.0.7\""), 0),
            (Some("for=\"10.0.0.7:70000\""), 0),
            (Some("\"\"\"for=;;,,="), 0),
            (None, 0),
        ] {
            let source: IpAddr = "10.0.0.7".parse().unwrap();
            let found = forwarded(header, |address| address.ip() == source);
            assert_eq!(
                found.map_or(0, |address| address.port()),
                port,
                "{header:?}"
            );
        }
    }

    #[test]
    fn an_ipv6_address_is_read_in_brackets() {
        let source: IpAddr = "fd00::7".parse().unwrap();
        for (header, port) in [
            ("for=\"[fd00::7]:4000\"", 4000),
            ("for=\"[fd00:0:0::7]:4000\";proto=tcp", 4000),
            ("for=\"[fd00::8]:4000\"", 0),
            ("for=\"fd00::7:4000\"", 0),
            ("for=\"[fd00::7]\"", 0),
        ] {
            let found = forwarded(Some(header), |address| address.ip() == source);
            assert_eq!(found.map_or(0, |found| found.port()), port, "{header}");
        }
    }
}
