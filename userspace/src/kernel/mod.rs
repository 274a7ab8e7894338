//! The only module that knows the kernel's eBPF interface: programs, pins, maps, namespaces and their sockets.
//!
//! Everything here is blocking and short. Called by `node` (start, policy changes), `enrol` (pods) and `proxy` (sockets
//! inside a pod). Nothing here knows what a policy is.

mod attachments;
mod attempt;
mod btf;
mod cni_rules;
mod configuration;
mod diag;
mod error;
mod events;
mod hooks;
mod host;
mod kernel_part;
mod neighbours;
mod netns;
mod object;
mod offsets;
mod owner;
mod pins;
mod quotas;
mod redirect;
mod routing;
mod services;
mod short_circuit;
mod short_counts;
mod sockets;
pub(crate) mod sys;
mod tables;
mod unload;

pub use attachments::{Attached, Loaded, Place, attached, loaded};
pub use cni_rules::CniRules;
pub use diag::{Asked, DiagThreads, Fate, Outcome, SocketDiag, SocketMeasures, SocketName};
pub use error::KernelError;
pub use events::{EventSocket, EventStream, FlowEnd, FlowEvent, FlowEventKind, ShortState};
pub use host::HostProcesses;
pub use kernel_part::{Attachment, Kernel, KernelSettings};
pub use netns::{Netns, NetnsCookie};
pub use redirect::RedirectMode;
pub use routing::{PodAddress, PodRouting, RoutingSettings};
pub use services::{ServiceTables, SlotTable};
pub use short_circuit::{Candidates, Entrant, Row, ShortCircuit, Unfit, Verdict, Verdicts};
pub use short_counts::{ShortCounters, ShortCounts};
pub use sockets::{PodListeners, PodSockets};
pub use sys::message::{Received, receive as receive_message};
pub(crate) use tables::address;
pub use tables::{FlowName, OpenFlow, Steered, Tables, socket_address};
pub use unload::{Removed, Unload};
