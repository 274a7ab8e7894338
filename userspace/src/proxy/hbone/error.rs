//! Why a connection could not be carried through a tunnel. Cloneable: all that wait for one handshake share its failure.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;

use crate::proxy::tls::{ConfigError, HandshakeError};

#[derive(Debug, Clone, thiserror::Error)]
pub enum HboneError {
    #[error(transparent)]
    Config(Arc<ConfigError>),
    #[error("cannot connect to {destination}: {error}")]
    Dial {
        destination: SocketAddr,
        error: Arc<io::Error>,
    },
    #[error("no tunnel to {destination}: {error}")]
    Tls {
        destination: SocketAddr,
        error: Arc<HandshakeError>,
    },
    #[error("the tunnel to {destination} failed: {error}")]
    Http2 {
        destination: SocketAddr,
        error: Arc<h2::Error>,
    },
    #[error("{waited_for} of {destination} took longer than {deadline:?}")]
    Deadline {
        destination: SocketAddr,
        waited_for: &'static str,
        deadline: Duration,
    },
    #[error("{destination} answered CONNECT with {status}")]
    Refused {
        destination: SocketAddr,
        status: StatusCode,
    },
    #[error("the tunnel to {0} was closed: its pod or identity has gone, or the agent is stopping")]
    Closed(SocketAddr),
    #[error("the tunnel to {0} was closed: its server's certificate was revoked (CRL_PATH)")]
    Revoked(SocketAddr),
    #[error("a CONNECT request cannot be made of this: {0}")]
    Request(Arc<http::Error>),
}
