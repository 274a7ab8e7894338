//! What connects while everything changes: pairs at a steady pace that know what to expect, and streams that must go on.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use culvert_harness::{Pod, Proc};
use culvert_tests::scene::SOON;
use serde::Serialize;
use serde_json::Value;

use crate::life::nothing_lost;

/// What a pair's connections are to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    Allow,
    Deny,
    Unsure,
}

impl Expected {
    pub fn allow_if(allowed: bool) -> Self {
        match allowed {
            true => Self::Allow,
            false => Self::Deny,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Unsure => "unsure",
        }
    }
}

/// By which way connections go when they are allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Both pods are on the node with this place.
    Direct(usize),
    /// By HBONE, from one node to the other.
    Tunnel,
    /// To a service with endpoints on both nodes.
    Service,
}

impl Way {
    /// Whether new connections need the agent of this node.
    pub fn needs_agent(self, _node: usize) -> bool {
        // Of direct pairs the kernel part knows all: they connected a moment ago.
        !matches!(self, Self::Direct(_))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Direct(_) => "direct",
            Self::Tunnel => "hbone",
            Self::Service => "service",
        }
    }
}

/// What connections came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Counts {
    /// Had to succeed, and did.
    pub allowed: u64,
    /// Had to fail, and did.
    pub denied: u64,
    /// Were under way when what is expected changed, or while nothing was expected.
    pub unjudged: u64,
    /// Had to succeed, and did not.
    pub failures: u64,
    /// Had to fail, and did not.
    pub admitted: u64,
    /// What went wrong, one by one.
    pub wrong: Vec<String>,
}

/// By way and family.
pub type Totals = BTreeMap<String, Counts>;

/// One pair.
pub struct Load {
    name: String,
    kind: String,
    pub way: Way,
    pub usually: Expected,
    probe: Proc,
}

impl Load {
    pub fn start(way: Way, from: &Pod, to: &str, every_ms: u64, usually: Expected) -> Result<Self> {
        let words = ["paced", "--to", to, "--every-ms", &every_ms.to_string()];
        let probe = from.probe()?.args(words);
        let probe = probe.args(["--expect", usually.word()]).stdin().spawn()?;
        probe.wait_for_event("open", SOON)?;
        let family = if to.starts_with('[') { "IPv6" } else { "IPv4" };
        Ok(Self {
            name: format!("{} to {to}", from.name()),
            kind: format!("{}, {family}", way.name()),
            way,
            usually,
            probe,
        })
    }

    /// From here on this is expected.
    pub fn expect(&self, expected: Expected) -> Result<()> {
        let mark = self.probe.log().mark();
        self.probe.send_line(expected.word())?;
        self.probe
            .wait_for_event_after(mark, "expects", SOON)
            .map(drop)
    }

    /// Ends it and adds what its connections came to.
    pub fn end(self, totals: &mut Totals) -> Result<()> {
        self.probe.close_stdin();
        let done = self.probe.wait_for_event("done", SOON * 2)?;
        let number = |key: &str| done.get(key).and_then(Value::as_u64);
        let number = |key: &str| number(key).with_context(|| format!("{key} in {done}"));
        let counts = totals.entry(self.kind.clone()).or_default();
        counts.allowed += number("allowed")?;
        counts.denied += number("denied")?;
        counts.unjudged += number("unjudged")?;
        counts.failures += number("failures")?;
        counts.admitted += number("admitted")?;
        for event in ["failed", "admitted"] {
            let told = self.probe.events(event).into_iter();
            let told = told.map(|event| format!("{}: {event}", self.name));
            counts.wrong.extend(told);
        }
        Ok(())
    }
}

/// Connections that stay open, each with bytes there and back all the time.
pub struct Streams {
    pub way: Way,
    probe: Proc,
}

impl Streams {
    pub fn start(way: Way, from: &Pod, to: &str) -> Result<Self> {
        let words = ["crowd", "--to", to, "--connections", "8", "--threads", "1"];
        let probe = from.probe()?.args(words).args(["--pause-ms", "50"]);
        let probe = probe.stdin().spawn()?;
        let open = probe.wait_for_event("open", SOON)?;
        assert_eq!(open["failures"], 0, "{open}");
        Ok(Self { way, probe })
    }

    /// Ends them in good order; returns how many exchanges there were.
    pub fn end(self) -> Result<u64> {
        self.probe.close_stdin();
        let done = self.probe.wait_for_event("done", SOON * 2)?;
        nothing_lost(&done);
        done["count"].as_u64().context("a count")
    }
}
