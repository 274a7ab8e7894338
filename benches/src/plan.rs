//! How long everything takes. Every slice has a length or an amount, and no round begins after the deadline.

use std::time::Duration;

/// The lengths of one run.
#[derive(Debug)]
pub struct Plan {
    /// The flag that asks for it, for the page.
    pub flag: &'static str,
    /// Rounds at least, if nothing fails.
    pub fewest_rounds: usize,
    /// No new round after this and the fewest.
    pub longest: Duration,
    /// Requests, connections and streams of the probe.
    pub slice: Duration,
    /// `redis-benchmark` takes a number of requests.
    pub redis_requests: u32,
    /// Every so many rounds, the ways that are only looked at: the agent's own path, telemetry off, the access log.
    pub aside_every: usize,
    /// Slices of the run-time statistics.
    pub hook_slice: Duration,
    /// The mesh whose size must not matter: workloads and policies.
    pub big_mesh: (usize, usize),
}

impl Plan {
    pub const FULL: Self = Self {
        flag: "",
        fewest_rounds: 12,
        longest: Duration::from_secs(510),
        slice: Duration::from_millis(250),
        redis_requests: 30_000,
        aside_every: 2,
        hook_slice: Duration::from_millis(1000),
        big_mesh: (10_000, 1_000),
    };
    pub const QUICK: Self = Self {
        flag: " --quick",
        fewest_rounds: 4,
        longest: Duration::from_secs(65),
        slice: Duration::from_millis(120),
        redis_requests: 15_000,
        aside_every: 2,
        hook_slice: Duration::from_millis(400),
        big_mesh: (10_000, 1_000),
    };
    pub const SMOKE: Self = Self {
        flag: " --smoke",
        fewest_rounds: 1,
        longest: Duration::ZERO,
        slice: Duration::from_millis(20),
        redis_requests: 500,
        aside_every: 1,
        hook_slice: Duration::from_millis(20),
        big_mesh: (100, 10),
    };
}
