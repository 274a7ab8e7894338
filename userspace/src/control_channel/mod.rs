//! The way to the control plane: gRPC over TLS that authenticates the server, with a token that authenticates the agent.
//!
//! Invariants: roots and token are read anew for every connection and call, since both rotate; no token is ever in an error or a log
//! line. Used by `xds` and by the CA client of `identity`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

mod roots;
#[cfg(test)]
mod tests;

pub use roots::{RootError, RootSource};

/// Until there is a connection that may carry requests.
const CONNECT: Duration = Duration::from_secs(10);
/// How long nothing is heard before the other end is asked whether it lives, and how long it may take to say so.
const SILENCE: Duration = Duration::from_secs(30);
const ANSWER: Duration = Duration::from_secs(10);
/// Bytes of a stream that may be under way: the first answer for a large mesh has many.
const WINDOW: u32 = 8 << 20;

/// Where a service of the control plane is.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
}

/// A text that is not such an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the address of a service; write https://host:port")]
pub struct AddressError(String);

impl Address {
    /// Reads `https://host:port`, or `host:port`. There is no plain text: a token is sent there.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        let rest = text.strip_prefix("https://").unwrap_or(text);
        let uri: Uri = format!("https://{}", rest.trim_end_matches('/'))
            .parse()
            .map_err(|_| wrong())?;
        let plain = uri.path_and_query().is_none_or(|path| path.as_str() == "/");
        let host = uri.host().filter(|host| !host.is_empty());
        let named = uri.authority().is_some_and(|it| !it.as_str().contains('@'));
        match (host, uri.port_u16()) {
            (Some(host), Some(port)) if plain && named && port != 0 => Ok(Self {
                host: host.trim_matches(['[', ']']).to_owned(),
                port,
            }),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        match host.contains(':') {
            true => write!(f, "https://[{host}]:{port}"),
            false => write!(f, "https://{host}:{port}"),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where the agent's token comes from. Never shown.
pub trait TokenSource: Send + Sync {
    /// The token as it is now; none where there is none.
    ///
    /// # Errors
    /// It cannot be read; the message names the place and does not hold the token.
    fn token(&self) -> Result<Option<String>, String>;
}

/// Headers by name. Their values may be secrets, and are never shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// Whether a header of this name and value can be sent.
    pub fn can_be(name: &str, value: &str) -> bool {
        header(name, value).is_some()
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }
}

impl From<Vec<(String, String)>> for Headers {
    fn from(headers: Vec<(String, String)>) -> Self {
        Self(headers)
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.iter().map(|(name, _)| name))
            .finish()
    }
}

/// One service of the control plane.
#[derive(Clone)]
pub struct ControlChannel {
    /// Where it is.
    pub address: Address,
    /// The name that its certificate must have, if it is not the address's.
    pub server_name: Option<String>,
    /// Who vouches for that certificate.
    pub roots: RootSource,
    /// What the agent shows.
    pub token: Arc<dyn TokenSource>,
    /// The cluster, as the header `clusterid`.
    pub cluster_id: String,
    /// More headers.
    pub headers: Headers,
}

/// Why the control plane cannot be spoken to.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The roots are not there.
    #[error("cannot authenticate {address}: {source}")]
    Roots {
        /// The service.
        address: Address,
        /// What is wrong with them.
        source: RootError,
    },
    /// No name to check the certificate against.
    #[error(
        "{0:?} is not a name that a certificate can have; mend the address or ALT_XDS_HOSTNAME or ALT_CA_HOSTNAME"
    )]
    ServerName(String),
    /// There is no connection.
    #[error("cannot connect to {address}: {reason}")]
    Connect {
        /// The service.
        address: Address,
        /// What happened.
        reason: String,
    },
    /// The token cannot be had.
    #[error("cannot read the token for {address}: {reason}")]
    Token {
        /// The service.
        address: Address,
        /// What happened.
        reason: String,
    },
    /// A header that cannot be sent.
    #[error("the header {0:?} for the control plane is not one; mend XDS_HEADER_* or CA_HEADER_*")]
    Header(String),
}

impl ControlChannel {
    /// A connection. It ends with an error when the service is gone; a new one is to be made then.
    ///
    /// # Errors
    /// There is none within ten seconds, or the service is not whom the roots vouch for.
    pub async fn connect(&self) -> Result<Channel, ChannelError> {
        let tls = self.tls().await?;
        let name = self.expected_name()?;
        let failed = |reason: String| ChannelError::Connect {
            address: self.address.clone(),
            reason,
        };
        let endpoint = Endpoint::from_shared(self.address.to_string())
            .map_err(|error| failed(error.to_string()))?
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(SILENCE)
            .keep_alive_timeout(ANSWER)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW);
        let address = self.address.clone();
        let connect = service_fn(move |_: Uri| {
            let (tls, name, address) = (tls.clone(), name.clone(), address.clone());
            async move {
                let stream = TcpStream::connect((address.host.as_str(), address.port)).await?;
                stream.set_nodelay(true)?;
                let stream = TlsConnector::from(tls).connect(name, stream).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        let connected = tokio::time::timeout(CONNECT, endpoint.connect_with_connector(connect));
        match connected.await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(failed(chain(&error))),
            Err(_) => Err(failed(format!("no answer within {} s", CONNECT.as_secs()))),
        }
    }

    /// The headers of a call.
    ///
    /// # Errors
    /// The token cannot be read, or a header is none.
    pub async fn metadata(&self) -> Result<MetadataMap, ChannelError> {
        let mut metadata = MetadataMap::new();
        let mut add = |name: &str, value: &str, sensitive: bool| {
            let Some((key, mut value)) = header(name, value) else {
                return Err(ChannelError::Header(name.to_owned()));
            };
            value.set_sensitive(sensitive);
            metadata.insert(key, value);
            Ok(())
        };
        for (name, value) in self.headers.iter() {
            add(name, value, true)?;
        }
        add("clusterid", &self.cluster_id, false)?;
        let token = Arc::clone(&self.token);
        let token = tokio::task::spawn_blocking(move || token.token());
        let token = token.await.unwrap_or_else(|ended| Err(ended.to_string()));
        let token = token.map_err(|reason| ChannelError::Token {
            address: self.address.clone(),
            reason,
        })?;
        if let Some(token) = token {
            add("authorization", &format!("Bearer {token}"), true)?;
        }
        Ok(metadata)
    }

    async fn tls(&self) -> Result<Arc<rustls::ClientConfig>, ChannelError> {
        let roots = self.roots.clone();
        let config = tokio::task::spawn_blocking(move || roots.client_config()).await;
        let config = config.unwrap_or_else(|ended| Err(RootError::Internal(ended.to_string())));
        config.map_err(|source| ChannelError::Roots {
            address: self.address.clone(),
            source,
        })
    }

    fn expected_name(&self) -> Result<ServerName<'static>, ChannelError> {
        let name = self.server_name.as_ref().unwrap_or(&self.address.host);
        ServerName::try_from(name.clone()).map_err(|_| ChannelError::ServerName(name.clone()))
    }
}

fn header(name: &str, value: &str) -> Option<(MetadataKey<Ascii>, MetadataValue<Ascii>)> {
    let key = MetadataKey::from_bytes(name.to_ascii_lowercase().as_bytes());
    key.ok().zip(MetadataValue::try_from(value).ok())
}

/// An error with what caused it: tonic's own say little.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
