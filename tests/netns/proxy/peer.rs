//! A client of the tunnel port that is not the agent: it presents what it likes, asks for what it likes, and tells what it got.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use culvert::{
    identity::{DevCa, Validity, certificate::PROVIDER},
    policy::Identity,
};
use culvert_harness::Pod;
use culvert_tests::scene::{NAMESPACE, SOON, Scene};
use http::{Method, Request, Version, uri};
use rcgen::SanType;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

pub const TUNNEL_PORT: u16 = 15008;
const HOUR: Duration = Duration::from_secs(3600);

/// What a peer proves itself with: leaf and key, or nothing.
pub type Proof = Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>;

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No answer: the connection, the handshake or the tunnel failed.
    Failed(String),
    /// Another status than 200.
    Status(u16),
    /// 200, and what the application sent.
    Data(String),
}

impl Outcome {
    pub fn reached(&self) -> bool {
        matches!(self, Self::Data(_))
    }
}

/// The development CA that both agents of the scene use.
pub fn mesh_ca(scene: &Scene) -> Result<DevCa> {
    Ok(DevCa::open(
        &scene.node1.shared_directory().join("dev-ca"),
        "cluster.local",
    )?)
}

/// Another root of the same name and trust domain.
pub fn foreign_ca(scene: &Scene) -> Result<DevCa> {
    Ok(DevCa::open(
        &scene.fabric.directory().join("foreign-ca"),
        "cluster.local",
    )?)
}

pub fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{account}")
}

pub fn valid_now() -> Validity {
    valid_around(SystemTime::now())
}

pub fn valid_around(moment: SystemTime) -> Validity {
    Validity {
        not_before: moment - HOUR,
        not_after: moment + HOUR,
    }
}

/// From when until when a leaf holds.
pub fn validity_of(leaf: &CertificateDer<'_>) -> Result<Validity> {
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf)?;
    let validity = leaf.validity();
    let at = |seconds: i64| -> Result<SystemTime> {
        Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.try_into()?))
    };
    Ok(Validity {
        not_before: at(validity.not_before.timestamp())?,
        not_after: at(validity.not_after.timestamp())?,
    })
}

pub fn expired() -> Validity {
    let now = SystemTime::now();
    Validity {
        not_before: now - 2 * HOUR,
        not_after: now - HOUR,
    }
}

pub fn not_yet_valid() -> Validity {
    let now = SystemTime::now();
    Validity {
        not_before: now + HOUR,
        not_after: now + 2 * HOUR,
    }
}

/// A leaf with these URIs as names.
pub fn proof(ca: &DevCa, names: &[&str], validity: Validity) -> Result<Proof> {
    let names = names
        .iter()
        .map(|name| Ok(SanType::URI((*name).try_into()?)))
        .collect::<Result<Vec<_>>>()?;
    Ok(Some(ca.issue_names(names, validity)?))
}

/// What the agent of `account`'s pod would present.
pub fn genuine(scene: &Scene, account: &str) -> Result<Proof> {
    proof(&mesh_ca(scene)?, &[&spiffe(account)], valid_now())
}

pub fn identity(account: &str) -> Result<Identity> {
    Ok(Identity::parse(&spiffe(account))?)
}

/// CONNECT to this authority, as it stands.
pub fn connect_request(authority: &str) -> Result<Request<()>> {
    let mut parts = uri::Parts::default();
    parts.authority = Some(authority.parse()?);
    let uri = http::Uri::from_parts(parts)?;
    Ok(Request::builder()
        .method(Method::CONNECT)
        .version(Version::HTTP_2)
        .uri(uri)
        .body(())?)
}

/// CONNECT to an echo server through `to`'s tunnel port, and a word to it.
pub fn attempt(from: &Pod, to: &Pod, proof: Proof, authority: &str) -> Result<Outcome> {
    exchange(
        from,
        SocketAddr::new(to.address(), TUNNEL_PORT),
        proof,
        connect_request(authority)?,
    )
}

/// Any request, from inside `from`'s namespace.
pub fn exchange(
    from: &Pod,
    tunnel: SocketAddr,
    proof: Proof,
    request: Request<()>,
) -> Result<Outcome> {
    in_pod(from, async move {
        match ask(tunnel, proof, request).await {
            Ok(outcome) => outcome,
            Err(error) => Outcome::Failed(format!("{error:#}")),
        }
    })
}

/// Runs a future inside the pod's namespace, with a deadline.
pub fn in_pod<T: Send>(pod: &Pod, work: impl Future<Output = T> + Send) -> Result<T> {
    pod.in_netns(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime
            .block_on(async { tokio::time::timeout(SOON, work).await })
            .context("a peer of the test hangs")
    })?
}

async fn ask(tunnel: SocketAddr, proof: Proof, request: Request<()>) -> Result<Outcome> {
    let stream = handshake(tunnel, proof).await?;
    let (send, connection) = h2::client::handshake(stream).await?;
    let driver = tokio::spawn(connection);
    let mut send = send.ready().await?;
    let connects = request.method() == Method::CONNECT;
    let (response, mut body) = send.send_request(request, !connects)?;
    let response = response.await?;
    if response.status() != 200 {
        return Ok(Outcome::Status(response.status().as_u16()));
    }
    body.send_data(Bytes::from_static(b"hello"), true)?;
    let mut answer = response.into_body();
    let mut data = Vec::new();
    while let Some(chunk) = answer.data().await {
        let chunk = chunk?;
        answer.flow_control().release_capacity(chunk.len())?;
        data.extend_from_slice(&chunk);
    }
    driver.abort();
    Ok(Outcome::Data(String::from_utf8_lossy(&data).into_owned()))
}

/// TLS as the agent speaks it, but without an opinion on the server.
pub async fn handshake(tunnel: SocketAddr, proof: Proof) -> Result<TlsStream<TcpStream>> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    let mut config = match proof {
        Some((leaf, key)) => builder.with_client_auth_cert(vec![leaf], key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(tunnel).await?;
    let name = ServerName::IpAddress(tunnel.ip().into());
    Ok(TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await?)
}

/// The leaf a server presents.
pub fn server_leaf(from: &Pod, to: &Pod, proof: Proof) -> Result<CertificateDer<'static>> {
    Ok(server_chain(from, to, proof)?.swap_remove(0))
}

/// All that a server presents, leaf first.
pub fn server_chain(from: &Pod, to: &Pod, proof: Proof) -> Result<Vec<CertificateDer<'static>>> {
    let tunnel = SocketAddr::new(to.address(), TUNNEL_PORT);
    in_pod(from, async move {
        let stream = handshake(tunnel, proof).await?;
        match stream.get_ref().1.peer_certificates() {
            Some(chain @ [_, ..]) => Ok(chain.iter().map(|one| one.clone().into_owned()).collect()),
            _ => bail!("the server presented nothing"),
        }
    })?
}

#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General(
            "only TLS 1.3 is spoken here".to_owned(),
        ))
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        PROVIDER
            .signature_verification_algorithms
            .supported_schemes()
    }
}
