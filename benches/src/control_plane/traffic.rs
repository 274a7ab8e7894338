//! Requests between two pods of the node while its mesh changes: all of them through the agent, whose threads also take the pushes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_harness::{Agent, End, Node, Pod, Proc, Workload, pinned_probe};
use serde_json::Value;

use super::mesh::TRAFFIC;

const PORT: u16 = 7001;
const START: Duration = Duration::from_secs(10);
/// Far longer than any measurement.
const STEP: Duration = Duration::from_secs(60);

/// A client, and a server that answers it.
pub struct Traffic {
    client: Pod,
    server: Pod,
    _echo: Proc,
}

/// How requests went, in microseconds.
pub struct Pace {
    pub p50: f64,
    pub p99: f64,
}

impl Traffic {
    pub fn new(node: &Node) -> Result<Self> {
        let (client, server) = (node.pod("client")?, node.pod("server")?);
        let echo = pinned_probe(&server, End::Server)?
            .args(["serve", "--quiet", "--mode", "echo"])
            .args(["--port", &PORT.to_string()])
            .spawn()?;
        echo.wait_for_event("listening", START)?;
        Ok(Self {
            client,
            server,
            _echo: echo,
        })
    }

    pub fn pods(&self) -> [&Pod; 2] {
        [&self.client, &self.server]
    }

    pub fn enrol(&self, agent: &Agent) -> Result<()> {
        for pod in self.pods() {
            agent.enrol_as(pod, &Workload::of_pod(pod, TRAFFIC, pod.name()))?;
        }
        Ok(())
    }

    /// Requests, one after the other on one connection, for so long, while something else is done. A request that fails is an error.
    pub fn beside<T>(
        &self,
        length: Duration,
        other: impl FnOnce() -> Result<T>,
    ) -> Result<(Pace, T)> {
        let launch = pinned_probe(&self.client, End::Server)?
            .args(["rr", "--to", &self.server.at(PORT), "--size", "1024"])
            .args(["--warmup", "100", "--millis"])
            .arg(length.as_millis().to_string());
        std::thread::scope(|scope| {
            let requests = scope.spawn(|| launch.run(STEP)?.json());
            let done = other();
            let report = requests.join().ok().context("the requests' thread")??;
            Ok((pace(&report)?, done?))
        })
    }
}

fn pace(report: &Value) -> Result<Pace> {
    let number = |field: &str| {
        let number = report.get(field).and_then(Value::as_f64);
        number.with_context(|| format!("no {field} in {report}"))
    };
    ensure!(number("errors")? == 0.0, "requests failed: {report}");
    Ok(Pace {
        p50: number("p50_us")?,
        p99: number("p99_us")?,
    })
}
