//! Port 15008: tunnels from other agents, each stream one connection to this pod's application.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use tokio::net::TcpStream;

use super::{
    arrival::{Arrival, names_application},
    dial,
    hbone::{Incoming, Refusal, serve},
    inbound,
    pod::Ours,
    report::Report,
    tls,
};
use crate::{
    policy::{Connection, Identity},
    telemetry::{Direction, FlowPath, Reporter, ResponseFlags},
};

/// From the TCP connection to the end of the TLS handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

pub(super) async fn handle(ours: Ours, stream: TcpStream) {
    let Ok(arrival) = Arrival::of(&stream) else {
        return;
    };
    let failed = |flags, error: String| {
        let mut report = Report::new(&ours.context.telemetry, arrival.source, arrival.destination);
        report.describe(Direction::Inbound, Reporter::Destination, FlowPath::Hbone);
        report.failed(flags, &error);
    };
    let certificate = match ours.context.certificates.current(&ours.pod.identity, SystemTime::now()) {
        Ok(certificate) => certificate,
        Err(error) => {
            dial::reset(stream);
            return failed(ResponseFlags::IdentityFailure, error.to_string());
        }
    };
    let config = match tls::server_config(&certificate, ours.context.knobs.tls) {
        Ok(config) => config,
        Err(error) => {
            dial::reset(stream);
            return failed(ResponseFlags::IdentityFailure, error.to_string());
        }
    };
    let accepted = tokio::select! {
        accepted = tls::accept(stream, config, HANDSHAKE_DEADLINE, ours.context.knobs.tls) => accepted,
        () = ours.stop.close.cancelled() => return,
    };
    let accepted = match accepted {
        Ok(accepted) => accepted,
        Err(error) => return failed(ResponseFlags::TlsFailure, error.to_string()),
    };
    let peer = accepted.peer;
    let source_ip = arrival.source.ip();
    let tunnel = arrival.destination;
    let per_stream = ours.clone();
    let handler = move |incoming: Incoming| stream_into_pod(per_stream.clone(), incoming, peer.clone(), source_ip, tunnel);
    let end = serve(accepted.stream, ours.context.server, ours.stop.clone(), handler).await;
    tracing::debug!(peer = %arrival.source, %end, "a tunnel ended");
}

/// One CONNECT.
async fn stream_into_pod(ours: Ours, incoming: Incoming, peer: Option<Identity>, source_ip: IpAddr, tunnel: SocketAddr) {
    let target = incoming.connect().target;
    // Only the port is taken from the peer's claim, and only when it names the address that the tunnel comes from.
    let source = SocketAddr::new(source_ip, forwarded_port(incoming.connect().forwarded.as_deref(), source_ip));
    let mesh = ours.context.mesh.load();
    let mut report = Report::new(&ours.context.telemetry, source, tunnel);
    report.describe(Direction::Inbound, Reporter::Destination, FlowPath::Hbone);
    report.inside_tunnel(target);
    report.destination(ours.pod.workload(&mesh).map(AsRef::as_ref), Some(&ours.pod.identity));
    report.source(mesh.workload_by_ip(&ours.context.network, source_ip).map(AsRef::as_ref), peer.as_ref());
    if !names_application(&ours.pod, target) && ours.context.knobs.checks_authority() {
        incoming.refuse(Refusal::BadRequest);
        report.refused("the request names an address or port that is not this pod's application");
        return;
    }
    let connection = Connection::new(peer, source_ip, target);
    let open = ours.context.open.enter(&ours.pod, &connection, &ours.stop.close);
    match inbound::authorize(&mesh, &ours.pod, &connection, ours.context.knobs) {
        Ok(policy) => report.policy(policy.as_ref()),
        Err(denial) => {
            incoming.refuse(Refusal::Denied);
            report.denied(&denial.to_string(), denial.policy());
            return;
        }
    }
    drop(mesh);
    let application = match dial::to_application(&ours.pod, source, target).await {
        Ok(application) => application,
        Err(error) => {
            incoming.refuse(Refusal::Unavailable);
            report.unreachable(&format!("the application refused: {error}"));
            return;
        }
    };
    match incoming.accept() {
        Ok(stream) => report.carry(stream, application, &open.cancel, || open.was_revoked()).await,
        Err(error) => {
            dial::reset(application);
            report.unreachable(&format!("the client's agent went away: {error}"));
        }
    }
}

/// The port of `for="address:port"`, 0 if there is none or it belongs to another address.
fn forwarded_port(forwarded: Option<&str>, source: IpAddr) -> u16 {
    forwarded
        .into_iter()
        .flat_map(|value| value.split([',', ';']))
        .filter_map(|part| part.trim().strip_prefix("for="))
        .filter_map(|address| address.trim_matches('"').parse::<SocketAddr>().ok())
        .find(|address| address.ip().to_canonical() == source)
        .map_or(0, |address| address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_port_of_the_tunnels_own_address_is_believed() {
        let source: IpAddr = "10.0.0.7".parse().unwrap();
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
            assert_eq!(forwarded_port(header, source), port, "{header:?}");
        }
    }
}
