//! The only module that knows the kernel's eBPF interface: programs, pins, maps, namespaces and their sockets.
//!
//! Everything here is blocking and short. Called by `node` (start, policy changes), `enrol` (pods) and `proxy` (sockets
//! inside a pod). Nothing here knows what a policy is.

mod btf;
mod destroy;
mod error;
mod events;
mod netns;
mod object;
mod pins;
mod routing;
mod sockets;
pub(crate) mod sys;
mod tables;

pub use destroy::SocketDestroyer;
pub use error::KernelError;
pub use events::{EventStream, FlowEvent, FlowEventKind, IsolatedSocket};
pub use netns::{Netns, NetnsCookie};
pub use object::{Attachment, Kernel, KernelSettings, unload};
pub use routing::{PodAddress, PodRouting};
pub use sockets::{PodListeners, PodSockets};
pub(crate) use tables::address;
pub use tables::{OpenFlow, Tables, socket_address};
