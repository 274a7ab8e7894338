//! Figures of one way of connecting, and the median over rounds: a neighbour's noise in one round does not count.

use serde::Serialize;

/// What one round measured, or the median of all. `None`: not measured, because nothing may pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Latency of a request and its answer, half are faster.
    pub p50_us: Option<f64>,
    /// Latency, 99 of 100 are faster.
    pub p99_us: Option<f64>,
    /// Requests per second, one after the other on one connection.
    pub rps: Option<f64>,
    /// Throughput of one stream.
    pub gbit_s: Option<f64>,
}

impl Figures {
    /// How many times those of `reference` these are.
    pub fn ratio(&self, reference: &Self) -> Self {
        Self {
            p50_us: ratio(self.p50_us, reference.p50_us),
            p99_us: ratio(self.p99_us, reference.p99_us),
            rps: ratio(self.rps, reference.rps),
            gbit_s: ratio(self.gbit_s, reference.gbit_s),
        }
    }

    /// Each figure's median.
    pub fn median(rounds: &[Self]) -> Self {
        let of = |figure: fn(&Self) -> Option<f64>| median(rounds.iter().filter_map(figure));
        Self {
            p50_us: of(|round| round.p50_us),
            p99_us: of(|round| round.p99_us),
            rps: of(|round| round.rps),
            gbit_s: of(|round| round.gbit_s),
        }
    }
}

/// `None` without values; the mean of the middle two of an even number.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get((sorted.len() - 1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// How many times `reference` `measured` is.
fn ratio(measured: Option<f64>, reference: Option<f64>) -> Option<f64> {
    let reference = reference.filter(|value| *value > 0.0)?;
    measured.map(|value| value / reference)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(p50: Option<f64>) -> Figures {
        Figures {
            p50_us: p50,
            ..Figures::default()
        }
    }

    #[test]
    fn one_noisy_round_does_not_move_the_median() {
        let rounds = [20.0, 900.0, 22.0].map(|p50| round(Some(p50)));
        assert_eq!(Figures::median(&rounds).p50_us, Some(22.0));
        assert_eq!(median([1.0, 2.0].into_iter()), Some(1.5));
    }

    #[test]
    fn nothing_measured_is_no_figure() {
        assert_eq!(Figures::median(&[round(None)]), Figures::default());
        assert_eq!(Figures::median(&[]), Figures::default());
        assert_eq!(ratio(Some(1.0), Some(0.0)), None);
        assert_eq!(ratio(None, Some(1.0)), None);
    }
}
