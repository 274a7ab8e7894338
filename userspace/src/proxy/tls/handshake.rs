//! The handshake, with a deadline unless there is to be none, and the identity it proved.
//!
//! Invariant: what these functions return speaks HTTP/2 and has an identity that the verifier admitted.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::config::ALPN_HTTP2;
use super::{HandshakeError, PeerChecks, PeerRejection};
use crate::identity::{Validity, spiffe};
use crate::policy::Identity;
use crate::proxy::deadline::within;

/// An authenticated connection from a client.
#[derive(Debug)]
pub struct Accepted<S> {
    pub stream: server::TlsStream<S>,
    /// None only where a test knob admits clients without a certificate.
    pub peer: Option<Identity>,
    /// Until when the peer's certificate holds, by the wall clock. None only where a test knob
    /// switches that off.
    pub not_after: Option<SystemTime>,
}

/// An authenticated connection to a server.
#[derive(Debug)]
pub struct Connected<S> {
    pub stream: client::TlsStream<S>,
    pub peer: Identity,
}

/// Takes a client's handshake.
pub async fn accept<S>(
    io: S,
    config: Arc<ServerConfig>,
    deadline: Option<Duration>,
    checks: &PeerChecks,
) -> Result<Accepted<S>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let stream = within(deadline, TlsAcceptor::from(config).accept(io))
        .await
        .map_err(HandshakeError::Deadline)?
        .map_err(HandshakeError::from_io)?;
    let state = stream.get_ref().1;
    require_http2(state)?;
    let knobs = checks.knobs;
    let peer = match peer_identity(state, checks) {
        Ok(peer) => Some(peer),
        Err(HandshakeError::NoCertificate) if !knobs.client_certificate_required() => None,
        Err(error) => return Err(error),
    };
    let not_after = if knobs.chain_verified() {
        expiry(state)?
    } else {
        None
    };
    Ok(Accepted {
        stream,
        peer,
        not_after,
    })
}

/// Opens a connection to the server at `address`. The address is not sent and not compared with anything.
pub async fn connect<S>(
    io: S,
    config: Arc<ClientConfig>,
    address: IpAddr,
    deadline: Option<Duration>,
    checks: &PeerChecks,
) -> Result<Connected<S>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::IpAddress(address.into());
    let stream = within(deadline, TlsConnector::from(config).connect(name, io))
        .await
        .map_err(HandshakeError::Deadline)?
        .map_err(HandshakeError::from_io)?;
    let state = stream.get_ref().1;
    require_http2(state)?;
    let peer = peer_identity(state, checks)?;
    Ok(Connected { stream, peer })
}

/// The identity a finished handshake has proved.
fn peer_identity(state: &CommonState, checks: &PeerChecks) -> Result<Identity, HandshakeError> {
    let chain = state.peer_certificates().unwrap_or_default();
    let leaf = chain.first().ok_or(HandshakeError::NoCertificate)?;
    checks
        .identity_of(leaf)
        .map_err(|error| HandshakeError::Peer(PeerRejection::Identity(error)))
}

/// When the peer's certificate expires, if it presented one.
fn expiry(state: &CommonState) -> Result<Option<SystemTime>, HandshakeError> {
    let Some(leaf) = state.peer_certificates().unwrap_or_default().first() else {
        return Ok(None);
    };
    let refused = |rejection| HandshakeError::Peer(rejection);
    let parsed = spiffe::parse(leaf).map_err(|error| refused(error.into()))?;
    let validity =
        Validity::of(&parsed).map_err(|error| refused(PeerRejection::Chain(error.to_string())))?;
    Ok(Some(validity.not_after))
}

/// rustls refuses a peer that offers other protocols, but lets one pass that offers none.
fn require_http2(state: &CommonState) -> Result<(), HandshakeError> {
    match state.alpn_protocol() {
        Some(ALPN_HTTP2) => Ok(()),
        _ => Err(HandshakeError::NoHttp2),
    }
}
