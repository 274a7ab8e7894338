//! The client of the admin socket, for the command line. Blocking: a command asks one thing and waits.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::protocol::{AdminError, Reply, Request};

/// For the agent to answer: longer than it gives itself.
const ANSWER: Duration = Duration::from_secs(90);
/// The longest line of an answer: a list of many pods is one line.
const MAX_REPLY: u64 = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent answers at {}: {error}; start one with `culvert node`, or name its socket with --admin-socket or CULVERT_ADMIN_SOCKET", path.display())]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Not allowed to.
    #[error("not allowed to use {}: only root may; use sudo", path.display())]
    NotRoot {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke.
    #[error("the agent at {} went away: {error}; see its log", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The answer is not one.
    #[error("the agent at {} gave an answer that this command does not understand ({reason}); use the command of the agent's version", path.display())]
    Strange {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The agent refused.
    #[error(transparent)]
    Refused(#[from] AdminError),
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// `NotRunning` or `NotRoot`.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let path = path.to_owned();
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Self {
                path,
                stream: BufReader::new(stream),
            }),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                Err(ClientError::NotRoot { path })
            }
            Err(error) => Err(ClientError::NotRunning { path, error }),
        }
    }

    /// Asks for one answer.
    ///
    /// # Errors
    /// The agent's refusal, or that there is no answer.
    pub fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ClientError> {
        self.send(request)?;
        match self.reply()? {
            Some(Reply::Ok(answer)) => Ok(answer),
            Some(Reply::Error(error)) => Err(error.into()),
            Some(_) => Err(self.strange("an event instead of an answer")),
            None => Err(self.broken(std::io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Asks for a stream of events.
    ///
    /// # Errors
    /// As `ask`; the agent's refusal comes with the first event.
    pub fn follow(mut self, request: &Request) -> Result<Stream, ClientError> {
        self.send(request)?;
        // Events come when they come.
        let unlimited = self.stream.get_ref().set_read_timeout(None);
        unlimited.map_err(|error| self.broken(error))?;
        Ok(Stream(self))
    }

    fn send(&mut self, request: &Request) -> Result<(), ClientError> {
        let sent = serde_json::to_vec(request)
            .map_err(std::io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                let mut stream = self.stream.get_ref();
                stream.set_read_timeout(Some(ANSWER))?;
                stream.set_write_timeout(Some(ANSWER))?;
                stream.write_all(&line)
            });
        match sent {
            // The refusal, if there is one, is there to be read.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            sent => sent.map_err(|error| self.broken(error)),
        }
    }

    fn reply<T: DeserializeOwned>(&mut self) -> Result<Option<Reply<T>>, ClientError> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.stream).take(MAX_REPLY);
        let read = bounded.read_until(b'\n', &mut line);
        if read.map_err(|error| self.broken(error))? == 0 {
            return Ok(None);
        }
        let reply = serde_json::from_slice(&line);
        reply
            .map(Some)
            .map_err(|error| self.strange(&error.to_string()))
    }

    fn broken(&self, error: std::io::Error) -> ClientError {
        let path = self.path.clone();
        ClientError::Broken { path, error }
    }

    fn strange(&self, reason: &str) -> ClientError {
        ClientError::Strange {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }
}

/// A stream of events; it ends when the agent does.
#[derive(Debug)]
pub struct Stream(Client);

impl Iterator for Stream {
    type Item = Result<Reply<()>, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.0.reply().transpose()? {
            Ok(Reply::Error(error)) => Some(Err(error.into())),
            other => Some(other),
        }
    }
}
