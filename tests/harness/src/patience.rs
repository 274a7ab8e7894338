//! How much longer than usual this machine may take. An emulated processor is ten times slower; `cargo xtask vm` says so in
//! `CULVERT_TEST_PATIENCE`, a whole number by which every wait of the harness is multiplied. Read here and nowhere else.
//! Called by `wait`, `process`, `log`, `http`, `announce` and `cgroup`.

use std::sync::OnceLock;
use std::time::Duration;

const VARIABLE: &str = "CULVERT_TEST_PATIENCE";
const MOST: u32 = 100;

/// The timeout as it is on this machine.
pub fn stretch(timeout: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| {
        let setting = std::env::var(VARIABLE).unwrap_or_default();
        factor(&setting).unwrap_or_else(|| {
            eprintln!("culvert-harness: {VARIABLE}={setting}: not a number from 1 to {MOST}; going on with 1");
            1
        })
    });
    timeout.saturating_mul(*factor)
}

fn factor(setting: &str) -> Option<u32> {
    if setting.is_empty() {
        return Some(1);
    }
    setting
        .parse()
        .ok()
        .filter(|factor| (1..=MOST).contains(factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_a_small_whole_number_or_absent() {
        assert_eq!([factor(""), factor("4")], [Some(1), Some(4)]);
        for setting in ["0", "-1", "1.5", "101", "x"] {
            assert_eq!(factor(setting), None, "{setting}");
        }
    }
}
