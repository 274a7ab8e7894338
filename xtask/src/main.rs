//! `cargo xtask`: every task of this repository.

fn main() -> anyhow::Result<()> {
    Ok(())
}
