//! Virtual nodes and pods on one kernel, for the tests, the demo and the benchmarks.
//!
//! A [`Fabric`] is a network namespace with a bridge. A [`Node`] is a namespace with a bridge of its own, joined to the
//! fabric's, and a cgroup subtree. A [`Pod`] is a namespace with `eth0` on its node's bridge and a child cgroup.
//! Everything a fabric made is gone when it is dropped, or when its process is (see [`cleanup`]).
//!
//! Needs root, Linux 5.14 or later, cgroup v2, and `ip` from iproute2.

pub mod agent;
mod announce;
pub mod capture;
pub mod cgroup;
pub mod cleanup;
pub mod clock;
pub mod cni_rules;
pub mod control_plane;
pub mod fabric;
pub mod foreign;
pub mod hog;
mod http;
mod ip;
mod lacks;
pub mod log;
pub mod mesh;
pub mod neighbour;
pub mod netns;
pub mod node;
pub mod packet;
mod patience;
pub mod pod;
pub mod process;
pub mod processors;
pub mod receiving;
pub mod ring;
pub mod run;
pub mod sockets;
pub mod stalled;
mod sys;
pub mod wait;
pub mod ways;
mod yaml;
pub mod zds;

pub use agent::{AccessLine, Agent, AgentOptions, Subcommand};
pub use capture::Capture;
pub use cleanup::clean_stale;
pub use clock::Clock;
pub use control_plane::ControlPlane;
pub use fabric::{Fabric, FabricOptions};
pub use foreign::{Foreign, Hook};
pub use lacks::{MARK as LACKS_MARK, lacks};
pub use mesh::{Match, Mesh, Namespace, Policy, Service, Workload};
pub use netns::Netns;
pub use node::Node;
pub use patience::stretch;
pub use pod::{Pod, PodOptions};
pub use process::{Finished, Launch, Proc, culvert_binary, probe_binary};
pub use processors::{End, pinned, pinned_probe};
pub use sockets::{SocketEntry, TcpState, socket_table, sockets_of_process};
pub use wait::wait_until;
pub use zds::{ZdsAgent, ZdsPod, ZdsServer};
