//! The rounds: every load once on every way, the ways in another order each time.

use std::time::Instant;

use anyhow::Result;

use crate::case::Load;
use crate::figures::Figures;
use crate::load;
use crate::plan::Plan;
use crate::stage::Stage;
use crate::way::Way;

/// Measures until the plan's time is over; returns how many rounds that were.
pub fn measure(stage: &Stage, plan: &Plan, loads: &[Load], figures: &mut Figures) -> Result<usize> {
    let began = Instant::now();
    let mut round = 0;
    while round < plan.fewest_rounds || began.elapsed() < plan.longest {
        for load in loads.iter().copied() {
            for way in order(ways(load, plan, round), round) {
                let Some(station) = stage.station(way) else {
                    continue;
                };
                let slice = load::run(load, station, plan.slice, plan, round)?;
                for (case, value) in slice.figures {
                    figures.add(round, way, case, value);
                }
            }
        }
        round += 1;
        eprintln!("… round {round}, {:.0} s", began.elapsed().as_secs_f64());
    }
    Ok(round)
}

/// Which ways a load is measured on in this round. The pair whose ratio matters is measured in all of them.
fn ways(load: Load, plan: &Plan, round: usize) -> Vec<Way> {
    let mut ways = vec![Way::Plain, Way::Direct];
    if load.is_non_blocking() {
        ways.push(Way::Short);
    }
    if round.is_multiple_of(plan.aside_every) {
        ways.push(Way::Proxy);
        if matches!(load, Load::Connections) {
            ways.push(Way::Logged);
        }
        if matches!(load, Load::Pages) {
            ways.extend([Way::Ruled, Way::Idle]);
        }
    }
    // Its cost is so small that it needs every round.
    if load.name() == Load::RR_1K.name() || matches!(load, Load::Connections) {
        ways.push(Way::Untold);
    }
    ways
}

/// Nobody is always first, and each is as often before another as after it.
fn order(mut ways: Vec<Way>, round: usize) -> Vec<Way> {
    if round % 2 == 1 {
        ways.reverse();
    }
    let first = round / 2 % ways.len().max(1);
    ways.rotate_left(first);
    ways
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_and_direct_take_turns_in_going_first() {
        let first: Vec<Way> = (0..4)
            .filter_map(|round| order(vec![Way::Plain, Way::Direct], round).first().copied())
            .collect();
        let plain = first.iter().filter(|way| **way == Way::Plain).count();
        assert_eq!(plain, 2, "{first:?}");
    }
}
