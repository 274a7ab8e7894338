//! What this kernel cannot do, said aloud. A test that needs a feature which older kernels lack first finds out by behaviour
//! whether it is there, never by a version number; where it is not, the test says so here and asserts what happens instead.
//! `cargo xtask vm` lists these lines after the results.

use std::io::Write;

/// What such a line begins with; `cargo xtask vm` looks for it.
pub const MARK: &str = "not on this kernel: ";

/// Says that this kernel lacks `what`, and how that showed. Written past the test runner, which keeps back what a test that
/// passes has printed.
pub fn lacks(what: &str, shown_by: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "{MARK}{what} ({test}: {shown_by})");
}
