//! HBONE: one HTTP/2 CONNECT stream per application connection, over mutual TLS.
//!
//! Invariants: a stream that was cut never reads as ended; every queue is bounded by flow control or by a setting. `Pool` serves outbound
//! connections, `serve` the listener on 15008.

mod error;
#[cfg(test)]
pub(crate) mod fixture;
mod inbox;
mod opening;
mod pool;
mod request;
mod server;
mod settings;
mod stream;
#[cfg(test)]
mod tests;
mod tunnel;

pub use error::HboneError;
pub use pool::{Pool, PoolKey};
pub use request::{ConnectRequest, Incoming, IncomingConnect, Refusal};
pub use server::{ServeEnd, Stop, serve};
pub use settings::{HANDSHAKE_DEADLINE, Limits, PoolSettings, ServerSettings};
pub use stream::HboneStream;
