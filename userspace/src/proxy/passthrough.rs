//! Out of a pod to what is not in the mesh: plain TCP, with an address of the pod as source.

use std::net::SocketAddr;

use tokio::net::TcpStream;

use super::{dial, pod::Ours, report::Report};

pub(super) async fn carry(
    ours: &Ours,
    stream: TcpStream,
    source: SocketAddr,
    destination: SocketAddr,
    report: Report,
) {
    let from = dial::plain_source(&ours.pod, source.ip(), destination.ip());
    match dial::out_of_pod(ours.pod.sockets.clone(), from, destination).await {
        Ok(upstream) => {
            report
                .carry(stream, upstream, &ours.stop.close, || None)
                .await
        }
        Err(error) => {
            dial::reset(stream);
            report.unreachable(&format!("cannot connect to {destination}: {error}"));
        }
    }
}
