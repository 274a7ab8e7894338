//! For tests: a real HBONE server on loopback with certificates of a fresh CA, and a pool that reaches it.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::*;
use crate::identity::{DevCa, WorkloadCertificate};
use crate::policy::Identity;
use crate::proxy::tls::{self, ExpectedServer, PeerChecks};

pub(crate) const DAY: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn identity(service_account: &str) -> Identity {
    Identity::parse(&format!(
        "spiffe://cluster.local/ns/shop/sa/{service_account}"
    ))
    .unwrap()
}

pub(crate) struct Ca {
    pub(crate) ca: DevCa,
    _directory: tempfile::TempDir,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            ca: DevCa::open(directory.path(), "cluster.local").unwrap(),
            _directory: directory,
        }
    }

    pub(crate) fn issue(&self, service_account: &str) -> Arc<WorkloadCertificate> {
        Arc::new(
            self.ca
                .issue(&identity(service_account), DAY, SystemTime::now())
                .unwrap(),
        )
    }
}

/// A server whose handler is a closure, and how each of its tunnels ended.
pub(crate) struct Server {
    pub(crate) ca: Ca,
    pub(crate) address: SocketAddr,
    pub(crate) stop: Stop,
    pub(crate) handshakes: Arc<AtomicUsize>,
    pub(crate) ends: mpsc::UnboundedReceiver<ServeEnd>,
    _tasks: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start<H, F>(settings: ServerSettings, handler: H) -> Self
    where
        H: Fn(Incoming) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let ca = Ca::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, handshakes) = (Stop::default(), Arc::new(AtomicUsize::new(0)));
        let (told, ends) = mpsc::unbounded_channel();
        let certificate = ca.issue("server");
        let mut tasks = JoinSet::new();
        tasks.spawn({
            let (stop, handshakes) = (stop.clone(), handshakes.clone());
            async move {
                let mut tunnels = JoinSet::new();
                loop {
                    let (tcp, _) = listener.accept().await.unwrap();
                    tcp.set_nodelay(true).unwrap();
                    let (certificate, handler, stop) =
                        (certificate.clone(), handler.clone(), stop.clone());
                    let (handshakes, told) = (handshakes.clone(), told.clone());
                    tunnels.spawn(async move {
                        let config =
                            tls::server_config(&certificate, &PeerChecks::default()).unwrap();
                        let accepted = tls::accept(
                            tcp,
                            config,
                            Some(Duration::from_secs(5)),
                            &PeerChecks::default(),
                        )
                        .await;
                        let Ok(accepted) = accepted else { return };
                        handshakes.fetch_add(1, Ordering::SeqCst);
                        let end = serve(accepted.stream, settings, stop, handler).await;
                        let _ = told.send(end);
                    });
                }
            }
        });
        Self {
            ca,
            address,
            stop,
            handshakes,
            ends,
            _tasks: tasks,
        }
    }

    /// Sends back whatever comes, half-close included.
    pub(crate) async fn echo(settings: ServerSettings) -> Self {
        Self::start(settings, echo).await
    }

    pub(crate) fn handshakes(&self) -> usize {
        self.handshakes.load(Ordering::SeqCst)
    }

    pub(crate) fn client(&self, settings: PoolSettings) -> Client {
        Client {
            pool: Pool::new(settings, PeerChecks::default()),
            certificate: self.ca.issue("client"),
            key: PoolKey {
                source: "pod-1".into(),
                from: None,
                identity: identity("client"),
                destination: self.address,
                expected: ExpectedServer::one(identity("server")),
            },
        }
    }
}

pub(crate) async fn echo(incoming: Incoming) {
    if let Ok(mut stream) = incoming.accept() {
        loop {
            match std::future::poll_fn(|cx| stream.poll_chunk(cx)).await {
                Ok(Some(mut chunk)) => {
                    while !chunk.is_empty() {
                        if std::future::poll_fn(|cx| stream.poll_send(cx, &mut chunk))
                            .await
                            .is_err()
                        {
                            return;
                        }
                    }
                }
                Ok(None) => return drop(stream.finish()),
                Err(_) => return,
            }
        }
    }
}

pub(crate) struct Client {
    pub(crate) pool: Pool,
    pub(crate) certificate: Arc<WorkloadCertificate>,
    pub(crate) key: PoolKey,
}

impl Client {
    pub(crate) async fn connect(&self) -> Result<HboneStream, HboneError> {
        self.connect_to("10.0.0.1:80").await
    }

    pub(crate) async fn connect_to(&self, authority: &str) -> Result<HboneStream, HboneError> {
        let request = ConnectRequest {
            authority: authority.into(),
            ..ConnectRequest::default()
        };
        let address = self.key.destination;
        self.pool
            .connect(&self.key, &self.certificate, &request, move || {
                dial(address)
            })
            .await
    }
}

pub(crate) async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
