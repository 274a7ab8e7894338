//! A control plane that sends what it is told, when it is told, and times the acknowledgement.

use std::net::{Ipv4Addr, TcpListener as StdListener};
use std::path::PathBuf;
use std::pin::Pin;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use culvert::dev_control_plane::server::{accept, tls_config};
use culvert::identity::DevCa;
use culvert::wire::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use culvert::wire::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use culvert_harness::{Node, Pod};
use rustls_pki_types::pem::PemObject as _;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::mesh;

pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
const HOUR: Duration = Duration::from_secs(3600);
/// Pushes under way.
const QUEUE: usize = 4;

/// The control plane, in the network namespace of a node.
pub struct Server {
    address: String,
    root: PathBuf,
    workloads: u32,
    pushes: mpsc::Sender<Push>,
    acknowledged: mpsc::Receiver<Outcome>,
    shutdown: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// Resources to send, encoded, as many as one wants.
type Push = Vec<Bytes>;

/// What came of a push: how long it took, or why it was refused.
type Outcome = Result<Duration, String>;

/// Where pushes come from, and where what came of them goes.
type Parts = (mpsc::Receiver<Push>, mpsc::Sender<Outcome>);

/// What one agent is told.
struct Teller {
    /// Taken by the one stream that there is.
    parts: Mutex<Option<Parts>>,
}

impl Server {
    /// Listens. The agent's first request is answered by [`Self::push_all`].
    pub fn start(node: &Node, workloads: u32) -> Result<Self> {
        let listener = node.in_netns(|| StdListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
        listener.set_nonblocking(true)?;
        let address = format!("https://{}", listener.local_addr()?);
        let directory = node.directory().join("control-plane");
        let ca = DevCa::open(&directory, "cluster.local")?;
        let validity = ca.validity_from(SystemTime::now(), HOUR)?;
        let (certificate, key) = ca.issue_server(&["127.0.0.1".to_owned()], validity)?;
        let root = directory.join("root.pem");
        write_root(&ca, &root)?;
        let tls = tls_config(certificate, key)?;
        let (pushes, to_send) = mpsc::channel(QUEUE);
        let (done, acknowledged) = mpsc::channel(QUEUE);
        let teller = Teller {
            parts: Mutex::new(Some((to_send, done))),
        };
        let shutdown = CancellationToken::new();
        let until = shutdown.clone();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let thread = std::thread::spawn(move || {
            runtime.block_on(async move {
                let Ok(listener) = TcpListener::from_std(listener) else {
                    return;
                };
                let (connected, connections) = mpsc::channel(QUEUE);
                let accepting = tokio::spawn(accept(listener, tls, connected, until.clone()));
                let connections = ReceiverStream::new(connections).map(Ok::<_, std::io::Error>);
                let service = AggregatedDiscoveryServiceServer::new(teller);
                let serving = tonic::transport::Server::builder()
                    .add_service(service)
                    .serve_with_incoming(connections);
                let _ = until.run_until_cancelled(serving).await;
                accepting.abort();
            });
        });
        Ok(Self {
            address,
            root,
            workloads,
            pushes,
            acknowledged,
            shutdown,
            thread: Some(thread),
        })
    }

    /// What an agent needs to know.
    pub fn variables(&self) -> [(String, String); 3] {
        [
            ("LOCAL_XDS_PATH", String::new()),
            ("XDS_ADDRESS", self.address.clone()),
            ("XDS_ROOT_CA", self.root.display().to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
    }

    /// Waits until the agent has asked for everything.
    pub fn asked(&mut self, patience: Duration) -> Result<()> {
        self.wait(patience).map(drop)
    }

    /// Sends the whole mesh, as it is after so many changes; returns how long it took until that was in force.
    pub fn push_all(
        &mut self,
        changes: u32,
        pods: &[&Pod],
        patience: Duration,
    ) -> Result<Duration> {
        let all = (0..self.workloads).map(|number| mesh::workload(number, changes));
        let pods = pods.iter().map(|pod| mesh::of_pod(pod));
        self.push(all.chain(pods).collect(), patience)
    }

    /// The same for one workload that changes.
    pub fn change(&mut self, number: u32, patience: Duration) -> Result<Duration> {
        let which = number.wrapping_mul(7919) % self.workloads;
        self.push(vec![mesh::workload(which, number + 1)], patience)
    }

    fn push(&mut self, push: Push, patience: Duration) -> Result<Duration> {
        self.pushes
            .blocking_send(push)
            .context("the control plane of the benchmark has ended")?;
        self.wait(patience)
    }

    fn wait(&mut self, patience: Duration) -> Result<Duration> {
        let until = Instant::now() + patience;
        loop {
            match self.acknowledged.try_recv() {
                Ok(outcome) => return outcome.map_err(anyhow::Error::msg),
                Err(_) if Instant::now() > until => bail!("no acknowledgement in time"),
                // The time is taken by the server, not here.
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_root(ca: &DevCa, path: &std::path::Path) -> Result<()> {
    let roots = ca.roots().certificates();
    let root = roots.first().context("the CA has no root")?;
    let pem = culvert::dev_control_plane::ca::pem(root);
    ensure!(rustls_pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).is_ok());
    std::fs::write(path, pem).with_context(|| format!("writing {}", path.display()))
}

type Responses =
    Pin<Box<dyn tokio_stream::Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Teller {
    type DeltaAggregatedResourcesStream = Responses;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let parts = self.parts.lock().await.take();
        let (pushes, done) = parts.ok_or_else(|| Status::unavailable("one stream is served"))?;
        let (responses, stream) = mpsc::channel(QUEUE);
        tokio::spawn(tell(request.into_inner(), pushes, done, responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Answers the first requests, then sends each push and waits until it is acknowledged.
async fn tell(
    mut requests: Streaming<DeltaDiscoveryRequest>,
    mut pushes: mpsc::Receiver<Push>,
    done: mpsc::Sender<Outcome>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
) {
    let mut sent: Option<Instant> = None;
    let mut asked = false;
    let mut nonce = 0_u64;
    loop {
        let idle = asked && sent.is_none();
        tokio::select! {
            request = requests.message() => {
                let Ok(Some(request)) = request else { return };
                let first = request.response_nonce.is_empty();
                if first && request.type_url == ADDRESS {
                    asked = true;
                    let _ = done.send(Ok(Duration::ZERO)).await;
                }
                if first && request.type_url != ADDRESS {
                    nonce += 1;
                    let nothing = response(request.type_url, nonce, Vec::new());
                    let _ = responses.send(Ok(nothing)).await;
                } else if !first && request.type_url == ADDRESS
                    && let Some(began) = sent.take()
                {
                    let outcome = match request.error_detail {
                        None => Ok(began.elapsed()),
                        Some(error) => Err(error.message),
                    };
                    let _ = done.send(outcome).await;
                }
            }
            Some(push) = pushes.recv(), if idle => {
                nonce += 1;
                let push = response(ADDRESS.to_owned(), nonce, push);
                sent = Some(Instant::now());
                let _ = responses.send(Ok(push)).await;
            }
        }
    }
}

fn response(type_url: String, nonce: u64, resources: Vec<Bytes>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url,
        nonce: nonce.to_string(),
        resources,
        ..DeltaDiscoveryResponse::default()
    }
}
