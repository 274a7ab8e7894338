//! Servers that say who they are, and a client that counts whom it meets: how connections to one address are spread.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::{report, serve};

/// No step waits longer than this.
const STEP: Duration = Duration::from_secs(10);
/// A longer name is not one.
const LONGEST_NAME: u64 = 64;
/// More different names than this are not counted apart.
const MOST_NAMES: usize = 64;

#[derive(clap::Args)]
pub struct Greet {
    /// Port to listen on
    #[arg(long)]
    port: u16,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    bind: IpAddr,
    /// What to say
    #[arg(long)]
    name: String,
    /// Threads that accept
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
}

#[derive(clap::Args)]
pub struct Meet {
    /// Server address (server: greet)
    #[arg(long)]
    to: SocketAddr,
    /// Connections in all; without it, until standard input ends
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    count: Option<u64>,
    /// Threads that connect
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
}

/// Says the name on each connection and closes it.
pub fn greet(arguments: &Greet) -> anyhow::Result<()> {
    let address = SocketAddr::new(arguments.bind, arguments.port);
    let listener =
        serve::listen(address, None).with_context(|| format!("listening on {address}"))?;
    report::line(&json!({"event": "listening", "local": listener.local_addr()?.to_string()}));
    let greeting = format!("{}\n", arguments.name);
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(|| {
                loop {
                    match listener.accept() {
                        // Who has gone already is not told.
                        Ok((mut stream, _)) => drop(stream.write_all(greeting.as_bytes())),
                        Err(error) => {
                            eprintln!("accept: {error}");
                            std::thread::sleep(Duration::from_millis(10));
                        }
                    }
                }
            });
        }
    });
    Ok(())
}

pub fn meet(arguments: &Meet) -> anyhow::Result<()> {
    let began = Instant::now();
    let left = AtomicU64::new(arguments.count.unwrap_or(u64::MAX));
    let stop = AtomicBool::new(false);
    let met = Mutex::new(BTreeMap::<String, u64>::new());
    let failed = Mutex::new(BTreeMap::<String, u64>::new());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..arguments.threads)
            .map(|_| {
                scope.spawn(|| {
                    let next = || {
                        left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                            n.checked_sub(1)
                        })
                    };
                    while !stop.load(Ordering::Relaxed) && next().is_ok() {
                        match one(arguments.to) {
                            Ok(name) => count(&met, name),
                            Err(error) => count(&failed, report::name(&error)),
                        }
                    }
                })
            })
            .collect();
        if arguments.count.is_none() {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            stop.store(true, Ordering::Relaxed);
        }
        for worker in workers {
            let _ = worker.join();
        }
    });
    let met = met.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    report::line(&json!({
        "met": met,
        "failed": failed,
        "seconds": began.elapsed().as_secs_f64(),
    }));
    Ok(())
}

fn count(counts: &Mutex<BTreeMap<String, u64>>, name: String) {
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    let known = counts.contains_key(&name) || counts.len() < MOST_NAMES;
    *counts
        .entry(if known { name } else { "others".to_owned() })
        .or_default() += 1;
}

/// One connection; the name that the server says.
fn one(to: SocketAddr) -> io::Result<String> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    // No port stays in TIME_WAIT at either end: there are fewer ports than connections.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_read_timeout(Some(STEP))?;
    socket.connect_timeout(&to.into(), STEP)?;
    let stream = TcpStream::from(socket);
    let mut name = String::new();
    (&stream).take(LONGEST_NAME).read_to_string(&mut name)?;
    match name.strip_suffix('\n') {
        Some(name) => Ok(name.to_owned()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
