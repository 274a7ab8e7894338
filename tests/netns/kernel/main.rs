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
mod crowd;
mod enrolment;
mod forgery;
mod heirs;
mod ipv6;
mod kernel_tables;
mod life;
mod node_processes;
mod odd_sockets;
mod own_ports;
mod owner;
mod paths;
mod refusals;
mod restart;
mod revocation;
mod services;
mod several_addresses;
mod startup;
mod steering;
mod telemetry;
mod unload;
mod verdicts;
mod waiting;
