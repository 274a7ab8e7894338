//! The admin Unix socket. Invariants: only root is answered (directory, socket mode, and the peer's credentials, each
//! checked); a request is at most 64 KiB and comes in time; connections are bounded; a client that does not read is let go.
//! The path is taken over by renaming, so that a new agent replaces an old one's socket without a gap.

use std::fs::DirBuilder;
use std::future::Future;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::protocol::{
    AdminError, ErrorKind, FlowsQuery, MAX_REQUEST, PodAdd, PodInfo, PodRemove, Reply, Request,
    Status,
};
use crate::telemetry::{Follower, Next};

/// What the node does for the socket's clients.
pub trait AdminHandler: Send + Sync + 'static {
    /// Enrols a pod; returns when it is served or cannot be.
    fn pod_add(&self, pod: PodAdd) -> impl Future<Output = Result<PodInfo, AdminError>> + Send;
    /// Releases a pod.
    fn pod_remove(&self, pod: PodRemove) -> impl Future<Output = Result<(), AdminError>> + Send;
    /// The pods.
    fn pod_list(&self) -> impl Future<Output = Vec<PodInfo>> + Send;
    /// How the agent is.
    fn status(&self) -> impl Future<Output = Status> + Send;
    /// Begins to follow flows.
    fn flows(&self, query: FlowsQuery) -> Follower;
}

/// Bounds of the socket.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// For a request to come in whole, counted from the connection or the last answer.
    pub read: Duration,
    /// For the handler to answer.
    pub handle: Duration,
    /// For the client to take an answer.
    pub write: Duration,
    /// Whom to answer, besides nobody: the user id of the peer.
    pub uid: u32,
    /// Answers everybody, to show that a test would notice.
    #[cfg(feature = "test-knobs")]
    pub any_user: bool,
}

impl Limits {
    #[cfg(feature = "test-knobs")]
    fn admits(&self, peer: Option<u32>) -> bool {
        self.any_user || peer == Some(self.uid)
    }

    #[cfg(not(feature = "test-knobs"))]
    fn admits(&self, peer: Option<u32>) -> bool {
        peer == Some(self.uid)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            read: Duration::from_secs(10),
            handle: Duration::from_secs(60),
            write: Duration::from_secs(30),
            uid: 0,
            #[cfg(feature = "test-knobs")]
            any_user: false,
        }
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The directory cannot be made or looked at.
    #[error("admin socket: cannot use the directory {}: {error}; run as root, or choose another with CULVERT_ADMIN_SOCKET", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Others could replace the socket.
    #[error("admin socket: the directory {} belongs to user {uid} with mode {mode:03o}; it must belong to the agent's user and be writable by nobody else: `chmod 700` it, or choose another with CULVERT_ADMIN_SOCKET", path.display())]
    OpenDirectory {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Its mode.
        mode: u32,
    },
    /// Something else is in its place.
    #[error("admin socket: {} exists and is not a socket; remove it, or choose another path with CULVERT_ADMIN_SOCKET", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("admin socket: cannot listen on {}: {error}", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// The listening socket; its path is removed when it is dropped, unless a newer agent has taken it over.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
    limits: Limits,
}

impl AdminSocket {
    /// Listens at `path`, making its directory if need be. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path, limits: Limits) -> Result<Self, SocketError> {
        check_directory(path.parent().unwrap_or(Path::new("/")))?;
        match std::fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket {
                    path: path.to_owned(),
                });
            }
            _ => {}
        }
        let listen = |error| SocketError::Listen {
            path: path.to_owned(),
            error,
        };
        // Under its final name only once its mode is right.
        let temporary = path.with_extension(std::process::id().to_string());
        let _ = std::fs::remove_file(&temporary);
        let listener = UnixListener::bind(&temporary).map_err(listen)?;
        let placed = place(&temporary, path);
        if placed.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        Ok(Self {
            listener,
            path: path.to_owned(),
            inode: placed.map_err(listen)?,
            limits,
        })
    }

    /// Answers clients until `shutdown`, then lets the requests that are being handled end for at most a second.
    pub async fn serve<H: AdminHandler>(self, handler: Arc<H>, shutdown: CancellationToken) {
        let permits = Arc::new(Semaphore::new(self.limits.connections));
        let mut clients = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                Some(ended) = clients.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "an admin connection ended unexpectedly");
                    }
                    continue;
                }
                accepted = self.listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                // Out of file descriptors, most likely: accepting again at once would spin.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let permit = permits.clone().try_acquire_owned().ok();
            let connection = Connection {
                handler: handler.clone(),
                limits: self.limits.clone(),
                shutdown: shutdown.clone(),
            };
            match permit {
                Some(permit) => drop(clients.spawn(connection.run(stream, permit))),
                // One that does not fit is told so if its buffer takes it, and never waited for.
                None => {
                    let busy = AdminError::new(
                        ErrorKind::Busy,
                        "too many admin connections; close some and try again",
                    );
                    let _ = stream.try_write(&encode(&Reply::<()>::Error(busy)));
                }
            }
        }
        let _ = timeout(Duration::from_secs(1), async {
            while clients.join_next().await.is_some() {}
        })
        .await;
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).map(|now| (now.dev(), now.ino()));
        if ours.is_ok_and(|now| now == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn check_directory(path: &Path) -> Result<(), SocketError> {
    let unusable = |error| SocketError::Directory {
        path: path.to_owned(),
        error,
    };
    // Existing parents keep their modes.
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(unusable)?;
    let metadata = std::fs::metadata(path).map_err(unusable)?;
    let (uid, mode) = (metadata.uid(), metadata.mode() & 0o777);
    if uid != nix::unistd::geteuid().as_raw() || mode & 0o022 != 0 {
        let path = path.to_owned();
        return Err(SocketError::OpenDirectory { path, uid, mode });
    }
    Ok(())
}

fn place(temporary: &Path, path: &Path) -> io::Result<(u64, u64)> {
    std::fs::set_permissions(temporary, std::fs::Permissions::from_mode(0o600))?;
    let metadata = std::fs::symlink_metadata(temporary)?;
    std::fs::rename(temporary, path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Why a connection ends early; nobody is left to be told.
struct Gone;

impl From<io::Error> for Gone {
    fn from(_: io::Error) -> Self {
        Self
    }
}

struct Connection<H> {
    handler: Arc<H>,
    limits: Limits,
    shutdown: CancellationToken,
}

impl<H: AdminHandler> Connection<H> {
    async fn run(self, stream: UnixStream, _permit: OwnedSemaphorePermit) {
        let peer = stream.peer_cred().ok().map(|peer| peer.uid());
        let (read, mut write) = stream.into_split();
        if !self.limits.admits(peer) {
            tracing::warn!(
                uid = peer,
                "refused an admin connection: the client is not root"
            );
            let refusal = AdminError::new(
                ErrorKind::Forbidden,
                "only root may use the admin socket; use sudo",
            );
            let _ = self.refuse(&mut write, refusal).await;
            return;
        }
        let mut read = BufReader::new(read);
        while let Ok(Some(line)) = self.read_request(&mut read, &mut write).await {
            if self.answer(&line, &mut read, &mut write).await.is_err() {
                return;
            }
        }
    }

    /// The next request line; `None` when the client is done, has been refused, or the agent is.
    async fn read_request(
        &self,
        read: &mut BufReader<OwnedReadHalf>,
        write: &mut OwnedWriteHalf,
    ) -> Result<Option<Vec<u8>>, Gone> {
        let mut line = Vec::new();
        let mut bounded = read.take(MAX_REQUEST as u64 + 1);
        let whole = tokio::select! {
            () = self.shutdown.cancelled() => return Ok(None),
            whole = timeout(self.limits.read, bounded.read_until(b'\n', &mut line)) => whole,
        };
        let refusal = match whole {
            Err(_) if line.is_empty() => return Ok(None),
            Err(_) => AdminError::new(
                ErrorKind::Busy,
                "the request did not come in time; send one JSON object and a newline",
            ),
            Ok(Err(_) | Ok(0)) => return Ok(None),
            Ok(Ok(_)) if line.len() > MAX_REQUEST => {
                let message = format!("the request is longer than {MAX_REQUEST} bytes");
                AdminError::new(ErrorKind::BadRequest, message)
            }
            Ok(Ok(_)) if line.last() != Some(&b'\n') => {
                AdminError::new(ErrorKind::BadRequest, "the request ended without a newline")
            }
            Ok(Ok(_)) => return Ok(Some(line)),
        };
        self.refuse(write, refusal).await?;
        Ok(None)
    }

    async fn answer(
        &self,
        line: &[u8],
        read: &mut BufReader<OwnedReadHalf>,
        write: &mut OwnedWriteHalf,
    ) -> Result<(), Gone> {
        let request = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(error) => {
                let message = format!("malformed request: {error}");
                return self
                    .refuse(write, AdminError::new(ErrorKind::BadRequest, message))
                    .await;
            }
        };
        match request {
            Request::PodAdd(pod) => match pod.problem() {
                Some(problem) => {
                    self.refuse(write, AdminError::new(ErrorKind::BadRequest, problem))
                        .await
                }
                None => self.reply(write, self.handler.pod_add(pod)).await,
            },
            Request::PodRemove(pod) => self.reply(write, self.handler.pod_remove(pod)).await,
            Request::PodList {} => self.reply(write, infallible(self.handler.pod_list())).await,
            Request::Status {} => self.reply(write, infallible(self.handler.status())).await,
            Request::Flows(query) => self.stream(self.handler.flows(query), read, write).await,
        }
    }

    async fn reply<T: Serialize>(
        &self,
        write: &mut OwnedWriteHalf,
        answer: impl Future<Output = Result<T, AdminError>>,
    ) -> Result<(), Gone> {
        let reply = match timeout(self.limits.handle, answer).await {
            Ok(Ok(value)) => Reply::Ok(value),
            Ok(Err(error)) => Reply::Error(error),
            Err(_) => Reply::Error(AdminError::new(
                ErrorKind::Busy,
                "the agent did not finish in time; see its log, and ask `culvert status`",
            )),
        };
        self.send(write, &reply).await
    }

    async fn refuse(&self, write: &mut OwnedWriteHalf, error: AdminError) -> Result<(), Gone> {
        self.send(write, &Reply::<()>::Error(error)).await
    }

    async fn send<T: Serialize>(
        &self,
        write: &mut OwnedWriteHalf,
        reply: &Reply<T>,
    ) -> Result<(), Gone> {
        timeout(self.limits.write, write.write_all(&encode(reply)))
            .await
            .map_err(|_| Gone)?
            .map_err(Gone::from)
    }

    /// Events until the client hangs up, says anything more, or does not read for too long.
    async fn stream(
        &self,
        mut flows: Follower,
        read: &mut BufReader<OwnedReadHalf>,
        write: &mut OwnedWriteHalf,
    ) -> Result<(), Gone> {
        loop {
            let next = tokio::select! {
                () = self.shutdown.cancelled() => return Err(Gone),
                _ = read.fill_buf() => return Err(Gone),
                next = flows.next() => next.ok_or(Gone)?,
            };
            let reply = match next {
                Next::Event(event) => Reply::<()>::Flow(Box::new(event.as_ref().clone())),
                Next::Lost(lost) => Reply::Lost(lost),
            };
            self.send(write, &reply).await?;
        }
    }
}

async fn infallible<T>(answer: impl Future<Output = T>) -> Result<T, AdminError> {
    Ok(answer.await)
}

fn encode<T: Serialize>(reply: &Reply<T>) -> Vec<u8> {
    // Fails only for a path that is not Unicode, and replies hold none.
    let mut line = serde_json::to_vec(reply).unwrap_or_else(|_| {
        br#"{"error":{"kind":"failed","message":"the answer cannot be written as JSON"}}"#.to_vec()
    });
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests;
