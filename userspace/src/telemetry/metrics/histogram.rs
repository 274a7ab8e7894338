//! Durations by size. Observing is one atomic addition for the bucket and one for the sum.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds, in seconds and in microseconds: from a connection inside one node to one that is lost and sent again.
pub const BOUNDS: [(f64, u64); 14] = [
    (0.000_01, 10),
    (0.000_025, 25),
    (0.000_05, 50),
    (0.000_1, 100),
    (0.000_25, 250),
    (0.000_5, 500),
    (0.001, 1_000),
    (0.002_5, 2_500),
    (0.005, 5_000),
    (0.01, 10_000),
    (0.05, 50_000),
    (0.25, 250_000),
    (1.0, 1_000_000),
    (5.0, 5_000_000),
];

/// How many durations fell between two bounds, and beyond the last.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

/// Its state at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// Upper bound in seconds with the number of what is below it but not below the one before.
    pub buckets: Vec<(f64, u64)>,
    pub count: u64,
    /// Seconds.
    pub sum: f64,
}

impl Histogram {
    pub fn observe(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|(_, bound)| *bound < micros);
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
            self.micros.fetch_add(micros, Ordering::Relaxed);
        }
    }

    pub fn read(&self) -> Reading {
        let bounds = BOUNDS.iter().map(|(seconds, _)| *seconds);
        let buckets: Vec<_> = bounds
            .chain([f64::INFINITY])
            .zip(&self.counts)
            .map(|(bound, count)| (bound, count.load(Ordering::Relaxed)))
            .collect();
        Reading {
            count: buckets.iter().map(|(_, count)| count).sum(),
            buckets,
            sum: self.micros.load(Ordering::Relaxed) as f64 / 1e6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_falls_into_the_bucket_whose_bound_it_does_not_exceed() {
        let histogram = Histogram::default();
        for micros in [0, 10, 11, 5_000_000, 5_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let reading = histogram.read();
        let filled: Vec<_> = reading
            .buckets
            .iter()
            .filter(|(_, count)| *count > 0)
            .copied()
            .collect();
        assert_eq!(
            filled,
            [(0.000_01, 2), (0.000_025, 1), (5.0, 1), (f64::INFINITY, 1)]
        );
        assert_eq!((reading.count, reading.sum), (5, 10.000_022));
    }
}
