//! The order of the demonstration: both stages, the proofs, the figures, the intruder, the revocation. What cannot be
//! shown becomes a failed check; what cannot even be set up ends the run. Everything is removed when it returns, and
//! by the harness's supervisor if it is interrupted.

use anyhow::Result;

use crate::checks::Checks;
use crate::report::Report;
use crate::stage::Stage;
use crate::{intruder, measure, pairs, proofs, revocation};

/// Carries it out, telling on standard error how far it is.
pub fn run() -> Result<Report> {
    step("setting up two nodes with their pods, with the mesh and without");
    let plain = Stage::plain()?;
    let meshed = Stage::meshed()?;
    let mut checks = Checks::default();

    step("looking at connections from both ends");
    let mut pairs = pairs::of();
    let observed = pairs::observe(&mut pairs, &meshed, &mut checks);
    checks.expect_done("the allowed pairs connect", observed);
    proofs::prove(&plain, &meshed, &mut checks);

    step("letting the intruder try");
    intruder::try_both(&mut pairs, &plain, &meshed, &mut checks);

    step("measuring, in turns with the mesh and without");
    measure::checksums(&meshed, &mut checks);
    let measured = measure::all(&mut pairs, &plain, &meshed);
    checks.expect_done("every pair is measured", measured);

    step("changing the policy under two open connections");
    let revocation_ms = revocation::revoke(&meshed, &mut checks);
    Ok(Report {
        pairs,
        revocation_ms,
        checks: checks.0,
    })
}

fn step(what: &str) {
    eprintln!("… {what}");
}
