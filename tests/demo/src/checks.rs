//! A check: something the demonstration claims, whether it holds, and what was seen.

use anyhow::Result;
use serde::Serialize;

/// One claim.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub ok: bool,
    pub detail: String,
}

/// The claims so far, in the order they are shown.
#[derive(Debug, Default)]
pub struct Checks(pub Vec<Check>);

impl Checks {
    /// Adds a claim with its proof: what was seen, or why it does not hold.
    pub fn add(&mut self, name: &'static str, proof: Result<String>) {
        let ok = proof.is_ok();
        let detail = proof.unwrap_or_else(|error| format!("{error:#}"));
        self.0.push(Check { name, ok, detail });
    }

    /// Adds a failed claim if a step could not be carried out.
    pub fn expect_done(&mut self, name: &'static str, step: Result<()>) {
        if let Err(error) = step {
            self.add(name, Err(error));
        }
    }
}
