//! The result: the rows, and beside them what explains them. As a table for people, as JSON for programs.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use crate::case::{Case, Load};
use crate::figures::Figures;
use crate::hooks::{self, Hooks};
use crate::machine::Machine;
use crate::plan::Plan;
use crate::rounds;
use crate::stage::Stage;
use crate::way::Way;

/// One figure of every way. Ratios are the medians of the rounds' ratios to plain.
#[derive(Debug, Serialize)]
pub struct Row {
    #[serde(serialize_with = "case_name")]
    pub case: Case,
    pub metric: &'static str,
    pub plain: Option<f64>,
    pub direct: Option<f64>,
    /// Of the loads whose programs can be short-circuited.
    pub short_circuit: Option<f64>,
    pub proxy: Option<f64>,
    pub ratio_direct: Option<f64>,
    pub ratio_short_circuit: Option<f64>,
    /// Half of the rounds' ratios of direct to plain lie between these.
    pub spread: Option<[f64; 2]>,
}

/// A way against the same with something switched off.
#[derive(Debug, Serialize)]
pub struct Switch {
    pub metric: &'static str,
    pub on: Option<f64>,
    pub off: Option<f64>,
    pub ratio: Option<f64>,
    pub spread: Option<[f64; 2]>,
}

/// Beside the rows.
#[derive(Debug, Serialize)]
pub struct Extra {
    pub machine: Machine,
    pub rounds: usize,
    /// Flow telemetry; null for an agent that cannot do without.
    pub telemetry_rr_1k: Option<Switch>,
    pub telemetry_conn_close: Option<Switch>,
    pub access_log_conn_close: Switch,
    /// What the kernel takes before anything is decided.
    pub routing_rule_conn_close: Switch,
    pub idle_hooks_conn_close: Switch,
    /// Rows like those above, as a check on them.
    pub beside: Vec<Row>,
    pub hooks: Hooks,
    pub paths: Vec<Path>,
}

/// How many measured connections went which way, by the agent's own counters.
#[derive(Debug, Serialize)]
pub struct Path {
    pub way: &'static str,
    pub direct: f64,
    pub steered: f64,
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub rows: Vec<Row>,
    pub extra: Extra,
}

// serde asks for a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn case_name<S: serde::Serializer>(case: &Case, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(case.name())
}

/// Sets everything up, measures, and takes it down.
pub fn measure(plan: &Plan, loads: &[Load]) -> Result<Report> {
    eprintln!("… setting up {} nodes", Way::ALL.len());
    let stage = Stage::new(plan)?;
    let mut figures = Figures::default();
    let rounds = rounds::measure(&stage, plan, loads, &mut figures)?;
    eprintln!("… run-time statistics of the kernel part");
    let hooks = hooks::measure(&stage, plan)?;
    let mut paths = Vec::new();
    for station in stage.stations() {
        if station.way.is_decided() {
            let seen = station.proof()?;
            paths.push(Path {
                way: station.way.name(),
                direct: seen.direct,
                steered: seen.steered,
            });
        }
    }
    let row = |case| Row::of(&figures, case);
    let switch = |case, on, off| Switch::of(&figures, case, on, off);
    let telemetry = |case| {
        let known = stage.station(Way::Untold).is_some();
        known.then(|| switch(case, Way::Direct, Way::Untold))
    };
    Ok(Report {
        rows: Case::ROWS.into_iter().map(row).collect(),
        extra: Extra {
            machine: Machine::describe(),
            rounds,
            telemetry_rr_1k: telemetry(Case::Rr1kPerSecond),
            telemetry_conn_close: telemetry(Case::ConnBare),
            access_log_conn_close: switch(Case::ConnBare, Way::Logged, Way::Direct),
            routing_rule_conn_close: switch(Case::ConnClose, Way::Ruled, Way::Plain),
            idle_hooks_conn_close: switch(Case::ConnClose, Way::Idle, Way::Plain),
            beside: Case::BESIDE.into_iter().map(row).collect(),
            hooks,
            paths,
        },
    })
}

impl Row {
    fn of(figures: &Figures, case: Case) -> Self {
        let ratios = figures.ratios(case, Way::Direct, Way::Plain);
        Self {
            case,
            metric: case.metric(),
            plain: figures.median(case, Way::Plain),
            direct: figures.median(case, Way::Direct),
            short_circuit: figures.median(case, Way::Short),
            proxy: figures.median(case, Way::Proxy),
            ratio_direct: ratios.median(),
            ratio_short_circuit: figures.ratios(case, Way::Short, Way::Plain).median(),
            spread: ratios.quartiles(),
        }
    }

    /// What the direct way should reach, and whether it does.
    pub fn direct_goal(&self) -> Goal {
        Goal::of(self.case, self.case.goal(), self.ratio_direct)
    }

    /// The same of the short-circuited way.
    pub fn short_goal(&self) -> Goal {
        Goal::of(self.case, self.case.short_goal(), self.ratio_short_circuit)
    }
}

/// A ratio to reach.
pub struct Goal {
    /// With its direction.
    pub text: String,
    /// `None` where there is no goal or no figure.
    pub reached: Option<bool>,
}

impl Goal {
    fn of(case: Case, goal: Option<f64>, ratio: Option<f64>) -> Self {
        let sign = if case.is_rate() { '≥' } else { '≤' };
        let reached = goal.zip(ratio).map(|(goal, ratio)| {
            if case.is_rate() {
                ratio >= goal
            } else {
                ratio <= goal
            }
        });
        Self {
            text: goal.map_or_else(|| "-".to_owned(), |goal| format!("{sign} {goal}")),
            reached,
        }
    }

    /// As a mark in a table.
    fn mark(&self) -> char {
        match self.reached {
            Some(true) => '✓',
            Some(false) => '✗',
            None => ' ',
        }
    }
}

impl Switch {
    fn of(figures: &Figures, case: Case, on: Way, off: Way) -> Self {
        let ratios = figures.ratios(case, on, off);
        Self {
            metric: case.metric(),
            on: figures.median(case, on),
            off: figures.median(case, off),
            ratio: ratios.median(),
            spread: ratios.quartiles(),
        }
    }
}

/// A number as long as it is worth reading.
pub fn number(value: Option<f64>) -> String {
    value.map_or_else(
        || "-".to_owned(),
        |value| match value {
            value if value >= 1000.0 => format!("{value:.0}"),
            value if value >= 100.0 => format!("{value:.1}"),
            value => format!("{value:.3}"),
        },
    )
}

/// `0.95 to 1.01`
pub fn spread(spread: Option<[f64; 2]>) -> String {
    spread.map_or_else(
        || "-".to_owned(),
        |[low, high]| format!("{low:.3} to {high:.3}"),
    )
}

impl Report {
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<22}{:<8}{:>11}{:>11}{:>11}{:>9}  {:<18}{:<9}{:>9}  {}\n",
            "case",
            "metric",
            "plain",
            "direct",
            "proxy",
            "direct",
            "half of ratios",
            "goal",
            "short",
            "goal"
        );
        // Writing to a String does not fail.
        for row in self.rows.iter().chain(&self.extra.beside) {
            let (direct, short) = (row.direct_goal(), row.short_goal());
            let _ = writeln!(
                out,
                "{:<22}{:<8}{:>11}{:>11}{:>11}{:>9}  {:<18}{:<7}{} {:>9}  {:<7}{}",
                row.case.name(),
                row.metric,
                number(row.plain),
                number(row.direct),
                number(row.proxy),
                number(row.ratio_direct),
                spread(row.spread),
                direct.text,
                direct.mark(),
                number(row.ratio_short_circuit),
                short.text,
                short.mark(),
            );
        }
        for (name, switch) in self.switches() {
            let _ = writeln!(
                out,
                "{name}: {} against {} {} without it, ratio {} ({})",
                number(switch.on),
                number(switch.off),
                switch.metric,
                number(switch.ratio),
                spread(switch.spread),
            );
        }
        for hook in &self.extra.hooks.programs {
            let _ = writeln!(
                out,
                "{} during {}: {:.2} calls per {}, {:.0} ns each",
                hook.program, hook.load, hook.calls_per_operation, hook.operation, hook.ns_per_call
            );
        }
        for cost in &self.extra.hooks.connect {
            let _ = writeln!(
                out,
                "connect4 in a mesh of {} workloads and {} policies: {} ns; {} connections/s while counted",
                cost.workloads,
                cost.policies,
                number(cost.ns_per_connect),
                number(cost.connections_per_s)
            );
        }
        for path in &self.extra.paths {
            let _ = writeln!(
                out,
                "way `{}`: {} connections direct, {} through the agent",
                path.way, path.direct, path.steered
            );
        }
        let _ = write!(out, "{} rounds", self.extra.rounds);
        out
    }

    /// What was measured with something on and off, by a name for people.
    pub fn switches(&self) -> Vec<(&'static str, &Switch)> {
        let extra = &self.extra;
        let telemetry = [
            ("flow telemetry, requests of 1 KiB", &extra.telemetry_rr_1k),
            ("flow telemetry, connections", &extra.telemetry_conn_close),
        ];
        let mut switches: Vec<_> = telemetry
            .into_iter()
            .filter_map(|(name, switch)| Some((name, switch.as_ref()?)))
            .collect();
        switches.extend([
            ("access log, connections", &extra.access_log_conn_close),
            (
                "pods without the mesh: the routing rule alone, HTTP connections",
                &extra.routing_rule_conn_close,
            ),
            (
                "pods without the mesh: rule and hooks that decide nothing, HTTP connections",
                &extra.idle_hooks_conn_close,
            ),
        ]);
        switches
    }
}
