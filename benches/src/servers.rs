//! The servers in a pod: the probe's own, redis and nginx, with the least configuration that makes them fast and silent.
//! They start before the pod is enrolled, all on the same processor.

use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_harness::{End, Launch, Pod, Proc, pinned, pinned_probe, wait_until};

pub const ECHO: u16 = 7001;
pub const SINK: u16 = 7002;
/// One byte there and back, then the server closes: as HTTP without keep-alive does. Several ports, because who closes
/// first keeps the pair of ports for a minute.
pub const ONCE: [u16; 4] = [7010, 7011, 7012, 7013];
pub const REDIS: u16 = 6379;
pub const NGINX: u16 = 8080;
/// The same pages, for connections that nginx closes after one: several, for the same reason.
pub const PAGES: [u16; 4] = [8090, 8091, 8092, 8093];

const START: Duration = Duration::from_secs(10);
/// More than the probe's connecting threads, so that none waits for an acceptor.
const ACCEPTORS: &str = "8";
const PAGE_BYTES: usize = 1024;

/// Every port that is measured.
pub fn ports() -> impl Iterator<Item = u16> {
    [ECHO, SINK, REDIS, NGINX]
        .into_iter()
        .chain(ONCE)
        .chain(PAGES)
}

/// Starts all of them; their files go to `directory`.
pub fn start(pod: &Pod, directory: &Path) -> Result<Vec<Proc>> {
    let mut servers = vec![probe(pod, ECHO, "echo")?, probe(pod, SINK, "sink")?];
    for port in ONCE {
        servers.push(probe(pod, port, "once")?);
    }
    servers.push(redis(pod, directory)?);
    servers.push(nginx(pod, directory)?);
    Ok(servers)
}

fn probe(pod: &Pod, port: u16, mode: &str) -> Result<Proc> {
    let launch = pinned_probe(pod, End::Server)?;
    let launch = launch.args(["serve", "--quiet", "--acceptors", ACCEPTORS, "--mode", mode]);
    // One of them is measured for its connections' beginning and end: with the fewest system calls.
    let launch = match mode {
        "once" => launch,
        _ => launch.arg("--non-blocking"),
    };
    let server = launch.args(["--port", &port.to_string()]).spawn()?;
    server.wait_for_event("listening", START)?;
    Ok(server)
}

fn redis(pod: &Pod, directory: &Path) -> Result<Proc> {
    let launch = pinned(pod, End::Server, Path::new("redis-server"))?
        .args(["--port", &REDIS.to_string(), "--bind", "0.0.0.0"])
        .args(["--protected-mode", "no", "--daemonize", "no"])
        .args(["--save", "", "--appendonly", "no"])
        .args(["--loglevel", "warning", "--dir"])
        .arg(directory);
    answering(pod, launch, REDIS)
}

fn nginx(pod: &Pod, directory: &Path) -> Result<Proc> {
    let file = directory.join("nginx.conf");
    std::fs::write(&file, nginx_configuration(directory))
        .with_context(|| format!("writing {}", file.display()))?;
    let launch = pinned(pod, End::Server, Path::new("nginx"))?
        .arg("-p")
        .arg(directory)
        .args(["-e", "stderr", "-c"])
        .arg(&file);
    answering(pod, launch, NGINX)
}

/// One worker, a page from memory, connections that stay open, no logs.
fn nginx_configuration(directory: &Path) -> String {
    let directory = directory.display();
    let page = "x".repeat(PAGE_BYTES);
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {directory}/{kind};\n"))
        .collect();
    let listen: String = [NGINX]
        .into_iter()
        .chain(PAGES)
        .map(|port| format!("listen {port};\n"))
        .collect();
    format!(
        "daemon off;\nuser root;\nworker_processes 1;\npid {directory}/nginx.pid;\nerror_log stderr crit;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\naccess_log off;\nkeepalive_requests 1000000000;\n{temporary}\
         server {{\n{listen}location / {{ return 200 \"{page}\"; }}\n}}\n}}\n"
    )
}

/// Starts a server that does not say when it listens.
fn answering(pod: &Pod, launch: Launch, port: u16) -> Result<Proc> {
    let server = launch.spawn()?;
    let what = format!("the server on port {port}");
    wait_until(START, &what, || {
        if let Some(status) = server.status() {
            let log = server.log().tail();
            anyhow::bail!(
                "it ended ({status}): {log}; `cargo xtask bench` installs what is needed"
            );
        }
        let connected = pod.in_netns(|| TcpStream::connect((Ipv4Addr::LOCALHOST, port)))?;
        Ok(connected.ok().map(drop))
    })?;
    Ok(server)
}
