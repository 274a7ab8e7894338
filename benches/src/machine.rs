//! The machine a result is of.

use serde::Serialize;
use time::OffsetDateTime;

#[derive(Debug, Serialize)]
pub struct Machine {
    pub kernel: String,
    pub processor: String,
    pub processors: usize,
    /// Of the last 1, 5 and 15 minutes. The measurement alone has about as many as processors; more was somebody else.
    pub load_average: String,
    /// Year-month-day, UTC.
    pub date: String,
}

impl Machine {
    /// What cannot be read is `unknown`: it changes no figure.
    pub fn describe() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let known = |text: &str| match text.trim() {
            "" => "unknown".to_owned(),
            text => text.to_owned(),
        };
        let load = read("/proc/loadavg");
        let information = read("/proc/cpuinfo");
        let model = information.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "model name").then_some(value)
        });
        Self {
            kernel: known(&read("/proc/sys/kernel/osrelease")),
            processor: known(model.unwrap_or_default()),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            load_average: known(&load.split(' ').take(3).collect::<Vec<_>>().join(" ")),
            date: OffsetDateTime::now_utc().date().to_string(),
        }
    }
}
