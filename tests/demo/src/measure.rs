//! The figures: rounds with the mesh and without in turns, so that what disturbs the machine disturbs both.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_harness::{End, Pod, pinned_probe};
use serde_json::Value;

use crate::checks::Checks;
use crate::figures::Figures;
use crate::pairs::Pair;
use crate::stage::{COLLECT, ECHO, SINK, SOON, Stage};

const ROUNDS: usize = 24;
/// Enough for a median. On a busy machine there is no time for more: the demonstration takes a minute at most.
const FEWEST_ROUNDS: usize = 5;
const LONGEST: Duration = Duration::from_secs(6);
const LONGEST_PLAIN: Duration = Duration::from_secs(2);
const REQUESTS: &str = "1000";
const WARMUP: &str = "100";
const REQUEST_BYTES: &str = "1024";
const STREAM_BYTES: &str = "134217728";
const VERIFIED_BYTES: &str = "67108864";

/// The rounds of one pair.
#[derive(Default)]
pub struct Rounds {
    pub with: Vec<Figures>,
    pub without: Vec<Figures>,
    /// Of neighbours in time: what disturbs the machine for longer than a round disturbs both.
    pub ratios: Vec<Figures>,
}

/// Measures every pair on the plain stage, and on the meshed one those that may connect.
pub fn all(pairs: &mut [Pair], plain: &Stage, meshed: &Stage) -> Result<()> {
    learn(meshed)?;
    for pair in pairs {
        let longest = if pair.allowed { LONGEST } else { LONGEST_PLAIN };
        let rounds = rounds(pair, plain, meshed, ROUNDS, longest)?;
        pair.figures = Figures::median(&rounds.with);
        pair.plain = Figures::median(&rounds.without);
        pair.ratios = Figures::median(&rounds.ratios);
        pair.ratio_p50 = pair.ratios.p50_us;
    }
    Ok(())
}

/// Lets the agents learn the ways that are measured.
pub fn learn(meshed: &Stage) -> Result<()> {
    [ECHO, SINK]
        .into_iter()
        .try_for_each(|port| meshed.learn(port))
}

/// At most `most` rounds of a pair in turns, and no new one after `longest`.
pub fn rounds(
    pair: &Pair,
    plain: &Stage,
    meshed: &Stage,
    most: usize,
    longest: Duration,
) -> Result<Rounds> {
    let mut rounds = Rounds::default();
    let deadline = Instant::now() + longest;
    for round in 0..most {
        if round >= FEWEST_ROUNDS && Instant::now() >= deadline {
            break;
        }
        if !pair.allowed {
            rounds.without.push(once(plain, pair)?);
            continue;
        }
        // Who goes first alternates too.
        let (measured, reference) = if round % 2 == 0 {
            let measured = once(meshed, pair)?;
            (measured, once(plain, pair)?)
        } else {
            let reference = once(plain, pair)?;
            (once(meshed, pair)?, reference)
        };
        rounds.ratios.push(measured.ratio(&reference));
        rounds.with.push(measured);
        rounds.without.push(reference);
    }
    Ok(rounds)
}

fn once(stage: &Stage, pair: &Pair) -> Result<Figures> {
    let (from, to) = (stage.source(pair.from), &stage.server(pair.to).pod);
    let requests = [
        "--size",
        REQUEST_BYTES,
        "--count",
        REQUESTS,
        "--warmup",
        WARMUP,
    ];
    let requests = probe(from, "rr", &to.at(ECHO), &requests)?;
    ensure!(
        requests.get("errors").and_then(Value::as_u64) == Some(0),
        "requests from {} to {} failed: {requests}",
        pair.from,
        pair.to
    );
    let stream = probe(from, "stream", &to.at(SINK), &["--bytes", STREAM_BYTES])?;
    ensure!(
        is_ok(&stream),
        "the stream from {} to {} failed: {stream}",
        pair.from,
        pair.to
    );
    let figure = |report: &Value, name: &str| report.get(name).and_then(Value::as_f64);
    Ok(Figures {
        p50_us: figure(&requests, "p50_us"),
        p99_us: figure(&requests, "p99_us"),
        rps: figure(&requests, "rps"),
        gbit_s: figure(&stream, "gbit_s"),
    })
}

/// A bulk transfer on both paths arrives as it was sent.
pub fn checksums(meshed: &Stage, checks: &mut Checks) {
    let proof = || -> Result<String> {
        meshed.learn(COLLECT)?;
        let mut seen = Vec::new();
        for server in ["server-a", "server-b"] {
            let to = meshed.server(server).pod.at(COLLECT);
            let arguments = ["--bytes", VERIFIED_BYTES, "--verify"];
            let report = probe(&meshed.client, "stream", &to, &arguments)?;
            ensure!(is_ok(&report), "to {server}: {report}");
            let sum = report.get("sha256_remote").and_then(Value::as_str);
            let sum = sum.and_then(|sum| sum.get(..12));
            let sum = sum.with_context(|| format!("to {server}, no checksum: {report}"))?;
            seen.push(format!("{server} has sha256 {sum}…"));
        }
        Ok(format!("64 MiB each, as sent: {}", seen.join(", ")))
    };
    checks.add("bulk transfers arrive unchanged on both paths", proof());
}

fn probe(from: &Pod, what: &str, to: &str, arguments: &[&str]) -> Result<Value> {
    let launch = pinned_probe(from, End::Client)?
        .args([what, "--to", to])
        .args(arguments);
    launch.run(SOON * 3)?.json()
}

fn is_ok(report: &Value) -> bool {
    report.get("ok").and_then(Value::as_bool) == Some(true)
}
