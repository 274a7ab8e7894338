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
mod borrowed_addresses;
mod broken_mesh;
mod changes;
mod churn;
mod claims;
mod crowd;
mod disruption;
mod enrolment;
mod foreign_sources;
mod forgery;
mod forgery_ipv6;
mod full_tables;
mod greed;
mod half_written;
mod handshakes;
mod heirs;
mod ipv6;
mod isolation_room;
mod kernel_tables;
mod life;
mod many_flows;
mod marks;
mod node_processes;
mod odd_sockets;
mod own_ports;
mod owner;
mod paths;
mod quotas;
mod refusals;
mod restart;
mod revocation;
mod sequences;
mod services;
mod several_addresses;
mod short_circuit;
mod short_flags;
mod short_memory;
mod short_modes;
mod short_readers;
mod short_telemetry;
mod stalled;
mod startup;
mod steering;
mod telemetry;
mod unload;
mod verdicts;
mod waiting;
