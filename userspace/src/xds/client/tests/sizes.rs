//! How large a response may be: against a server that sends what it is told to, in one message.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;

use bytes::Bytes;
use futures_util::stream::{StreamExt as _, iter, unfold};
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tonic::transport::Server;
use tonic::{Response, Streaming};

use super::*;
use crate::dev_control_plane::{ca, server};
use crate::identity::DevCa;
use crate::wire::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use crate::wire::envoy::service::discovery::v3::{Content, DeltaDiscoveryResponse, Resource};
use crate::wire::istio::workload::{Address as AddressMessage, Workload, address::Type};

type Responses = Vec<DeltaDiscoveryResponse>;

/// What each stream sends, one after the other. A stream without anything to send is not answered before it has.
struct Script(Mutex<mpsc::Receiver<Responses>>);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Script {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn futures_util::Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let responses = self.0.lock().await.recv().await;
        let responses = responses.ok_or_else(|| Status::unavailable("the end"))?;
        let sent = iter(responses).map(Ok);
        // As long as there is a client that may answer.
        let rest = unfold(request.into_inner(), |mut requests| async move {
            while let Ok(Some(_)) = requests.message().await {}
            None::<(Result<DeltaDiscoveryResponse, Status>, _)>
        });
        Ok(Response::new(Box::pin(sent.chain(rest))))
    }
}

/// A server of that, which ends with it.
struct Scripted {
    directory: tempfile::TempDir,
    address: SocketAddr,
    script: mpsc::Sender<Responses>,
    shutdown: CancellationToken,
}

impl Scripted {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = DevCa::open(directory.path(), "cluster.local").unwrap();
        let roots: String = authority
            .roots()
            .certificates()
            .iter()
            .map(ca::pem)
            .collect();
        let validity = authority.validity_from(SystemTime::now(), SOON * 20);
        let (leaf, key) = authority
            .issue_server(&["localhost".to_owned()], validity.unwrap())
            .unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let (accepts, accepted) = mpsc::channel(1);
        let tls = server::tls_config(leaf, key).unwrap();
        tokio::spawn(server::accept(listener, tls, accepts, shutdown.clone()));
        let connections = ReceiverStream::new(accepted).map(Ok::<_, std::io::Error>);
        let (script, told) = mpsc::channel(4);
        let service = AggregatedDiscoveryServiceServer::new(Script(Mutex::new(told)));
        let until = shutdown.clone().cancelled_owned();
        tokio::spawn(async move {
            let server = Server::builder().add_service(service);
            let served = server.serve_with_incoming_shutdown(connections, until);
            served.await
        });
        let started = Self {
            directory,
            address,
            script,
            shutdown,
        };
        std::fs::write(started.root(), roots).unwrap();
        started
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("root-cert.pem")
    }

    fn client(&self) -> Running {
        Running::start(channel(&self.address.to_string(), &self.root()))
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn response(kind: ResourceType, resources: Vec<Bytes>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: kind.url().to_owned(),
        nonce: "1".to_owned(),
        resources,
        ..DeltaDiscoveryResponse::default()
    }
}

/// A mesh without policies, in one response for each type.
fn mesh_with(workloads: Vec<Bytes>) -> Responses {
    vec![
        response(ResourceType::Authorization, Vec::new()),
        response(ResourceType::Address, workloads),
    ]
}

/// A workload that says so much about itself, in bytes.
fn workload_of(name: &str, size: usize) -> Bytes {
    let workload = Workload {
        uid: name.to_owned(),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        canonical_name: "x".repeat(size),
        ..Workload::default()
    };
    let address = AddressMessage {
        r#type: Some(Type::Workload(workload)),
    };
    let resource = Resource {
        version: "1".to_owned(),
        resource: Some(Content {
            type_url: ResourceType::Address.url().to_owned(),
            value: address.encode_to_vec().into(),
        }),
        name: name.to_owned(),
        aliases: Vec::new(),
    };
    resource.encode_to_vec().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_of_more_than_4_mib_in_one_message_is_taken() {
    const COUNT: usize = 5000;
    let server = Scripted::start().await;
    let mut running = server.client();
    let workloads = (0..COUNT).map(|number| workload_of(&format!("web-{number}"), 1000));
    let responses = mesh_with(workloads.collect());
    let size = responses[1].encoded_len();
    // What clients of gRPC take unless they are told otherwise.
    assert!(size > 4 << 20, "{size}");
    server.script.send(responses).await.unwrap();
    running.mesh(|mesh| mesh.workloads().len() == COUNT).await;
    let status = running.status(|status| status.unanswered.is_empty()).await;
    assert_eq!(status.counts.messages, [1, 1]);
    assert_eq!(status.counts.bytes[0], size as u64);
    assert_eq!(status.counts.refused, 0);
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_over_the_limit_ends_the_connection_and_the_mesh_stays() {
    let server = Scripted::start().await;
    let mut running = server.client();
    let mut responses = mesh_with(vec![workload_of("web", 1)]);
    // Zeros take no memory before they are copied.
    let large = response(ResourceType::Address, vec![vec![0; MOST_BYTES + 1].into()]);
    responses.push(large);
    server.script.send(responses).await.unwrap();
    let lost = running
        .status(|status| status.lost_at.is_some() && status.in_force.is_some())
        .await;
    let error = lost.error.unwrap();
    assert!(
        error.contains("does not take: OutOfRange") && error.contains(&MOST_BYTES.to_string()),
        "{error}"
    );
    assert_eq!(lost.counts.terminations[Termination::Error as usize], 1);
    assert!(running.store.load().workload_by_uid("web").is_some());

    let next = mesh_with(vec![workload_of("db", 1)]);
    server.script.send(next).await.unwrap();
    let mesh = running
        .mesh(|mesh| mesh.workload_by_uid("db").is_some())
        .await;
    assert!(mesh.workload_by_uid("web").is_some());
    running.end().await;
}
