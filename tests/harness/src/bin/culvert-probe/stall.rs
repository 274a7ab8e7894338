//! A connection that the kernel can do nothing with, because its process is in the middle of a send that does not end.

use std::{
    io::{self, Read as _},
    net::{SocketAddr, TcpStream},
};

use culvert_harness::stalled::StalledSend;
use serde_json::json;

use crate::report;

#[derive(clap::Args)]
pub struct Stall {
    /// Server address
    #[arg(long)]
    to: SocketAddr,
}

pub fn stall(arguments: &Stall) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(arguments.to)?;
    let send = StalledSend::new()?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let sender = scope.spawn(|| send.send(&stream));
        send.wait_until_held()?;
        report::line(&json!({"event": "stalled"}));
        io::copy(&mut io::stdin(), &mut io::sink())?;
        send.release();
        let sent = sender
            .join()
            .map_err(|_| io::Error::other("the sender panicked"))?;
        report::line(&json!({"event": "sent", "outcome": report::outcome(&sent)}));
        Ok(())
    })?;
    let end = stream.read(&mut [0; 1 << 16]);
    report::line(&json!({"event": "end", "how": report::outcome(&end)}));
    Ok(())
}
