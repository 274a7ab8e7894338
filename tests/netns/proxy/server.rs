//! A tunnel's end that is not the agent: an echo server on a pod's 15008 with any certificate.

use std::{net::TcpListener as StdListener, time::SystemTime};

use anyhow::Result;
use culvert::{
    identity::DevCa,
    policy::Identity,
    proxy::{
        hbone::{ServerSettings, Stop, serve},
        tls,
    },
};
use culvert_harness::Pod;
use culvert_tests::scene::SOON;
use tokio::{net::TcpListener, task::JoinSet};

use super::peer::TUNNEL_PORT;

/// Serves until it is dropped.
pub struct Impostor {
    stop: Stop,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Impostor {
    /// Presents a certificate of `identity`.
    pub fn start(pod: &Pod, ca: &DevCa, identity: &Identity) -> Result<Self> {
        let listener = pod.in_netns(|| StdListener::bind(("0.0.0.0", TUNNEL_PORT)))??;
        listener.set_nonblocking(true)?;
        let certificate = std::sync::Arc::new(ca.issue(identity, SOON * 20, SystemTime::now())?);
        let config = tls::server_config(&certificate, tls::TestKnobs::default())?;
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
                    tunnels.spawn(async move {
                        if let Ok(accepted) =
                            tls::accept(stream, config, SOON, tls::TestKnobs::default()).await
                        {
                            serve(accepted.stream, ServerSettings::default(), stop, echo).await;
                        }
                    });
                }
            });
        });
        Ok(Self {
            stop,
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

async fn echo(incoming: culvert::proxy::hbone::Incoming) {
    if let Ok(stream) = incoming.accept() {
        let (mut read, mut write) = tokio::io::split(stream);
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut write).await;
    }
}
