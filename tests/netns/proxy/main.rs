//! What the agent carries and refuses.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests"
)]

mod access;
mod admin;
mod annotations;
mod as_ztunnel;
mod authority;
mod certificates;
mod clock;
mod cni_rules;
mod configuration;
mod control_plane;
mod credentials;
mod crl;
mod enrolment_under_load;
mod expiry;
mod identities;
mod lenient;
mod limits;
mod mesh_file;
mod misbehaves;
mod on_demand;
mod peer;
mod policy;
mod preferences;
mod redirect_iptables;
mod requests;
mod revocation;
mod roots;
mod routes;
mod secrets;
mod server;
mod streams;
mod surprises;
mod telemetry;
mod waypoints;
mod zds;
