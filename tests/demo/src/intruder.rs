//! The pod that may connect to nobody: what it gets, that it moves no byte, and that the same pod without the mesh does.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::checks::Checks;
use crate::pairs::{Pair, way};
use crate::stage::{SOON, Server, Stage, WITNESS, connect, text};

const WORD: &str = "let me in";
/// The first is judged by the agent, later ones by what the kernel has learnt.
const ATTEMPTS: usize = 3;

/// Lets it try both servers, on both stages.
pub fn try_both(pairs: &mut [Pair], plain: &Stage, meshed: &Stage, checks: &mut Checks) {
    let denied = pairs.iter_mut().filter(|pair| !pair.allowed);
    let proofs: Result<Vec<String>> = denied.map(|pair| try_one(pair, plain, meshed)).collect();
    checks.add(
        "the intruder moves no byte",
        proofs.map(|proofs| proofs.join("; ")),
    );
}

fn try_one(pair: &mut Pair, plain: &Stage, meshed: &Stage) -> Result<String> {
    let agent = meshed.agents()?.of(pair.to);
    let mark = agent.log().mark();
    let mut outcomes = Vec::new();
    for _ in 0..ATTEMPTS {
        let attempt = attempt(meshed, pair.to)?;
        ensure!(
            attempt.received == 0,
            "{} bytes came from {}",
            attempt.received,
            pair.to
        );
        outcomes.push(attempt.outcome);
    }
    outcomes.dedup();
    let outcome = outcomes.join(", then ");
    pair.outcome = Some(outcome.clone());
    let path = way(pair.to);
    let fields = [
        ("src.workload", pair.from),
        ("dst.workload", pair.to),
        ("path", path),
    ];
    let refusal = agent.wait_for_access(mark, &fields, SOON)?;
    let reason = refusal.field("error");
    let reason = reason.with_context(|| format!("not logged as refused: {}", refusal.text))?;
    pair.path = Some(path.to_owned());
    let proof = prove(plain, meshed, pair.to)?;
    Ok(format!(
        "{}: {outcome} ({path}: {reason}), {proof}",
        pair.to
    ))
}

struct Attempt {
    outcome: String,
    received: u64,
}

/// One connection attempt with a word, waiting for its echo.
fn attempt(stage: &Stage, to: &str) -> Result<Attempt> {
    let to = stage.server(to).pod.at(WITNESS);
    let length = WORD.len().to_string();
    let report = connect(&stage.intruder, &to, &["--send", WORD, "--read", &length])?;
    let received = report.get("read_bytes").and_then(Value::as_u64);
    let outcome = match (
        text(&report, "connect"),
        text(&report, "send"),
        text(&report, "read"),
    ) {
        ("ok", "ok", outcome) | ("ok", outcome, _) | (outcome, ..) => outcome.to_owned(),
    };
    Ok(Attempt {
        outcome,
        received: received.unwrap_or(0),
    })
}

/// The server accepted nothing with the mesh, and without it the same attempt succeeds.
fn prove(plain: &Stage, meshed: &Stage, to: &str) -> Result<String> {
    let told = accepted_from_intruder(meshed, to)?;
    ensure!(
        told == 0,
        "{to} accepted {told} connections of the intruder"
    );
    let control = attempt(plain, to)?;
    ensure!(
        control.received == WORD.len() as u64,
        "without the mesh it does not reach {to} either ({}): this proves nothing",
        control.outcome
    );
    let told = accepted_from_intruder(plain, to)?;
    ensure!(
        told > 0,
        "without the mesh {to} did not tell of the intruder: this proves nothing"
    );
    Ok(format!(
        "0 bytes and none accepted (without the mesh: {} bytes)",
        control.received
    ))
}

fn accepted_from_intruder(stage: &Stage, to: &str) -> Result<usize> {
    let Server { pod, witness, .. } = stage.server(to);
    // A connection of the client's own, so that all earlier ones have been told of.
    let mark = witness.log().mark();
    connect(&stage.client, &pod.at(WITNESS), &[])?;
    witness.wait_for_event_after(mark, "accepted", SOON)?;
    let mut count = 0;
    for accepted in witness.events("accepted") {
        let peer: SocketAddr = text(&accepted, "peer")
            .parse()
            .context("a server's report")?;
        count += usize::from(peer.ip() == stage.intruder.address());
    }
    Ok(count)
}
