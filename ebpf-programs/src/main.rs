//! The kernel part. One file per hook; `docs/ARCHITECTURE.md` follows a connection through them.
//!
//! Entry points are a few lines over a `decide` function that returns what to do or the counted reason why not.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(
    internal_features,
    reason = "quotas.rs counts with an atomic intrinsic"
)]

mod address;
mod claims;
mod connect;
mod events;
mod flows;
mod inbound;
mod isolation;
mod kernel;
mod maps;
mod node;
mod peer_name;
mod quotas;
mod readers;
mod services;
mod short_circuit;
mod sockops;
mod verdicts;

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

// The verifier lets only GPL-compatible programs call the helpers used here.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
