//! A connection at whose one end a thread has been waiting in recv(2) since before that socket stopped to block, and what it gets. One
//! program has both ends, one of them in the namespace it runs in and one in another's.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::unistd::gettid;
use serde_json::json;

use crate::{report, serve, waiting::Waiting};

/// Until something must have come of it.
const PATIENCE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(1);

#[derive(clap::Args)]
pub struct Early {
    /// The other end's address and port
    #[arg(long)]
    to: SocketAddr,
    /// The other end's network namespace
    #[arg(long)]
    netns: PathBuf,
    /// Bytes that the end with the thread sends, before a line on standard input has one sent to it
    #[arg(long, default_value_t = 40)]
    rounds: u32,
}

pub fn early(arguments: &Early) -> anyhow::Result<()> {
    let listener = serve::listen_in(&arguments.netns, arguments.to)?;
    let mut waiting = TcpStream::connect(arguments.to)?;
    let (other, _) = listener.accept()?;
    for stream in [&waiting, &other] {
        stream.set_nodelay(true)?;
    }
    let (tell, told) = mpsc::channel();
    let (tell_thread, thread) = mpsc::channel();
    let mut reader = waiting.try_clone()?;
    std::thread::spawn(move || {
        let _ = tell_thread.send(gettid());
        // Who asked may have given up.
        let _ = tell.send(reader.read(&mut [0; 2]));
    });
    let thread = thread.recv()?;
    let began = Instant::now();
    while !is_asleep(thread.as_raw())? {
        anyhow::ensure!(began.elapsed() < PATIENCE, "the thread does not wait");
        std::thread::sleep(AGAIN);
    }
    waiting.set_nonblocking(true)?;
    let mut other = Waiting::new(other, true)?;
    for _ in 0..arguments.rounds {
        waiting.write_all(b"x")?;
        other.read_exact(&mut [0])?;
    }
    report::line(&json!({"event": "used"}));
    io::stdin().read_line(&mut String::new())?;
    other.write_all(b"y")?;
    let outcome = match told.recv_timeout(PATIENCE) {
        Ok(Ok(count)) => format!("{count} bytes"),
        Ok(Err(error)) => report::name(&error),
        Err(_) => "TIMEOUT".to_owned(),
    };
    report::line(&json!({"event": "done", "outcome": outcome}));
    Ok(())
}

/// Whether a thread of this process sleeps: the one asked about has nothing else to sleep for than its call.
pub fn is_asleep(thread: i32) -> io::Result<bool> {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat"))?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    // S for what comes, D for the socket itself.
    Ok(after_name.trim_start().starts_with(['S', 'D']))
}
