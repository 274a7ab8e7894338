//! The agent's endpoints for people and probes: a Unix socket for root (`culvert pod`, `flows`, `status`), and HTTP for
//! metrics, readiness and the configuration. What they show and do is asked of the node through two traits.
//! Both are open to hostile input: requests are bounded in size, time and number, and none ends the agent.

pub mod client;
pub mod http;
pub mod protocol;
pub mod socket;

pub use client::{Client, ClientError, Stream};
pub use http::{HttpServers, HttpState};
pub use protocol::{
    AdminError, ErrorKind, FlowsQuery, PodAdd, PodInfo, PodRemove, PodState, Reply, Request,
    ShortCircuitStatus, Status,
};
pub use socket::{AdminHandler, AdminSocket};
