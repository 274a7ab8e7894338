//! What the kernel part decides.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests"
)]

mod addresses;
mod agent_gone;
mod claims;
mod enrolment;
mod forgery;
mod heirs;
mod kernel_tables;
mod own_ports;
mod paths;
mod revocation;
mod startup;
mod verdicts;
