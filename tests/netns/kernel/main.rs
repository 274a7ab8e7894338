//! What the kernel part decides.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests"
)]

mod addresses;
mod admission;
mod agent_gone;
mod claims;
mod enrolment;
mod forgery;
mod heirs;
mod kernel_tables;
mod own_ports;
mod paths;
mod refusals;
mod restart;
mod revocation;
mod startup;
mod steering;
mod verdicts;
mod waiting;
