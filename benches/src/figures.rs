//! Values by case, way and round; medians, and ratios of one round's neighbours: what disturbs the machine for longer than a
//! round disturbs both.

use std::collections::BTreeMap;

use crate::case::Case;
use crate::way::Way;

/// All that was measured.
#[derive(Debug, Default)]
pub struct Figures(BTreeMap<(Case, Way), Vec<(usize, f64)>>);

impl Figures {
    pub fn add(&mut self, round: usize, way: Way, case: Case, value: f64) {
        self.0.entry((case, way)).or_default().push((round, value));
    }

    fn of(&self, case: Case, way: Way) -> &[(usize, f64)] {
        self.0.get(&(case, way)).map_or(&[], Vec::as_slice)
    }

    /// `None` if it was not measured.
    pub fn median(&self, case: Case, way: Way) -> Option<f64> {
        median(&mut values(self.of(case, way)))
    }

    /// How many times `reference`, in every round that has both.
    pub fn ratios(&self, case: Case, way: Way, reference: Way) -> Ratios {
        let reference = self.of(case, reference);
        let pairs = self.of(case, way).iter().filter_map(|(round, value)| {
            let (_, other) = reference.iter().find(|(at, _)| at == round)?;
            (*other > 0.0).then(|| value / other)
        });
        Ratios(pairs.collect())
    }
}

fn values(figures: &[(usize, f64)]) -> Vec<f64> {
    figures.iter().map(|(_, value)| *value).collect()
}

/// The ratios of the rounds.
#[derive(Debug)]
pub struct Ratios(Vec<f64>);

impl Ratios {
    pub fn median(&self) -> Option<f64> {
        median(&mut self.0.clone())
    }

    /// Half of them lie between these.
    pub fn quartiles(&self) -> Option<[f64; 2]> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        Some([*sorted.get(last / 4)?, *sorted.get(last - last / 4)?])
    }
}

/// The mean of the middle two of an even number.
fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get((values.len() - 1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(plain: &[f64], direct: &[f64]) -> Figures {
        let mut figures = Figures::default();
        for (way, values) in [(Way::Plain, plain), (Way::Direct, direct)] {
            for (round, value) in values.iter().enumerate() {
                figures.add(round, way, Case::Rr1, *value);
            }
        }
        figures
    }

    #[test]
    fn one_noisy_round_does_not_move_the_median() {
        let figures = figures(&[20.0, 900.0, 22.0], &[21.0, 930.0, 22.0]);
        assert_eq!(figures.median(Case::Rr1, Way::Plain), Some(22.0));
        let ratio = figures.ratios(Case::Rr1, Way::Direct, Way::Plain).median();
        assert!((ratio.unwrap() - 930.0 / 900.0).abs() < 1e-9);
    }

    #[test]
    fn rounds_without_a_twin_have_no_ratio() {
        let figures = figures(&[10.0], &[10.0, 50.0, 0.0]);
        let ratios = figures.ratios(Case::Rr1, Way::Direct, Way::Plain);
        assert_eq!(ratios.quartiles(), Some([1.0, 1.0]));
        let ratios = figures.ratios(Case::Rr1, Way::Proxy, Way::Plain);
        assert_eq!((ratios.median(), ratios.quartiles()), (None, None));
    }
}
