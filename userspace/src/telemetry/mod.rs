//! What the agent tells about the connections it serves: flow records, the access log, metrics, and the live feed.
//! Nothing here decides anything; nothing here may slow a connection down: every buffer is bounded and what does not
//! fit is counted. Fed by the proxy and by the kernel's flow events, read by the admin endpoints.

pub mod access_log;
pub mod flows;
mod hub;
mod line;
pub mod log_levels;
pub mod logging;
pub mod metrics;
mod party;
mod record;
mod writer;

pub use access_log::AccessLog;
pub use flows::{Feed, FlowEvent, Follower, Next};
pub use hub::Telemetry;
pub(crate) use hub::milliseconds;
pub use log_levels::{LevelError, LogLevels};
pub use metrics::{
    KernelCounters, MeshFreshness, Metrics, OpenFlow, PairSeries, RevocationCounters,
    ShortCircuited,
};
pub use record::{
    Direction, FlowEnd, FlowPath, FlowRecord, Party, Reporter, ResponseFlags, Security, ServiceName,
};
