//! A real client of gRPC over TLS on the loopback device.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost::Message as _;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::fixture::ControlPlane;
use super::*;
use crate::identity::certificate::PROVIDER;
use crate::identity::{Roots, Validity, WorkloadCertificate, spiffe};
use crate::wire::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::wire::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
};
use crate::wire::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::wire::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use crate::wire::istio::workload::{self, address::Type};

const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const PATIENCE: Duration = Duration::from_secs(20);

impl ControlPlane {
    async fn channel(&self) -> Channel {
        let address = self.address();
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(self.root()).unwrap())
            .unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = TlsConnector::from(Arc::new(config));
        let connect = tower::service_fn(move |_| {
            let (connector, address) = (connector.clone(), address.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::try_from("localhost").unwrap();
                let stream = connector.connect(name, stream).await?;
                Ok::<_, io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        endpoint.connect_with_connector(connect).await.unwrap()
    }

    async fn certificate(
        &self,
        request: IstioCertificateRequest,
    ) -> Result<IstioCertificateResponse, Status> {
        let mut client = IstioCertificateServiceClient::new(self.channel().await);
        let answer = client.create_certificate(request).await?;
        Ok(answer.into_inner())
    }
}

async fn start(token: Option<&str>) -> ControlPlane {
    ControlPlane::start(&mesh("n1"), token).await
}

fn mesh(node: &str) -> String {
    let workload = |name: &str, ip: &str| {
        format!(
            "  - {{uid: {name}, name: {name}, namespace: shop, workloadIps: [{ip}], node: {node}}}\n"
        )
    };
    format!(
        "workloads:\n{}{}",
        workload("web", "10.0.0.1"),
        workload("cart", "10.0.0.2")
    )
}

/// Asks until the answer is what the behaviour makes of it.
async fn certificate_becomes(plane: &ControlPlane, expected: impl Fn(&Leaf) -> bool) {
    let became = async {
        loop {
            let answer = plane.certificate(signing_request(CART).0).await;
            if expected(&Leaf::of(plane, answer)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, became).await.unwrap();
}

/// What is to be seen of an answer of the CA.
#[derive(Debug, PartialEq)]
enum Leaf {
    Refused(Code),
    Given {
        identity: String,
        expired: bool,
        certificates: usize,
        own_root: bool,
    },
}

impl Leaf {
    fn of(plane: &ControlPlane, answer: Result<IstioCertificateResponse, Status>) -> Self {
        let chain = match answer {
            Ok(answer) => answer.cert_chain,
            Err(status) => return Self::Refused(status.code()),
        };
        let root = CertificateDer::from_pem_file(plane.root()).unwrap();
        let der: Vec<_> = chain
            .iter()
            .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
            .collect();
        let leaf = spiffe::parse(&der[0]).unwrap();
        Self::Given {
            identity: spiffe::identity_in(&leaf).unwrap().to_string(),
            expired: Validity::of(&leaf).unwrap().expired(SystemTime::now()),
            certificates: der.len(),
            own_root: der.last() == Some(&root),
        }
    }

    fn given(identity: &str, expired: bool, certificates: usize, own_root: bool) -> Self {
        Self::Given {
            identity: identity.to_owned(),
            expired,
            certificates,
            own_root,
        }
    }
}

/// A stream of xDS that asks for all addresses.
struct Agent {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Agent {
    async fn connect(plane: &ControlPlane, token: Option<&str>) -> Result<Self, Status> {
        let mut client = AggregatedDiscoveryServiceClient::new(plane.channel().await);
        let (requests, receiver) = mpsc::channel(8);
        let stream = unfold(receiver, |mut receiver| async {
            Some((receiver.recv().await?, receiver))
        });
        let mut request = Request::new(stream);
        if let Some(token) = token {
            let value = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        let first = DeltaDiscoveryRequest {
            type_url: ADDRESS.to_owned(),
            resource_names_subscribe: vec!["*".to_owned()],
            ..DeltaDiscoveryRequest::default()
        };
        requests.send(first).await.unwrap();
        let responses = client
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        Ok(Self {
            requests,
            responses,
        })
    }

    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let response = tokio::time::timeout(PATIENCE, self.responses.message());
        Ok(response
            .await
            .expect("an answer in time")?
            .expect("a stream that goes on"))
    }
}

/// Name and node of the workloads in a response.
fn workloads(response: &DeltaDiscoveryResponse) -> Vec<(String, String)> {
    let resources = response.resources.iter().map(|resource| {
        let resource = Resource::decode(resource.clone()).unwrap();
        let any = resource.resource.as_ref().unwrap();
        assert_eq!(any.type_url, ADDRESS);
        let address = workload::Address::decode(&*any.value).unwrap();
        match address.r#type {
            Some(Type::Workload(workload)) => (resource.name.clone(), workload.node),
            other => panic!("{other:?}"),
        }
    });
    resources.collect()
}

/// A request for a certificate that asks for `name`, with its private key.
fn signing_request(name: &str) -> (IstioCertificateRequest, KeyPair) {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(name.try_into().unwrap())];
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let value = prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(name.to_owned())),
    };
    let fields = [("ImpersonatedIdentity".to_owned(), value)].into();
    let request = IstioCertificateRequest {
        csr,
        validity_duration: 3600,
        metadata: Some(prost_types::Struct { fields }),
    };
    (request, key)
}

#[tokio::test]
async fn agents_hear_of_the_mesh_and_of_each_change() {
    let plane = start(None).await;
    let mut agents = Vec::new();
    for _ in 0..3 {
        agents.push(Agent::connect(&plane, None).await.unwrap());
    }
    let pair = |node: &str| ["cart", "web"].map(|name| (name.to_owned(), node.to_owned()));
    for agent in &mut agents {
        let first = agent.next().await.unwrap();
        assert_eq!(workloads(&first), pair("n1"));
        let ack = DeltaDiscoveryRequest {
            type_url: ADDRESS.to_owned(),
            response_nonce: first.nonce,
            ..DeltaDiscoveryRequest::default()
        };
        agent.requests.send(ack).await.unwrap();
    }
    plane.write(&mesh("n2"));
    for agent in &mut agents {
        assert_eq!(workloads(&agent.next().await.unwrap()), pair("n2"));
    }
    plane.end().await;
    let status = agents[0].next().await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
}

#[tokio::test]
async fn a_certificate_is_that_of_the_requests_key_and_leads_to_the_root() {
    let plane = start(None).await;
    let (request, key) = signing_request(CART);
    let answer = plane.certificate(request).await.unwrap();
    let chain: Vec<_> = answer
        .cert_chain
        .iter()
        .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap())
        .collect();
    let root = CertificateDer::from_pem_file(plane.root()).unwrap();
    assert_eq!(&chain[1..], std::slice::from_ref(&root));

    // That the key fits is checked here.
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let roots = Roots::new(vec![root]).unwrap();
    let certificate = WorkloadCertificate::new(chain, key, roots).unwrap();
    assert_eq!(certificate.identity().to_string(), CART);
    let left = certificate
        .validity()
        .not_after
        .duration_since(SystemTime::now())
        .unwrap();
    assert!(
        left <= Duration::from_secs(3600) && left > Duration::from_secs(3500),
        "{left:?}"
    );
    plane.end().await;
}

#[tokio::test]
async fn requests_that_prove_nothing_get_no_certificate() {
    let plane = start(None).await;
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    let (good, _) = signing_request(CART);
    let swapped = IstioCertificateRequest {
        metadata: signing_request(other).0.metadata,
        ..good.clone()
    };
    let unnamed = IstioCertificateRequest {
        metadata: None,
        ..good.clone()
    };
    let nonsense = IstioCertificateRequest {
        csr: "nonsense".to_owned(),
        ..good.clone()
    };
    let foreign = signing_request("spiffe://elsewhere/ns/shop/sa/cart").0;
    for (request, code, words) in [
        (swapped, Code::InvalidArgument, "must be the same"),
        (unnamed, Code::InvalidArgument, "ImpersonatedIdentity"),
        (nonsense, Code::InvalidArgument, "cannot be read"),
        (foreign, Code::PermissionDenied, "trust domain"),
    ] {
        let status = plane.certificate(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(words), "{status}");
    }
    plane.end().await;
}

#[tokio::test]
async fn only_who_has_the_token_is_admitted() {
    let plane = start(Some("s3cret\n")).await;
    for token in [None, Some("guess"), Some("")] {
        let refused = Agent::connect(&plane, token).await.map(drop).unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
    }
    let refused = plane
        .certificate(signing_request(CART).0)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let mut agent = Agent::connect(&plane, Some("s3cret")).await.unwrap();
    assert_eq!(agent.next().await.unwrap().resources.len(), 2);
    plane.end().await;
}

#[tokio::test]
async fn the_ca_misbehaves_as_told_and_then_no_more() {
    let plane = start(None).await;
    let other = "spiffe://cluster.local/ns/somewhere/sa/else";
    for (fault, expected) in [
        ("refuse", Leaf::Refused(Code::PermissionDenied)),
        ("other-identity", Leaf::given(other, false, 2, true)),
        ("expired", Leaf::given(CART, true, 2, true)),
        ("other-root", Leaf::given(CART, false, 2, false)),
        ("leaf-only", Leaf::given(CART, false, 1, false)),
    ] {
        plane.misbehave(&format!("ca: [{fault}]"));
        certificate_becomes(&plane, |leaf| *leaf == expected).await;
    }
    plane.behave();
    certificate_becomes(&plane, |leaf| *leaf == Leaf::given(CART, false, 2, true)).await;
    plane.end().await;
}

#[tokio::test]
async fn xds_misbehaves_as_told_and_then_no_more() {
    let plane = start(None).await;
    let mut agent = Agent::connect(&plane, None).await.unwrap();
    assert_eq!(agent.next().await.unwrap().resources.len(), 2);

    // One resource is spoilt, and then whole again; the other is left alone.
    plane.misbehave("xds: [{garbage: web}]");
    let spoilt = agent.next().await.unwrap().resources;
    assert_eq!(spoilt.len(), 1);
    let spoilt = Resource::decode(spoilt[0].clone()).unwrap();
    let value = &spoilt.resource.as_ref().unwrap().value;
    assert!(workload::Address::decode(&**value).is_err());
    plane.misbehave("");
    let whole = [("web".to_owned(), "n1".to_owned())];
    assert_eq!(workloads(&agent.next().await.unwrap()), whole);

    // Nothing is heard while the stream is stalled; then what was missed.
    // A behaviour that the CA shows is that of each later mesh.
    plane.misbehave("xds: [stall]\nca: [leaf-only]");
    certificate_becomes(&plane, |leaf| *leaf == Leaf::given(CART, false, 1, false)).await;
    plane.write(&mesh("n2"));
    let silence = tokio::time::timeout(Duration::from_millis(500), agent.responses.message());
    assert!(silence.await.is_err());
    plane.misbehave("xds: [wrong-version, wrong-response-type]");
    let late = agent.next().await.unwrap();
    assert_eq!(late.resources.len(), 2);
    assert_ne!(late.type_url, ADDRESS);
    assert!(
        late.resources
            .iter()
            .all(|resource| Resource::decode(resource.clone()).unwrap().version == "0")
    );

    // Four responses were sent.
    plane.misbehave("xds: [{reset-after: 4}]\nca: [expired]");
    certificate_becomes(&plane, |leaf| *leaf == Leaf::given(CART, true, 2, true)).await;
    plane.write(&mesh("n3"));
    assert_eq!(agent.next().await.unwrap_err().code(), Code::Unavailable);
    plane.end().await;
}
