//! The agent's HTTP endpoints: 15020 `/metrics` and `/stats/prometheus`, 15021 `/healthz/ready`, and on the loopback
//! 15000 `/config_dump`, `/logging` and `/quitquitquit`. Each server has its own bound on connections, so that scrapers cannot keep
//! a probe out; a connection has a deadline for its headers and for its whole life; request bodies are never read.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Body, Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use percent_encoding::percent_decode_str;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::telemetry::LevelError;

/// What the endpoints show and do.
pub trait HttpState: Send + Sync + 'static {
    /// The metrics in the OpenMetrics text format.
    fn metrics(&self) -> String;
    /// What the agent is not ready for; empty if it is ready.
    fn pending(&self) -> Vec<String>;
    /// Configuration and state, without secrets.
    fn config_dump(&self) -> serde_json::Value;
    /// What is logged.
    fn log_levels(&self) -> String;
    /// Adds levels to what is logged or, with `reset`, to what the configuration says; returns what is logged then.
    ///
    /// # Errors
    /// They are none.
    fn change_log_levels(&self, levels: &str, reset: bool) -> Result<String, LevelError>;
    /// Begins the shutdown, as SIGTERM does.
    fn quit(&self);
}

/// Where to listen.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// Metrics.
    pub stats: SocketAddr,
    /// Readiness.
    pub readiness: SocketAddr,
    /// Configuration and shutdown: a loopback address.
    pub admin: SocketAddr,
}

/// Bounds of each server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// For the headers of a request, also while a kept connection is idle.
    pub headers: Duration,
    /// For a connection from first to last.
    pub life: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            headers: Duration::from_secs(10),
            life: Duration::from_secs(120),
        }
    }
}

/// Why an endpoint is not there.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen on {address} for {endpoint}: {error}; free the port, or choose another with {variable}"
)]
pub struct BindError {
    endpoint: &'static str,
    address: SocketAddr,
    variable: &'static str,
    error: std::io::Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Endpoint {
    Stats,
    Readiness,
    Admin,
}

/// The three servers, listening.
#[derive(Debug)]
pub struct HttpServers {
    listeners: [(Endpoint, TcpListener); 3],
    limits: Limits,
}

impl HttpServers {
    /// Listens. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// Which address cannot be had, and why.
    pub fn bind(addresses: Addresses, limits: Limits) -> Result<Self, BindError> {
        let bind = |endpoint, address, name, variable| {
            listen(address)
                .map(|listener| (endpoint, listener))
                .map_err(|error| BindError {
                    endpoint: name,
                    address,
                    variable,
                    error,
                })
        };
        let stats = bind(
            Endpoint::Stats,
            addresses.stats,
            "/metrics",
            "CULVERT_STATS_ADDRESS",
        )?;
        let readiness = bind(
            Endpoint::Readiness,
            addresses.readiness,
            "/healthz/ready",
            "CULVERT_READINESS_ADDRESS",
        )?;
        let admin = bind(
            Endpoint::Admin,
            addresses.admin,
            "/config_dump",
            "CULVERT_ADMIN_ADDRESS",
        )?;
        Ok(Self {
            listeners: [stats, readiness, admin],
            limits,
        })
    }

    /// Where it listens; differs from what was asked for where that was port 0.
    ///
    /// # Errors
    /// The system's.
    pub fn addresses(&self) -> std::io::Result<Addresses> {
        let [(_, stats), (_, readiness), (_, admin)] = &self.listeners;
        Ok(Addresses {
            stats: stats.local_addr()?,
            readiness: readiness.local_addr()?,
            admin: admin.local_addr()?,
        })
    }

    /// Serves until `shutdown`.
    pub async fn serve<S: HttpState>(self, state: Arc<S>, shutdown: CancellationToken) {
        let mut servers = JoinSet::new();
        for (endpoint, listener) in self.listeners {
            servers.spawn(serve_one(
                endpoint,
                listener,
                self.limits,
                state.clone(),
                shutdown.clone(),
            ));
        }
        while let Some(ended) = servers.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "an HTTP endpoint ended unexpectedly");
            }
        }
    }
}

/// Shared with an agent that is being replaced: both listen for a while.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

async fn serve_one<S: HttpState>(
    endpoint: Endpoint,
    listener: TcpListener,
    limits: Limits,
    state: Arc<S>,
    shutdown: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(limits.connections));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            // Out of file descriptors, most likely: accepting again at once would spin.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // One too many is closed at once rather than left to wait.
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            continue;
        };
        let state = state.clone();
        connections.spawn(async move {
            // A connection that is not over in time is dropped, whatever it is at.
            let _ = tokio::time::timeout(limits.life, connection(endpoint, stream, limits, state))
                .await;
            drop(permit);
        });
    }
    connections.shutdown().await;
}

async fn connection<S: HttpState>(
    endpoint: Endpoint,
    stream: TcpStream,
    limits: Limits,
    state: Arc<S>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let mut response = answer(
            endpoint,
            request.method(),
            request.uri().path(),
            request.uri().query().unwrap_or_default(),
            state.as_ref(),
        );
        if !request.body().is_end_stream() {
            let close = header::HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        async move { Ok::<_, Infallible>(response) }
    });
    // How a client's connection ends is its own affair.
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.headers)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

fn answer<S: HttpState>(
    endpoint: Endpoint,
    method: &Method,
    path: &str,
    query: &str,
    state: &S,
) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let reads = [Method::GET, Method::HEAD].contains(method);
    match (endpoint, path) {
        (Endpoint::Stats, "/metrics" | "/stats/prometheus") if reads => {
            let media_type = crate::telemetry::metrics::CONTENT_TYPE;
            response(StatusCode::OK, media_type, state.metrics())
        }
        (Endpoint::Readiness, "/healthz/ready") if reads => match state.pending() {
            pending if pending.is_empty() => response(StatusCode::OK, TEXT, "ready\n".to_owned()),
            pending => {
                let list: String = pending.iter().map(|what| format!("{what}\n")).collect();
                response(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    TEXT,
                    format!("not ready:\n{list}"),
                )
            }
        },
        (Endpoint::Admin, "/config_dump") if reads => {
            let dump = format!("{:#}\n", state.config_dump());
            response(StatusCode::OK, "application/json", dump)
        }
        (Endpoint::Admin, "/quitquitquit") if method == Method::POST => {
            state.quit();
            response(StatusCode::OK, TEXT, "shutting down\n".to_owned())
        }
        (Endpoint::Admin, "/logging") if method == Method::POST => match logging(query, state) {
            Ok(levels) => response(
                StatusCode::OK,
                TEXT,
                format!("current log level is {levels}\n"),
            ),
            Err(reason) => refused(StatusCode::BAD_REQUEST, &reason),
        },
        (Endpoint::Admin, "/logging" | "/quitquitquit") => {
            refused(StatusCode::METHOD_NOT_ALLOWED, "use POST")
        }
        _ if !reads => refused(StatusCode::METHOD_NOT_ALLOWED, "use GET"),
        (Endpoint::Stats, _) => refused(StatusCode::NOT_FOUND, "try /metrics"),
        (Endpoint::Readiness, _) => refused(StatusCode::NOT_FOUND, "try /healthz/ready"),
        (Endpoint::Admin, _) => refused(
            StatusCode::NOT_FOUND,
            "try /config_dump, or POST /logging?level=info or /quitquitquit",
        ),
    }
}

/// `level=` with levels, and `reset`, in any order; neither of them only asks. What they are in return, or what is wrong.
fn logging<S: HttpState>(query: &str, state: &S) -> Result<String, String> {
    let (mut levels, mut reset) = (None, false);
    for part in query.split('&').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some(("level", value)) => {
                let value = percent_decode_str(value).decode_utf8();
                levels = Some(value.map_err(|_| "level is not UTF-8".to_owned())?);
            }
            None | Some((_, "")) if part.trim_end_matches('=') == "reset" => reset = true,
            _ => return Err("expected level=… and reset".to_owned()),
        }
    }
    if levels.is_none() && !reset {
        return Ok(state.log_levels());
    }
    let changed = state.change_log_levels(&levels.unwrap_or_default(), reset);
    changed.map_err(|error| error.to_string())
}

fn refused(status: StatusCode, hint: &str) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", format!("{hint}\n"))
}

fn response(status: StatusCode, media_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let media_type = header::HeaderValue::from_static(media_type);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, media_type);
    response
}

#[cfg(test)]
mod tests;
