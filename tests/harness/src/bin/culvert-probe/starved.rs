//! A connection at whose one end a thread has begun to read, has waited for the socket while another thread sent, and gets no processor
//! to go on; and what it reads in the end. One program has both ends, one of them in the namespace it runs in and one in another's.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use culvert_harness::hog::{Hog, stay_on, two_processors};
use culvert_harness::stalled::StalledSend;
use nix::unistd::gettid;
use serde_json::json;

use crate::{early::is_asleep, report, serve};

/// Until something must have come of it.
const PATIENCE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(1);

#[derive(clap::Args)]
pub struct Starved {
    /// The other end's address and port
    #[arg(long)]
    to: SocketAddr,
    /// The other end's network namespace
    #[arg(long)]
    netns: PathBuf,
    /// Bytes there and back before. Then a line on standard input has a byte sent, and the end of the stream
    #[arg(long, default_value_t = 40)]
    rounds: u32,
}

pub fn starved(arguments: &Starved) -> anyhow::Result<()> {
    let [free, taken] = two_processors()?.context("there is one processor only")?;
    stay_on(free)?;
    let listener = serve::listen_in(&arguments.netns, arguments.to)?;
    let mut writer = TcpStream::connect(arguments.to)?;
    let (mut reader, _) = listener.accept()?;
    for stream in [&writer, &reader] {
        stream.set_nodelay(true)?;
    }
    for _ in 0..arguments.rounds {
        writer.write_all(b"x")?;
        reader.read_exact(&mut [0])?;
        reader.write_all(b"x")?;
        writer.read_exact(&mut [0])?;
    }
    for stream in [&writer, &reader] {
        stream.set_nonblocking(true)?;
    }
    let send = StalledSend::new()?;
    let (outcome, was_starved) = std::thread::scope(|scope| -> anyhow::Result<(String, bool)> {
        let sender = scope.spawn(|| send.send(&reader));
        send.wait_until_held()?;
        let (tell, thread) = mpsc::channel();
        let begun = scope.spawn({
            let reader = &reader;
            move || {
                stay_on(taken)?;
                let _ = tell.send(gettid());
                let mut reader = reader;
                reader.read(&mut [0; 2])
            }
        });
        let thread = thread.recv()?;
        let began = Instant::now();
        while !is_asleep(thread.as_raw())? {
            anyhow::ensure!(began.elapsed() < PATIENCE, "the thread does not wait");
            std::thread::sleep(AGAIN);
        }
        let hog = Hog::on(taken)?;
        send.release();
        let panicked = |_| io::Error::other("a thread panicked");
        let sent = sender.join().map_err(panicked)??;
        let mut rest = vec![0; sent];
        writer.read_exact(&mut rest)?;
        report::line(&json!({"event": "starved"}));
        io::stdin().read_line(&mut String::new())?;
        writer.write_all(b"y")?;
        writer.shutdown(Shutdown::Write)?;
        let was_starved = hog.end()?;
        let outcome = match begun.join().map_err(panicked)? {
            Ok(0) => "EOF".to_owned(),
            Ok(count) => format!("{count} bytes"),
            Err(error) => report::name(&error),
        };
        Ok((outcome, was_starved))
    })?;
    report::line(&json!({"event": "done", "outcome": outcome, "starved": was_starved}));
    Ok(())
}
