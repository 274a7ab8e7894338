//! One connection after the other, in turn to two servers of which policy allows exactly one: what each outcome says about the
//! policy that decided it, and when that changes.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::report;

/// No step waits longer than this.
const STEP: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub struct Alternate {
    /// The server that the first policy allows (server: once)
    #[arg(long)]
    first: SocketAddr,
    /// The server that the second policy allows (server: once)
    #[arg(long)]
    second: SocketAddr,
}

/// An answer of the first server and a refusal by the second mean the first policy. A line for each change of mind.
pub fn alternate(arguments: &Alternate) -> anyhow::Result<()> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            stop.store(true, Ordering::Relaxed);
        });
        let mut known = None;
        let (mut connections, mut odd) = (0_u64, 0_u64);
        while !stop.load(Ordering::Relaxed) {
            for (to, allowed_by) in [(arguments.first, 1), (arguments.second, 2)] {
                connections += 1;
                let policy = match one(to) {
                    Ok(()) => allowed_by,
                    Err(error) if is_refusal(&error) => 3 - allowed_by,
                    Err(error) => {
                        odd += 1;
                        report::line(&json!({"event": "odd", "outcome": report::name(&error)}));
                        continue;
                    }
                };
                if known != Some(policy) {
                    known = Some(policy);
                    report::line(
                        &json!({"event": "policy", "number": policy, "connections": connections}),
                    );
                }
            }
        }
        report::line(&json!({"event": "done", "connections": connections, "odd": odd}));
    });
    Ok(())
}

/// Refused, or cut when the policy that had let it pass was gone.
fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset};
    [
        BrokenPipe,
        ConnectionAborted,
        ConnectionRefused,
        ConnectionReset,
    ]
    .contains(&error.kind())
}

/// A byte there and back; the server closes first.
fn one(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, STEP)?;
    stream.set_read_timeout(Some(STEP))?;
    let mut byte = [b'a'];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)?;
    // A change of policy may end it after the answer: that says nothing about how it began.
    let _ = stream.read(&mut byte);
    Ok(())
}
