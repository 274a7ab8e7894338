//! A connection whose socket may be one that does not block: reads and writes then wait with poll(2), as an event loop does.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// As long as no step of a probe waits.
const STEP: Duration = Duration::from_secs(30);

pub struct Waiting {
    stream: TcpStream,
    /// O_NONBLOCK is set.
    non_blocking: bool,
}

impl Waiting {
    pub fn new(stream: TcpStream, non_blocking: bool) -> io::Result<Self> {
        if non_blocking {
            stream.set_nonblocking(true)?;
        }
        Ok(Self {
            stream,
            non_blocking,
        })
    }

    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.stream.shutdown(how)
    }

    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    /// Again and again until the socket is ready. Without O_NONBLOCK, `WouldBlock` is a timeout that has passed.
    fn until<T>(
        &mut self,
        what: PollFlags,
        mut call: impl FnMut(&mut TcpStream) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match call(&mut self.stream) {
                Err(error) if error.kind() == ErrorKind::WouldBlock && self.non_blocking => {}
                outcome => return outcome,
            }
            let mut polled = [PollFd::new(self.stream.as_fd(), what)];
            let timeout = PollTimeout::try_from(STEP).unwrap_or(PollTimeout::MAX);
            match poll(&mut polled, timeout) {
                Ok(0) => return Err(ErrorKind::TimedOut.into()),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Read for Waiting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.until(PollFlags::POLLIN, |stream| stream.read(buffer))
    }
}

impl Write for Waiting {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.until(PollFlags::POLLOUT, |stream| stream.write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
