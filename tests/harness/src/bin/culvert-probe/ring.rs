//! The server on io_uring.

use std::net::{Ipv4Addr, TcpListener};

use serde_json::json;

use crate::report;

#[derive(clap::Args)]
pub struct Arguments {
    /// Port to listen on
    #[arg(long)]
    port: u16,
}

pub fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, arguments.port))?;
    report::line(&json!({"event": "listening", "local": listener.local_addr()?.to_string()}));
    Ok(culvert_harness::ring::echo(&listener)?)
}
