//! A tunnel's end that is not the agent: an echo server on a pod's 15008 with any certificate.

use std::{net::TcpListener as StdListener, time::SystemTime};

use anyhow::Result;
use culvert::{
    identity::DevCa,
    policy::Identity,
    proxy::{
        hbone::{Incoming, ServerSettings, Stop, serve},
        tls,
    },
};
use culvert_harness::Pod;
use culvert_tests::scene::SOON;
use rustls::pki_types::CertificateDer;
use tokio::{net::TcpListener, task::JoinSet};

use super::peer::TUNNEL_PORT;

/// Serves until it is dropped.
pub struct Impostor {
    stop: Stop,
    /// What it presents, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Impostor {
    /// Presents a certificate of `identity`, and sends back what it is sent.
    pub fn start(pod: &Pod, ca: &DevCa, identity: &Identity) -> Result<Self> {
        Self::with(pod, ca, identity, echo)
    }

    /// Sends what it was asked to connect to, as a waypoint would have to know it.
    pub fn telling(pod: &Pod, ca: &DevCa, identity: &Identity) -> Result<Self> {
        Self::with(pod, ca, identity, tell)
    }

    fn with<F>(
        pod: &Pod,
        ca: &DevCa,
        identity: &Identity,
        handler: impl Fn(Incoming) -> F + Clone + Send + 'static,
    ) -> Result<Self>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let any = match pod.address_v6() {
            Some(_) => "::",
            None => "0.0.0.0",
        };
        let listener = pod.in_netns(|| StdListener::bind((any, TUNNEL_PORT)))??;
        listener.set_nonblocking(true)?;
        let certificate = std::sync::Arc::new(ca.issue(identity, SOON * 20, SystemTime::now())?);
        let chain = certificate.chain().to_vec();
        let config = tls::server_config(&certificate, &tls::PeerChecks::default())?;
        let stop = Stop::default();
        let until = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("a listener");
                let mut tunnels = JoinSet::new();
                while let Some(Ok((stream, _))) =
                    until.close.run_until_cancelled(listener.accept()).await
                {
                    let (config, stop) = (config.clone(), until.clone());
                    let handler = handler.clone();
                    tunnels.spawn(async move {
                        if let Ok(accepted) =
                            tls::accept(stream, config, Some(SOON), &tls::PeerChecks::default())
                                .await
                        {
                            serve(accepted.stream, ServerSettings::default(), stop, handler).await;
                        }
                    });
                }
            });
        });
        Ok(Self {
            stop,
            chain,
            thread: Some(thread),
        })
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.stop.close.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn echo(incoming: Incoming) {
    if let Ok(stream) = incoming.accept() {
        let (mut read, mut write) = tokio::io::split(stream);
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut write).await;
    }
}

async fn tell(incoming: Incoming) {
    let target = incoming.connect().target.to_string();
    if let Ok(mut stream) = incoming.accept() {
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, target.as_bytes()).await;
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut stream).await;
    }
}
