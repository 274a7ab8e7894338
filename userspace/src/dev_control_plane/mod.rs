//! A small control plane for laptops, the demo and the tests: delta xDS of a mesh file and a certificate authority, over TLS.
//!
//! It speaks to agents as istiod does, so that they need no other way of getting their mesh. Not for production: the key of its CA lies on
//! the disk. Called by `cli::dev_control_plane`; nothing of the agent depends on it.
//!
//! `encode` turns resources into messages, `snapshot` names and versions them, `session` decides what a client is sent, `xds` and `ca` are
//! the two services, `server` the TLS in front of them. `behaviour` says what tests want it to do wrong, `distort` does that to resources.

mod behaviour;
pub mod ca;
mod distort;
mod encode;
mod gate;
mod publish;
pub mod server;
mod session;
mod snapshot;
mod xds;

#[cfg(test)]
pub mod fixture;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::stream::unfold;
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use self::behaviour::{Behaviour, BehaviourError};
use self::ca::Authority;
use self::gate::Gate;
use self::server::Connection;
use self::xds::Discovery;
use crate::identity::{DevCa, DevCaError};
use crate::mesh::{MeshDefaults, Store};
use crate::wire::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use crate::wire::istio::v1::auth::istio_certificate_service_server::IstioCertificateServiceServer;
use crate::xds::{LocalFile, LocalFileError};

/// Where clients find the root that vouches for the server, in the CA's directory.
const ROOT: &str = "root-cert.pem";
const SERVER_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Accepted connections that the server has not taken over yet.
const MOST_ACCEPTED: usize = 16;
/// Of a request: a client that has a large mesh names all of it when it comes back.
const MOST_REQUEST_BYTES: usize = 64 << 20;
/// A client that does not answer for so long is gone.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// How long the end waits for clients to hear of it.
const GRACE: Duration = Duration::from_secs(1);

/// How to run one.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen; port 0 for any that is free.
    pub listen: SocketAddr,
    /// The mesh file.
    pub mesh: PathBuf,
    /// The development CA's directory.
    pub dev_ca: PathBuf,
    /// The trust domain of the CA.
    pub trust_domain: String,
    /// What the server's certificate names. Empty: this machine's own loopback names, and where it listens.
    pub names: Vec<String>,
    /// The file with the bearer token that clients must send; without one everybody is admitted.
    pub token: Option<PathBuf>,
    /// The file that says what to do wrong.
    pub behaviour: Option<PathBuf>,
}

/// What clients need to know.
#[derive(Debug, Clone)]
pub struct Listening {
    /// Where it listens.
    pub address: SocketAddr,
    /// The root certificate that the server's leads to.
    pub root: PathBuf,
}

/// Why there is no control plane.
#[derive(Debug, thiserror::Error)]
pub enum ControlPlaneError {
    /// The port.
    #[error("cannot listen on {0}: {1}; choose another address with --listen")]
    Listen(SocketAddr, io::Error),
    /// The root certificate.
    #[error("cannot write the root certificate {}: {error}", path.display())]
    Root {
        /// Where.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The CA.
    #[error(transparent)]
    Ca(#[from] DevCaError),
    /// The mesh file.
    #[error(transparent)]
    Mesh(#[from] LocalFileError),
    /// The behaviour file.
    #[error(transparent)]
    Behaviour(#[from] BehaviourError),
    /// The server's certificate.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    /// A part of it.
    #[error("the control plane cannot go on: this part of it ended: {0}")]
    Ended(String),
}

/// Serves until `shutdown`. Calls `listening` once clients can connect.
///
/// # Errors
/// See [`ControlPlaneError`].
pub async fn run(
    options: Options,
    listening: impl FnOnce(Listening),
    shutdown: CancellationToken,
) -> Result<(), ControlPlaneError> {
    let ca = Arc::new(DevCa::open(&options.dev_ca, &options.trust_domain)?);
    let root = write_root(&ca, &options.dev_ca)?;
    let (listener, address) = listen(options.listen).await?;
    let tls = tls(&ca, &names(&options.names, address))?;
    let behaviour = options.behaviour.as_deref().map(Behaviour::load);
    let (behaves, behaviour) = watch::channel(Arc::new(behaviour.transpose()?.unwrap_or_default()));
    let (publishes, published) = watch::channel(None);
    let (accepts, accepted) = mpsc::channel(MOST_ACCEPTED);
    let store = Arc::new(Store::new());
    let defaults = MeshDefaults {
        trust_domain: options.trust_domain.as_str().into(),
        ..MeshDefaults::default()
    };
    let (watcher, _status) = LocalFile::new(&options.mesh).watch(defaults, Arc::clone(&store))?;

    let gate = Gate::new(options.token);
    let discovery = Discovery::new(published, gate.clone(), shutdown.clone());
    let authority = Authority::new(ca, gate, behaviour.clone());
    let mut tasks = JoinSet::new();
    let end = || shutdown.clone();
    tasks.spawn(named("mesh file", watcher.run(end())));
    let follow = behaviour::follow(options.behaviour, behaves, end());
    tasks.spawn(named("behaviour file", follow));
    let publish = publish::run(store, behaviour, publishes, end());
    tasks.spawn(named("publisher", publish));
    let accept = server::accept(listener, tls, accepts, end());
    tasks.spawn(named("listener", accept));
    let serve = serve(discovery, authority, accepted, end());
    tasks.spawn(named("services", serve));
    listening(Listening { address, root });

    let outcome = tokio::select! {
        // In this order: once the end was asked for, parts end as they should.
        biased;
        () = shutdown.cancelled() => Ok(()),
        ended = tasks.join_next() => Err(ControlPlaneError::Ended(match ended {
            Some(Ok(part)) => part.to_owned(),
            Some(Err(error)) => error.to_string(),
            None => "everything".to_owned(),
        })),
    };
    shutdown.cancel();
    let all_ended = async { while tasks.join_next().await.is_some() {} };
    // Who still holds a connection then loses it with the tasks.
    let _ = tokio::time::timeout(GRACE, all_ended).await;
    outcome
}

async fn serve(
    discovery: Discovery,
    authority: Authority,
    accepted: mpsc::Receiver<Connection>,
    shutdown: CancellationToken,
) {
    let discovery = AggregatedDiscoveryServiceServer::new(discovery)
        .max_decoding_message_size(MOST_REQUEST_BYTES);
    let connections = unfold(accepted, |mut accepted| async {
        let connection = accepted.recv().await?;
        Some((Ok::<_, io::Error>(connection), accepted))
    });
    let served = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .add_service(discovery)
        .add_service(IstioCertificateServiceServer::new(authority))
        .serve_with_incoming_shutdown(connections, shutdown.cancelled_owned())
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the services ended");
    }
}

/// The part's name, once it has ended.
async fn named(part: &'static str, task: impl Future<Output = ()>) -> &'static str {
    task.await;
    part
}

fn names(asked: &[String], address: SocketAddr) -> Vec<String> {
    if !asked.is_empty() {
        return asked.to_vec();
    }
    let mut names = vec![
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        "::1".to_owned(),
    ];
    let own = address.ip();
    if !own.is_loopback() && !own.is_unspecified() {
        names.push(own.to_string());
    }
    names
}

async fn listen(at: SocketAddr) -> Result<(TcpListener, SocketAddr), ControlPlaneError> {
    let failed = |error| ControlPlaneError::Listen(at, error);
    let listener = TcpListener::bind(at).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

fn tls(ca: &DevCa, names: &[String]) -> Result<Arc<ServerConfig>, ControlPlaneError> {
    let validity = ca.validity_from(SystemTime::now(), SERVER_LIFETIME)?;
    let (certificate, key) = ca.issue_server(names, validity)?;
    Ok(server::tls_config(certificate, key)?)
}

/// Writes the root certificate beside the CA's key, and returns where. By a rename, so that nobody reads half of it.
fn write_root(ca: &DevCa, directory: &Path) -> Result<PathBuf, ControlPlaneError> {
    let path = directory.join(ROOT);
    let text: String = ca.roots().certificates().iter().map(ca::pem).collect();
    if std::fs::read_to_string(&path).is_ok_and(|known| known == text) {
        return Ok(path);
    }
    let new = path.with_extension(format!("pem.{}", std::process::id()));
    match std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)) {
        Ok(()) => Ok(path),
        Err(error) => Err(ControlPlaneError::Root { path, error }),
    }
}
