//! Everything changes under load, at random and for a long time: no allowed connection fails, no denied one is admitted, and the
//! agents stay as large as they were.
//!
//! `CULVERT_CHURN_SECONDS` says how long the long test goes on, `CULVERT_CHURN_SEED` what happens in it, and
//! `CULVERT_WRITE_DOCS` in which directory RELIABILITY.md is renewed.

mod health;
mod load;
mod page;
mod pods;
mod stage;

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use self::{
    health::Health,
    page::Machine,
    stage::{Outcome, Stage},
};

/// How long, and how certificates live meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    seed: u64,
    lasts: Duration,
    certificate: Duration,
    /// Protections that are off on both nodes.
    knobs: &'static str,
}

/// Numbers that look random and follow from a seed.
pub struct Chance(u64);

impl Chance {
    /// Less than `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((word ^ (word >> 31)) % bound as u64).unwrap_or_default()
    }

    fn one_in(&mut self, number: usize) -> bool {
        self.below(number) == 0
    }
}

/// What happens at set times: all of it in the first half, so that what is measured in the second has nothing to do with it.
#[derive(Clone, Copy, Debug)]
enum Upset {
    ControlPlane,
    Agent(usize),
    Measure,
}

const UPSETS: [(f64, Upset); 5] = [
    (0.10, Upset::ControlPlane),
    (0.18, Upset::Agent(0)),
    (0.28, Upset::ControlPlane),
    (0.36, Upset::Agent(1)),
    (0.50, Upset::Measure),
];

/// What a run came to.
struct Run {
    report: Value,
    outcome: Outcome,
    before: Health,
    after: Health,
}

impl Run {
    fn judge(&self) -> Result<()> {
        self.outcome.judge(&self.report);
        self.after.judge(&self.before);
        if let Some(directory) = std::env::var_os("CULVERT_WRITE_DOCS") {
            page::write(directory.as_ref(), &self.report)?;
        }
        Ok(())
    }
}

fn churn(plan: Plan) -> Result<Run> {
    println!("churn: {plan:?}");
    let machine = Machine::describe();
    let mut chance = Chance(plan.seed);
    let mut stage = Stage::new(&plan)?;
    let began = Instant::now();
    let mut upsets = UPSETS.into_iter().peekable();
    let mut before = None;
    while began.elapsed() < plan.lasts || upsets.peek().is_some() {
        match upsets.next_if(|(share, _)| began.elapsed() >= plan.lasts.mul_f64(*share)) {
            Some((_, Upset::ControlPlane)) => stage.restart_control_plane()?,
            Some((_, Upset::Agent(node))) => stage.restart_agent(node)?,
            Some((_, Upset::Measure)) => before = Some(stage.measure()?),
            None => stage.change(&mut chance)?,
        }
    }
    let after = stage.measure()?;
    let lasted = began.elapsed();
    let outcome = stage.end()?;
    let before = before.context("nothing was measured in the middle")?;
    let report = json!({
        "seed": plan.seed,
        "seconds": lasted.as_secs(),
        "certificate_seconds": plan.certificate.as_secs(),
        "machine": machine.to_json(),
        "changes": outcome.changes,
        "connections": outcome.totals,
        "certificates": outcome.certificates,
        "streams": outcome.streams,
        "log": outcome.log,
        "before": before.to_json(),
        "after": after.to_json(),
    });
    println!("{report}");
    Ok(Run {
        report,
        outcome,
        before,
        after,
    })
}

fn number(variable: &str) -> Result<Option<u64>> {
    let text = std::env::var(variable).ok();
    text.map(|text| text.parse().with_context(|| format!("{variable}={text}")))
        .transpose()
}

fn seed() -> Result<u64> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(number("CULVERT_CHURN_SEED")?.unwrap_or(now.as_secs()))
}

#[test]
#[ignore = "ten minutes"]
fn ten_minutes_of_changes_under_load_fail_nobody_and_admit_nobody_else() -> Result<()> {
    let seconds = number("CULVERT_CHURN_SECONDS")?.unwrap_or(600);
    churn(Plan {
        seed: seed()?,
        lasts: Duration::from_secs(seconds),
        certificate: Duration::from_secs(60),
        knobs: "",
    })?
    .judge()
}

#[test]
fn changes_under_load_fail_nobody_and_admit_nobody_else() -> Result<()> {
    churn(Plan {
        seed: seed()?,
        lasts: Duration::from_secs(20),
        certificate: Duration::from_secs(10),
        knobs: "",
    })?
    .judge()
}

#[test]
fn twin_without_policy_the_denied_are_seen_to_be_admitted() -> Result<()> {
    let run = churn(Plan {
        seed: 1,
        lasts: Duration::from_secs(4),
        certificate: Duration::from_secs(10),
        knobs: "deny-allows,skip-policy",
    })?;
    for kind in ["direct, IPv4", "hbone, IPv4"] {
        let counts = run.outcome.totals.get(kind).context("connections")?;
        assert!(counts.admitted > 0, "{}", run.report);
    }
    Ok(())
}
