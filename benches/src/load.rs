//! A slice of load on one way: short, bounded, from a client on one processor to a server on another, or on the same where that is
//! said. Any failed request fails the slice: errors are fast, and would look like speed.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_harness::{End, pinned, pinned_probe};
use serde_json::Value;

use crate::case::{Case, Load};
use crate::cpu::Used;
use crate::plan::Plan;
use crate::servers::{ECHO, NGINX, ONCE, PAGES, REDIS, SINK};
use crate::stage::Station;

/// Far longer than any slice.
const STEP: Duration = Duration::from_secs(60);
const WARMUP: &str = "500";
/// As most servers have them, and flows that are short-circuited.
const NON_BLOCKING: &str = "--non-blocking";
const CONNECTING_THREADS: &str = "4";
const REDIS_CLIENTS: &str = "8";
const NGINX_CONNECTIONS: &str = "16";
const MIB: f64 = 1048576.0;

/// What a slice gave.
pub struct Slice {
    pub figures: Vec<(Case, f64)>,
    /// How many of [`Load::operation`].
    pub operations: f64,
}

/// Runs one slice; `round` chooses among servers that are alike.
pub fn run(
    load: Load,
    station: &Station,
    length: Duration,
    plan: &Plan,
    round: usize,
) -> Result<Slice> {
    let slice = match load {
        // The end says on which processor the client runs.
        Load::Requests(size, case) => requests(station, End::Server, size, case, length),
        Load::RequestsApart(size, case) => requests(station, End::Client, size, case, length),
        Load::Stream(size, case) => stream(station, size, case, length),
        Load::Pages => pages(station, round),
        Load::Connections => connections(station, length, round),
        Load::Redis => redis(station, plan.redis_requests),
        Load::Nginx => nginx(station),
    };
    slice.with_context(|| format!("{} on the way `{}`", load.name(), station.way.name()))
}

fn requests(station: &Station, at: End, size: u32, case: Case, length: Duration) -> Result<Slice> {
    let size = size.to_string();
    let options = ["--size", &size, "--warmup", WARMUP, NON_BLOCKING];
    let before = Used::now(&station.node)?;
    let report = probe(station, at, "rr", ECHO, length, &options)?;
    let spent = Used::now(&station.node)?.since(before);
    succeeded(&report)?;
    let operations = number(&report, "count")?;
    let mut figures = vec![(case, number(&report, "p50_us")?)];
    if case == Case::Rr1k {
        let millions = operations / 1e6;
        figures.extend([
            (Case::Rr1k99, number(&report, "p99_us")?),
            (Case::Rr1kPerSecond, number(&report, "rps")?),
            (Case::CpuPerMreq, spent.node / millions),
            (Case::MachinePerMreq, spent.machine / millions),
        ]);
    }
    Ok(Slice {
        figures,
        operations,
    })
}

fn stream(station: &Station, size: u32, case: Case, length: Duration) -> Result<Slice> {
    let before = Used::now(&station.node)?;
    let report = probe(
        station,
        End::Client,
        "stream",
        SINK,
        length,
        &["--size", &size.to_string(), NON_BLOCKING],
    )?;
    let spent = Used::now(&station.node)?.since(before);
    ensure!(
        report.get("ok").and_then(Value::as_bool) == Some(true),
        "not all that was sent arrived: {report}"
    );
    let operations = number(&report, "bytes")? / MIB;
    let mut figures = vec![(case, number(&report, "gbit_s")?)];
    if case == Case::Stream128k {
        let gib = operations / 1024.0;
        figures.extend([
            (Case::CpuPerGib, spent.node / gib),
            (Case::MachinePerGib, spent.machine / gib),
        ]);
    }
    Ok(Slice {
        figures,
        operations,
    })
}

fn connections(station: &Station, length: Duration, round: usize) -> Result<Slice> {
    let port = one_of(&ONCE, round)?;
    let options = ["--threads", CONNECTING_THREADS];
    let before = Used::now(&station.node)?;
    let report = probe(station, End::Client, "conn", port, length, &options)?;
    let spent = Used::now(&station.node)?.since(before);
    succeeded(&report)?;
    let operations = number(&report, "count")?;
    let millions = operations / 1e6;
    Ok(Slice {
        figures: vec![
            (Case::ConnBare, number(&report, "rps")?),
            (Case::CpuPerMconn, spent.node / millions),
            (Case::AgentPerMconn, spent.agent / millions),
        ],
        operations,
    })
}

/// The probe as a client, for so long.
fn probe(
    station: &Station,
    at: End,
    what: &str,
    port: u16,
    length: Duration,
    options: &[&str],
) -> Result<Value> {
    let (address, port) = station.target(port);
    let launch = pinned_probe(&station.client, at)?
        .args([what, "--to", &format!("{address}:{port}")])
        .args(["--millis", &length.as_millis().to_string()])
        .args(options);
    launch.run(STEP)?.json()
}

fn succeeded(report: &Value) -> Result<()> {
    let errors = report.get("errors").and_then(Value::as_u64);
    ensure!(errors == Some(0), "requests failed: {report}");
    Ok(())
}

fn number(report: &Value, field: &str) -> Result<f64> {
    let number = report.get(field).and_then(Value::as_f64);
    number
        .filter(|number| *number > 0.0)
        .with_context(|| format!("no {field} in {report}"))
}

fn redis(station: &Station, requests: u32) -> Result<Slice> {
    let (address, port) = station.target(REDIS);
    let launch = pinned(&station.client, End::Client, Path::new("redis-benchmark"))?
        .args(["-h", &address.to_string(), "-p", &port.to_string()])
        .args(["-t", "get", "-P", "1", "--csv", "-c", REDIS_CLIENTS])
        .args(["-n", &requests.to_string()]);
    let text = launch.run(STEP)?.success()?;
    let rate = redis_rate(&text).with_context(|| format!("no result for GET in `{text}`"))?;
    Ok(Slice {
        figures: vec![(Case::RedisGet, rate)],
        operations: f64::from(requests),
    })
}

/// `"GET","85324.23",…`, after a line of headings.
fn redis_rate(csv: &str) -> Option<f64> {
    let line = csv
        .lines()
        .find_map(|line| line.strip_prefix("\"GET\",\""))?;
    line.split('"').next()?.parse().ok()
}

fn nginx(station: &Station) -> Result<Slice> {
    let (rate, operations) = wrk(station, NGINX, &[])?;
    Ok(Slice {
        figures: vec![(Case::NginxKeepalive, rate)],
        operations,
    })
}

fn pages(station: &Station, round: usize) -> Result<Slice> {
    let close = ["-H", "Connection: close"];
    let (rate, operations) = wrk(station, one_of(&PAGES, round)?, &close)?;
    Ok(Slice {
        figures: vec![(Case::ConnClose, rate)],
        operations,
    })
}

fn one_of(ports: &[u16], round: usize) -> Result<u16> {
    let port = ports.iter().copied().cycle().nth(round % ports.len());
    port.context("no port to connect to")
}

/// Requests per second and in all. wrk takes whole seconds.
fn wrk(station: &Station, port: u16, options: &[&str]) -> Result<(f64, f64)> {
    let (address, port) = station.target(port);
    let launch = pinned(&station.client, End::Client, Path::new("wrk"))?
        .args(["-t", "1", "-d", "1s", "-c", NGINX_CONNECTIONS])
        .args(options)
        .arg(format!("http://{address}:{port}/"));
    let text = launch.run(STEP)?.success()?;
    wrk_figures(&text).with_context(|| format!("requests failed, or no result, in `{text}`"))
}

/// Requests per second and in all; `None` if any failed.
fn wrk_figures(text: &str) -> Option<(f64, f64)> {
    let failed = |line: &str| {
        let line = line.trim_start();
        line.starts_with("Socket errors:") || line.starts_with("Non-2xx")
    };
    if text.lines().any(failed) {
        return None;
    }
    let rate = text
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"));
    let total = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "));
    Some((rate?.trim().parse().ok()?, total?.0.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "Running 1s test @ http://10.77.1.11:8080/\n  1 threads and 16 connections\n\
        \x20 59321 requests in 1.00s, 67.1MB read\nRequests/sec:  59012.10\nTransfer/sec:     66.75MB\n";

    #[test]
    fn results_of_wrk_and_redis_are_read() {
        assert_eq!(wrk_figures(WRK), Some((59012.10, 59321.0)));
        let csv = "\"test\",\"rps\",\"avg_latency_ms\"\n\"GET\",\"85324.23\",\"0.047\"\n";
        assert_eq!(redis_rate(csv), Some(85324.23));
    }

    #[test]
    fn failed_requests_are_no_result() {
        for line in [
            "  Socket errors: connect 0, read 3, write 0, timeout 0\n",
            "  Non-2xx or 3xx responses: 7\n",
        ] {
            assert_eq!(wrk_figures(&format!("{WRK}{line}")), None);
        }
        assert_eq!(redis_rate("Could not connect to Redis"), None);
    }
}
