//! Two threads at each end, of which one sends and the other receives, all at the same time. Called by `sequences`.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Dice, byte, compare};
use crate::report;

/// Until a call must have come to something.
const PATIENCE: Duration = Duration::from_secs(15);
const MOST_SENDS: usize = 12;
/// More than this never waits to be sent: whoever waits for room is seen as well.
const MUCH: usize = 600_000;

/// How an end's socket waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Blocks,
    DoesNotBlock,
    /// O_NONBLOCK comes and goes, also in the middle of a call.
    Changes,
}

/// What a thread does before, and how much it sends or reads.
struct Step {
    pause: Option<Duration>,
    /// O_NONBLOCK is set, or cleared.
    non_blocking: Option<bool>,
    size: usize,
}

/// Reading as much as there is.
const REST: Step = Step {
    pause: None,
    non_blocking: None,
    size: 64 << 10,
};

/// What an end does.
struct End {
    name: &'static str,
    stream: TcpStream,
    kind: Kind,
    sends: Vec<Step>,
    /// At first; then all the rest.
    reads: Vec<Step>,
}

/// What the threads said: each call that sends, and each end's stream as a whole.
pub fn run([client, server]: [TcpStream; 2], dice: &mut Dice) -> anyhow::Result<Vec<String>> {
    let client = End::new("client", client, dice)?;
    let server = End::new("server", server, dice)?;
    let panicked = |_| io::Error::other("a thread panicked");
    std::thread::scope(|scope| {
        let begun = [(&client, &server), (&server, &client)].map(|(own, peer)| {
            let sender = scope.spawn(|| own.send());
            let receiver = scope.spawn(|| own.receive(peer.name));
            (sender, receiver)
        });
        let mut said = vec![format!("{:?}, {:?}", client.kind, server.kind)];
        for (sender, receiver) in begun {
            said.extend(sender.join().map_err(panicked)??);
            said.push(receiver.join().map_err(panicked)??);
        }
        Ok(said)
    })
}

impl End {
    fn new(name: &'static str, stream: TcpStream, dice: &mut Dice) -> io::Result<Self> {
        let kind = match dice.below(8) {
            0 => Kind::Blocks,
            1..3 => Kind::Changes,
            _ => Kind::DoesNotBlock,
        };
        stream.set_nonblocking(kind != Kind::Blocks)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut steps = |most: usize| -> Vec<Step> {
            let count = 1 + dice.below(most);
            (0..count).map(|_| Step::new(kind, dice)).collect()
        };
        let mut sends = steps(MOST_SENDS);
        let reads = steps(MOST_SENDS);
        if dice.below(16) == 0
            && let Some(last) = sends.last_mut()
        {
            last.size += MUCH;
        }
        Ok(Self {
            name,
            stream,
            kind,
            sends,
            reads,
        })
    }

    /// Sends all, shuts down, and says how that went.
    fn send(&self) -> io::Result<Vec<String>> {
        let (mut said, mut at) = (Vec::new(), 0);
        for step in &self.sends {
            step.prepare(&self.stream)?;
            let bytes: Vec<u8> = (at..at + step.size).map(|at| byte(self.name, at)).collect();
            let outcome = self.write(&bytes);
            said.push(format!(
                "{} sends {}: {}",
                self.name,
                bytes.len(),
                report::outcome(&outcome)
            ));
            at += bytes.len();
        }
        let done = self.stream.shutdown(Shutdown::Write);
        said.push(format!(
            "{} shuts down: {}",
            self.name,
            report::outcome(&done)
        ));
        Ok(said)
    }

    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = self.until(PollFlags::POLLOUT, || (&self.stream).write(bytes))?;
            bytes = bytes.get(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Reads to the end, compares all, and says how it ended.
    fn receive(&self, peer: &'static str) -> anyhow::Result<String> {
        let (mut buffer, mut at) = (Vec::new(), 0);
        let mut steps = self.reads.iter();
        let how = loop {
            let step = steps.next().unwrap_or(&REST);
            step.prepare(&self.stream)?;
            buffer.resize(step.size, 0);
            match self.until(PollFlags::POLLIN, || (&self.stream).read(&mut buffer)) {
                Ok(0) => break "EOF".to_owned(),
                Ok(count) => {
                    compare(self.name, peer, at, buffer.get(..count).unwrap_or_default())?;
                    at += count;
                }
                Err(error) => break report::name(&error),
            }
        };
        Ok(format!("{} reads {at}: {how}", self.name))
    }

    /// Calls until that comes to something. Where the socket always blocks, EAGAIN is nobody's doing, or a timeout.
    fn until(
        &self,
        what: PollFlags,
        mut call: impl FnMut() -> io::Result<usize>,
    ) -> io::Result<usize> {
        let began = Instant::now();
        loop {
            match call() {
                Err(error)
                    if error.kind() == ErrorKind::WouldBlock
                        && self.kind != Kind::Blocks
                        && began.elapsed() < PATIENCE => {}
                outcome => return outcome,
            }
            let mut polled = [PollFd::new(self.stream.as_fd(), what)];
            let time = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
            poll(&mut polled, time)?;
        }
    }
}

impl Step {
    fn new(kind: Kind, dice: &mut Dice) -> Self {
        let changes = kind == Kind::Changes && dice.below(2) == 0;
        Self {
            pause: (dice.below(4) == 0).then(|| dice.pause()),
            non_blocking: changes.then(|| dice.below(2) == 0),
            size: dice.size(),
        }
    }

    fn prepare(&self, stream: &TcpStream) -> io::Result<()> {
        if let Some(pause) = self.pause {
            std::thread::sleep(pause);
        }
        self.non_blocking
            .map_or(Ok(()), |is| stream.set_nonblocking(is))
    }
}
