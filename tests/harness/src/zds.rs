//! istio-cni's side of enrolment: a server on a real socket that tells agents which pods they have, with the descriptors of their
//! namespaces. It says what a test has it say, also what istio-cni never would.
//!
//! The few messages are written out here by hand, so that the agent's own code is not tested with itself.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    listen, recv, sendmsg, socket,
};

use crate::mesh::Workload;
use crate::pod::Pod;
use crate::sys;

/// How long istio-cni waits for an answer.
const ANSWER: Duration = Duration::from_secs(5);

/// The server.
#[derive(Debug)]
pub struct ZdsServer {
    path: PathBuf,
    socket: OwnedFd,
}

/// One agent's connection.
#[derive(Debug)]
pub struct ZdsAgent {
    socket: OwnedFd,
}

/// A pod as istio-cni tells of it.
#[derive(Clone, Debug)]
pub struct ZdsPod<'a> {
    pub uid: &'a str,
    pub name: &'a str,
    pub namespace: &'a str,
    pub service_account: &'a str,
}

impl<'a> ZdsPod<'a> {
    /// As the mesh has it.
    pub fn of(workload: &'a Workload) -> Self {
        Self {
            uid: &workload.uid,
            name: &workload.name,
            namespace: &workload.namespace,
            service_account: &workload.service_account,
        }
    }
}

impl ZdsServer {
    /// Listens at a path, in place of what was there.
    pub fn listen(path: &Path) -> Result<Self> {
        Self::begin(path, |socket| Ok(listen(socket, Backlog::new(8)?)?))
    }

    /// Listens as a user who is not root: the kernel tells whoever connects.
    pub fn listen_as(path: &Path, user: u32) -> Result<Self> {
        Self::begin(path, |socket| {
            let listening = std::thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    sys::become_user(user)?;
                    listen(socket, Backlog::new(8)?).map_err(std::io::Error::from)
                });
                thread.join()
            });
            listening
                .map_err(|_| anyhow::anyhow!("the thread panicked"))?
                .context("listening as another user")
        })
    }

    fn begin(path: &Path, listening: impl FnOnce(&OwnedFd) -> Result<()>) -> Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", path.display()));
            }
            _ => {}
        }
        let socket = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)
            .with_context(|| format!("binding {}", path.display()))?;
        listening(&socket)?;
        Ok(Self {
            path: path.to_owned(),
            socket,
        })
    }

    /// The next agent that connects, once it has said hello.
    pub fn accept(&self, timeout: Duration) -> Result<ZdsAgent> {
        wait(&self.socket, timeout).context("waiting for an agent to connect")?;
        let accepted = accept4(self.socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        let agent = ZdsAgent {
            socket: sys::own_received(accepted),
        };
        let hello = agent.receive(timeout)?;
        // version = V1
        ensure!(hello == [0x08, 0x01], "not a hello: {hello:02x?}");
        Ok(agent)
    }

    /// Whether no agent connects in this time.
    pub fn is_left_alone(&self, time: Duration) -> bool {
        wait(&self.socket, time).is_err()
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl ZdsAgent {
    /// Tells of a pod; returns the agent's complaint, empty if it has none.
    pub fn add(&self, pod: &ZdsPod<'_>, netns: &Pod) -> Result<String> {
        let netns = File::open(netns.netns().path())?;
        self.tell(&add_message(pod), &[netns.as_raw_fd()])
    }

    /// Tells that a pod is still there.
    pub fn keep(&self, uid: &str) -> Result<String> {
        self.tell(&request(5, &field(1, uid.as_bytes())), &[])
    }

    /// Tells that a pod has left.
    pub fn del(&self, uid: &str) -> Result<String> {
        self.tell(&request(2, &field(2, uid.as_bytes())), &[])
    }

    /// Tells that all pods were named.
    pub fn snapshot_sent(&self) -> Result<String> {
        self.tell(&request(3, &[]), &[])
    }

    /// Sends any message with any descriptors, and waits for the answer: its complaint, empty if it has none.
    pub fn tell(&self, message: &[u8], descriptors: &[RawFd]) -> Result<String> {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control: &[ControlMessage<'_>] = match descriptors {
            [] => &[],
            _ => &rights,
        };
        let parts = [IoSlice::new(message)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.socket.as_raw_fd(), &parts, control, flags, None)
            .context("telling the agent")?;
        complaint(&self.receive(ANSWER)?)
    }

    /// Whether the agent ends the connection in this time.
    pub fn is_closed(&self, timeout: Duration) -> Result<bool> {
        Ok(self.receive(timeout)?.is_empty())
    }

    fn receive(&self, timeout: Duration) -> Result<Vec<u8>> {
        wait(&self.socket, timeout).context("waiting for the agent's word")?;
        let mut buffer = vec![0; 4096];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        buffer.truncate(length);
        Ok(buffer)
    }
}

fn wait(socket: &OwnedFd, timeout: Duration) -> Result<()> {
    let mut wanted = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut wanted, PollTimeout::try_from(timeout)?)?;
    ensure!(ready > 0, "nothing within {timeout:?}");
    Ok(())
}

/// `WorkloadRequest` with an `AddWorkload`.
pub fn add_message(pod: &ZdsPod<'_>) -> Vec<u8> {
    let info = [
        field(1, pod.name.as_bytes()),
        field(2, pod.namespace.as_bytes()),
        field(3, pod.service_account.as_bytes()),
    ]
    .concat();
    request(1, &[field(1, pod.uid.as_bytes()), field(2, &info)].concat())
}

fn request(number: u8, payload: &[u8]) -> Vec<u8> {
    field(number, payload)
}

/// A field of bytes in the encoding of protocol buffers.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut encoded = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        encoded.push(length as u8 | 0x80);
        length >>= 7;
    }
    encoded.push(length as u8);
    encoded.extend_from_slice(bytes);
    encoded
}

/// What an answer complains of: `WorkloadResponse { ack { error } }`.
fn complaint(answer: &[u8]) -> Result<String> {
    let inner = |bytes: &[u8]| -> Result<Vec<u8>> {
        let [0x0a, rest @ ..] = bytes else {
            bail!("not an answer: {answer:02x?}");
        };
        let varint = rest.iter().position(|byte| byte & 0x80 == 0);
        let (length, rest) = rest.split_at(varint.context("an answer without a length")? + 1);
        let length = length
            .iter()
            .rev()
            .fold(0, |all, byte| all << 7 | usize::from(byte & 0x7f));
        ensure!(rest.len() == length, "an answer that is cut: {answer:02x?}");
        Ok(rest.to_vec())
    };
    ensure!(answer.len() <= 1024, "an answer of {} bytes", answer.len());
    let ack = inner(answer)?;
    if ack.is_empty() {
        return Ok(String::new());
    }
    Ok(String::from_utf8(inner(&ack)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        assert_eq!(complaint(&[0x0a, 0]).unwrap(), "");
        assert_eq!(complaint(&[0x0a, 4, 0x0a, 2, b'n', b'o']).unwrap(), "no");
        for broken in [&[][..], &[0x0a], &[0x0a, 1], &[0x12, 0]] {
            assert!(complaint(broken).is_err(), "{broken:?}");
        }
    }
}
