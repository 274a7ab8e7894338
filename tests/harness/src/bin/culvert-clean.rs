//! Removes what dead test runs left behind: `cargo xtask test`, `demo` and `clean` start it. Runs that live stay.

fn main() -> anyhow::Result<()> {
    for run in culvert_harness::clean_stale()? {
        eprintln!("==> removed what test run {run} left behind: its process is gone");
    }
    Ok(())
}
