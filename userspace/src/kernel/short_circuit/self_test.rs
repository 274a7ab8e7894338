//! What this kernel does with sockets in a SOCKHASH, tried out: one verdict for each way in which a program could tell that it is
//! short-circuited. Nothing is concluded from version numbers.
//!
//! Both ends are on the loopback device of a scratch namespace: a socket whose bytes are redirected has no other device to see.

use std::{
    io::{self, ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd as _},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use culvert_abi::{Flow, FlowKey, ShortSide};
use nix::{
    fcntl::{SpliceFFlags, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv, send},
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{Entrant, ShortCircuit, Unfit};
use crate::kernel::{KernelError, Netns, OpenFlow, routing, sys, tables::address};

/// How long something is waited for that will not come.
const NEVER: Duration = Duration::from_millis(100);
/// Times that a row is tried out, if something else goes wrong, and how long to wait before.
const ATTEMPTS: u32 = 3;
const AGAIN: Duration = Duration::from_millis(100);
/// How long something is waited for that will.
const SOON: Duration = Duration::from_secs(2);

macro_rules! rows {
    ($($variant:ident = $name:literal, $question:literal, $check:ident;)*) => {
        /// A way to tell.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Row { $(#[doc = $question] $variant,)* }

        impl Row {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// As it is printed.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// What is asked of the kernel.
            pub const fn question(self) -> &'static str {
                match self { $(Self::$variant => $question),* }
            }

            fn check(self, stage: &Stage<'_>) -> io::Result<Option<String>> {
                match self { $(Self::$variant => $check(stage)),* }
            }
        }
    };
}

rows! {
    Order = "order", "bytes sent by TCP before are read before what is redirected", order;
    Memory = "memory", "redirected bytes count as the reader's unread ones", memory;
    Reuse = "reuse", "a new connection between the same ports reads nothing of the old one", reuse;
    BlockedReader = "blocked_reader", "a thread that waits for data when its socket is entered gets what comes", blocked_reader;
    Wakeups = "wakeups", "recv(2) that waits goes on waiting after a wake-up that was not for data", wakeups;
    Splice = "splice", "splice(2) reads redirected bytes", splices;
    WaitAll = "wait_all", "MSG_WAITALL waits for all", wait_all;
    LowWater = "low_water", "SO_RCVLOWAT is obeyed", low_water;
    Available = "available", "FIONREAD counts all that is unread", available;
    ZeroCopy = "zero_copy", "MSG_ZEROCOPY tells when a buffer may be used again", zero_copy;
    CloseUnread = "close_unread", "closing a socket with unread bytes resets the connection", close_unread;
    HalfClose = "half_close", "bytes that are unread when both ends have shut down are read", half_close;
    Reset = "reset", "bytes that are unread when the other end resets are read before the error", reset;
    Urgent = "urgent", "urgent data is out of band", urgent;
    Multipath = "multipath", "an MPTCP socket is left alone", multipath;
}

/// What was found out about a [`Row`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub row: Row,
    /// What went otherwise than over TCP; `None` if nothing did.
    pub differs: Option<String>,
}

impl Verdict {
    /// What nobody could try out is taken for different: the other rows hold all the same.
    fn of(row: Row, tried: io::Result<Option<String>>) -> Self {
        let differs =
            tried.unwrap_or_else(|error| Some(format!("could not be tried out: {error}")));
        Self { row, differs }
    }
}

/// The verdicts of this kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdicts(pub Vec<Verdict>);

impl Verdicts {
    /// No program can tell: what [`ShortCircuitMode::Auto`](crate::mesh::ShortCircuitMode::Auto) waits for.
    pub fn nothing_differs(&self) -> bool {
        self.0.iter().all(|verdict| verdict.differs.is_none())
    }

    /// Whether this kernel does here as TCP does.
    pub fn is_same(&self, row: Row) -> bool {
        self.0
            .iter()
            .any(|verdict| verdict.row == row && verdict.differs.is_none())
    }

    /// Why nothing may be short-circuited on this kernel, whatever the operator knows about the programs: without these a reader
    /// may get bytes in another order or not at all, or the node run out of memory.
    pub fn forbids(&self) -> Option<String> {
        const NEEDED: [Row; 4] = [Row::Order, Row::Memory, Row::Reuse, Row::HalfClose];
        self.0.iter().find_map(|verdict| {
            let differs = verdict.differs.as_ref()?;
            NEEDED
                .contains(&verdict.row)
                .then(|| format!("not so: {}: {differs}", verdict.row.question()))
        })
    }
}

/// Tries everything out; takes a fraction of a second.
pub fn try_out(short: &ShortCircuit) -> Result<Verdicts, KernelError> {
    let netns = scratch().map_err(KernelError::SelfTest)?;
    let stage = Stage {
        short,
        netns: Arc::new(netns),
    };
    // Most of the time goes by waiting.
    thread::scope(|scope| {
        let tried: Vec<_> = Row::ALL
            .iter()
            .map(|row| (*row, scope.spawn(|| try_row(*row, &stage))))
            .collect();
        let verdicts = tried.into_iter().map(|(row, tried)| {
            let panicked = |_| Err(io::Error::other("the thread panicked"));
            Verdict::of(row, tried.join().unwrap_or_else(panicked))
        });
        Ok(Verdicts(verdicts.collect()))
    })
}

fn try_row(row: Row, stage: &Stage<'_>) -> io::Result<Option<String>> {
    let mut tried = row.check(stage);
    for _ in 1..ATTEMPTS {
        if tried.is_ok() {
            break;
        }
        // A busy machine can keep a socket in use for longer than it takes to give up, or be out of memory for TCP.
        thread::sleep(AGAIN);
        tried = row.check(stage);
    }
    tried
}

/// A namespace that nobody else is in, with its loopback device up.
fn scratch() -> io::Result<Netns> {
    thread::scope(|scope| {
        let made = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
            routing::loopback_up().map_err(io::Error::other)?;
            Netns::open(std::path::Path::new("/proc/thread-self/ns/net")).map_err(io::Error::other)
        });
        made.join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

struct Stage<'a> {
    short: &'a ShortCircuit,
    netns: Arc<Netns>,
}

/// Two connected sockets, not blocking.
struct Pair<'a> {
    stage: &'a Stage<'a>,
    client: TcpStream,
    server: TcpStream,
}

impl Stage<'_> {
    fn pair(&self) -> io::Result<Pair<'_>> {
        self.pair_from(0)
    }

    /// With the client at a port; 0 for any.
    fn pair_from(&self, port: u16) -> io::Result<Pair<'_>> {
        let (client, server) = self.netns.run(|| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let client = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            client.set_reuse_address(true)?;
            client.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
            client.connect(&listener.local_addr()?.into())?;
            Ok::<_, io::Error>((client, listener.accept()?.0))
        })??;
        let client = TcpStream::from(client);
        client.set_nodelay(true)?;
        for end in [&client, &server] {
            end.set_nonblocking(true)?;
        }
        Ok(Pair {
            stage: self,
            client,
            server,
        })
    }

    fn forget(&self, entrant: &Entrant) {
        let flow = entrant.flow;
        let sockets = [flow.flow.client_socket, flow.flow.server_socket];
        self.short.forget(&flow.key, sockets);
    }

    /// One that is short-circuited.
    fn entered(&self) -> io::Result<Pair<'_>> {
        let pair = self.pair()?;
        pair.enter()?;
        Ok(pair)
    }
}

impl Pair<'_> {
    fn entrant(&self) -> io::Result<Entrant> {
        let (client, server) = (self.client.local_addr()?, self.server.local_addr()?);
        let netns = self.stage.netns.cookie().0;
        let key = FlowKey {
            netns_cookie: netns,
            client: address(client.ip()),
            server: address(server.ip()),
            client_port: client.port(),
            server_port: server.port(),
            padding: 0,
        };
        let flow = Flow {
            client_netns: netns,
            server_netns: netns,
            generation: 0,
            opened_ns: 0,
            client_socket: SockRef::from(&self.client).cookie()?,
            server_socket: SockRef::from(&self.server).cookie()?,
            sequence: 0,
            workload: 0,
            source_identity: 0,
            source_pod: 0,
            service: 0,
            quota: 0,
        };
        Ok(Entrant {
            flow: OpenFlow { key, flow },
            client: Arc::clone(&self.stage.netns),
            server: Arc::clone(&self.stage.netns),
        })
    }

    fn try_enter(&self) -> io::Result<Result<(), Unfit>> {
        let entrants = [self.entrant()?];
        let mut outcomes = self.stage.short.enter_if(&entrants, |_| Ok(()));
        Ok(outcomes.pop().unwrap_or(Err(Unfit::Refused)))
    }

    fn enter(&self) -> io::Result<()> {
        self.try_enter()?.map_err(|unfit| {
            io::Error::other(format!("a connection was not taken: {}", unfit.name()))
        })
    }

    /// What the client's end has sent so far.
    fn counted(&self) -> io::Result<ShortSide> {
        let key = self.entrant()?.flow.key;
        let flow = self.stage.short.counted(&key).unwrap_or_default();
        let [client, _] = flow.sides;
        Ok(client)
    }

    /// Has the client send something that must be redirected.
    fn redirect(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.client).write_all(bytes)?;
        if self.counted()?.messages == 0 {
            return Err(io::Error::other("what was sent was not redirected"));
        }
        Ok(())
    }

    /// What the server reads once there is something, at most so much.
    fn read(&self, most: usize) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while all.len() < most && is_readable(&self.server, SOON)? {
            let mut buffer = [0; 64];
            match (&self.server).read(&mut buffer)? {
                0 => break,
                count => all.extend(buffer.iter().take(count)),
            }
        }
        Ok(all)
    }
}

/// They are counted like all flows, and nobody closes them as a client's end of a pod would.
impl Drop for Pair<'_> {
    fn drop(&mut self) {
        if let Ok(entrant) = self.entrant() {
            self.stage.forget(&entrant);
        }
    }
}

/// Whether there is something in a socket's error queue.
fn is_told(socket: impl AsFd, timeout: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    let mut asked = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    Ok(poll(&mut asked, timeout)? > 0)
}

fn is_readable(socket: impl AsFd, timeout: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    let mut asked = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut asked, timeout)? > 0)
}

fn expect(found: &[u8], wanted: &[u8]) -> Option<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (found != wanted).then(|| format!("read {:?} for {:?}", text(found), text(wanted)))
}

fn order(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.pair()?;
    (&pair.client).write_all(b"1")?;
    pair.enter()?;
    (&pair.client).write_all(b"2")?;
    Ok(expect(&pair.read(2)?, b"12"))
}

fn memory(stage: &Stage<'_>) -> io::Result<Option<String>> {
    const SENT: u32 = 64 << 10;
    let pair = stage.entered()?;
    pair.redirect(&[0; SENT as usize])?;
    let counted = sys::receive_memory(&pair.server)?;
    Ok((counted < SENT).then(|| format!("{SENT} bytes are unread, {counted} are counted")))
}

fn reuse(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let old = stage.entered()?;
    let port = old.client.local_addr()?.port();
    old.redirect(b"old")?;
    // A reset leaves nothing behind that would keep the port.
    for end in [&old.server, &old.client] {
        SockRef::from(end).set_linger(Some(Duration::ZERO))?;
    }
    drop(old);
    let new = stage.pair_from(port)?;
    new.enter()?;
    new.redirect(b"new")?;
    Ok(expect(&new.read(3)?, b"new"))
}

fn blocked_reader(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.pair()?;
    let reader = waiting(&pair.server, MsgFlags::empty(), 1)?;
    // Whoever asks now sees a socket that does not block.
    pair.server.set_nonblocking(true)?;
    let entered = pair.try_enter()?.is_ok();
    (&pair.client).write_all(b"1")?;
    let read = reader.within(NEVER);
    let differs = match &read {
        Some(Ok(read)) => expect(read, b"1"),
        // A call that waits is seen, so that its socket is not entered: this one most likely began too late to wait.
        Some(Err(error)) if error.kind() == ErrorKind::WouldBlock => {
            return Err(io::Error::other("the thread did not wait, or not any more"));
        }
        Some(Err(error)) => Some(error.to_string()),
        None if entered => Some("it goes on waiting".to_owned()),
        None => Some("it waits although its socket was not entered".to_owned()),
    };
    if read.is_none() {
        pair.client.shutdown(Shutdown::Write)?;
        pair.server.shutdown(Shutdown::Read)?;
    }
    reader.end();
    Ok(differs)
}

fn wakeups(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.entered()?;
    // What does not fit any more is waited for, and there will be a wake-up.
    let chunk = [0; 64 << 10];
    loop {
        match (&pair.server).write(&chunk) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    let reader = waiting(&pair.server, MsgFlags::empty(), 1)?;
    let mut buffer = vec![0; 1 << 20];
    while is_readable(&pair.client, NEVER)? {
        if (&pair.client).read(&mut buffer)? == 0 {
            break;
        }
    }
    let early = reader.within(NEVER);
    (&pair.client).write_all(b"1")?;
    let read = match early {
        Some(read) => Some(read),
        None => reader.within(SOON),
    };
    pair.server.shutdown(Shutdown::Read)?;
    reader.end();
    Ok(match read {
        Some(Ok(read)) => expect(&read, b"1"),
        Some(Err(error)) => Some(error.to_string()),
        None => Some("it goes on waiting".to_owned()),
    })
}

fn splices(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.entered()?;
    pair.redirect(b"1")?;
    let (_read, write) = nix::unistd::pipe()?;
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
    Ok(match splice(&pair.server, None, &write, None, 1, flags) {
        Ok(1) => None,
        Ok(count) => Some(format!("it reads {count} bytes")),
        Err(errno) => Some(errno.desc().to_owned()),
    })
}

fn wait_all(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.entered()?;
    pair.redirect(b"1")?;
    let reader = waiting(&pair.server, MsgFlags::MSG_WAITALL, 2)?;
    (&pair.client).write_all(b"2")?;
    let read = reader.within(SOON);
    pair.server.shutdown(Shutdown::Read)?;
    reader.end();
    Ok(match read {
        Some(Ok(read)) => expect(&read, b"12"),
        Some(Err(error)) => Some(error.to_string()),
        None => Some("it goes on waiting".to_owned()),
    })
}

fn low_water(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.entered()?;
    pair.redirect(b"1")?;
    sys::set_socket_option(&pair.server, libc::SO_RCVLOWAT, 2)?;
    let readable = is_readable(&pair.server, Duration::ZERO)?;
    Ok(readable.then(|| "a byte is readable where two are waited for".to_owned()))
}

fn available(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let redirected = stage.entered()?;
    redirected.redirect(b"1")?;
    // One that comes by TCP, and is there when the socket is entered.
    let early = stage.pair()?;
    (&early.client).write_all(b"1")?;
    is_readable(&early.server, SOON)?;
    early.enter()?;
    let mut differs = Vec::new();
    for (how, pair) in [("redirected", redirected), ("by TCP", early)] {
        let count = sys::available(&pair.server)?;
        if count != 1 {
            differs.push(format!("it says {count} of 1 {how}"));
        }
    }
    Ok((!differs.is_empty()).then(|| differs.join(", ")))
}

fn zero_copy(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.entered()?;
    let client = pair.client.as_raw_fd();
    if sys::set_socket_option(&pair.client, libc::SO_ZEROCOPY, 1).is_err() {
        // There is none on this kernel.
        return Ok(None);
    }
    send(client, b"1", MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY))?;
    let told = is_told(&pair.client, NEVER)?;
    Ok((!told).then(|| "it does not tell".to_owned()))
}

fn close_unread(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.entered()?;
    pair.redirect(b"1")?;
    let entrant = pair.entrant()?;
    let client = pair.client.try_clone()?;
    drop(pair);
    // The pair's client lives on in its clone.
    is_readable(&client, SOON)?;
    let read = (&client).read(&mut [0]);
    stage.forget(&entrant);
    Ok(match read {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
        Err(error) => Some(error.to_string()),
        Ok(0) => Some("the other end reads an orderly end".to_owned()),
        Ok(_) => Some("the other end reads data".to_owned()),
    })
}

fn half_close(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.entered()?;
    pair.redirect(b"1")?;
    pair.server.shutdown(Shutdown::Write)?;
    is_readable(&pair.client, SOON)?;
    pair.client.shutdown(Shutdown::Write)?;
    // Until the end is there as well.
    thread::sleep(NEVER);
    Ok(expect(&pair.read(1)?, b"1"))
}

fn reset(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.entered()?;
    pair.redirect(b"1")?;
    SockRef::from(&pair.client).set_linger(Some(Duration::ZERO))?;
    let entrant = pair.entrant()?;
    let server = pair.server.try_clone()?;
    drop(pair);
    thread::sleep(Duration::from_millis(20));
    let mut byte = [0];
    let read = (&server).read(&mut byte);
    stage.forget(&entrant);
    Ok(match read {
        Ok(count) => expect(byte.get(..count).unwrap_or_default(), b"1"),
        Err(error) => Some(error.to_string()),
    })
}

fn urgent(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let pair = stage.entered()?;
    pair.redirect(b"1")?;
    SockRef::from(&pair.client).send_out_of_band(b"!")?;
    let mut byte = [0];
    let until = Instant::now() + NEVER;
    let outcome = loop {
        match recv(pair.server.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB) {
            Ok(count) => break expect(byte.get(..count).unwrap_or_default(), b"!"),
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(5)),
            Err(errno) => break Some(errno.desc().to_owned()),
        }
    };
    Ok(outcome)
}

fn multipath(stage: &Stage<'_>) -> io::Result<Option<String>> {
    let sockets = stage.netns.run(|| {
        let socket = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP));
        let listener = socket()?;
        listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        listener.listen(1)?;
        let client = socket()?;
        client.connect(&listener.local_addr()?)?;
        Ok::<_, io::Error>((client, listener.accept()?.0))
    })?;
    let Ok((client, server)) = sockets else {
        // There are none on this kernel, or they are switched off.
        return Ok(None);
    };
    let pair = Pair {
        stage,
        client: client.into(),
        server: server.into(),
    };
    for end in [&pair.client, &pair.server] {
        end.set_nonblocking(true)?;
    }
    let entered = pair.try_enter()?.is_ok();
    Ok(entered.then(|| "it was taken".to_owned()))
}

/// A thread that waits in recv(2).
struct Reader {
    result: std::sync::mpsc::Receiver<io::Result<Vec<u8>>>,
    thread: thread::JoinHandle<()>,
}

/// Has a thread wait for so many bytes on a socket, which blocks from now on.
fn waiting(socket: &TcpStream, flags: MsgFlags, count: usize) -> io::Result<Reader> {
    socket.set_nonblocking(false)?;
    let socket = socket.try_clone()?;
    let (send, result) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        let mut buffer = vec![0; count];
        let read = recv(socket.as_raw_fd(), &mut buffer, flags).map(|count| {
            buffer.truncate(count);
            buffer
        });
        // Whoever asked may have gone.
        let _ = send.send(read.map_err(io::Error::from));
    });
    // Until it waits.
    thread::sleep(Duration::from_millis(20));
    Ok(Reader { result, thread })
}

impl Reader {
    fn within(&self, time: Duration) -> Option<io::Result<Vec<u8>>> {
        self.result.recv_timeout(time).ok()
    }

    /// Once nothing can keep it waiting.
    fn end(self) {
        let _ = self.thread.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All rows as over TCP, but one that could not be tried out.
    fn without(row: Row) -> Verdicts {
        let tried = |other: &Row| match *other == row {
            true => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
            false => Ok(None),
        };
        let verdicts = Row::ALL.iter().map(|row| Verdict::of(*row, tried(row)));
        Verdicts(verdicts.collect())
    }

    #[test]
    fn a_row_that_could_not_be_tried_out_speaks_for_itself_alone() {
        let verdicts = without(Row::Wakeups);
        assert_eq!(verdicts.forbids(), None);
        assert!(!verdicts.nothing_differs() && !verdicts.is_same(Row::Wakeups));
        assert!(verdicts.is_same(Row::Splice));
    }

    #[test]
    fn what_is_needed_must_have_been_tried_out() {
        let reason = without(Row::Order).forbids().unwrap_or_default();
        assert!(
            reason.contains("could not be tried out: Cannot allocate memory"),
            "{reason}"
        );
    }
}
