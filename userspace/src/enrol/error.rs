//! Why a pod could not be enrolled.

use std::net::IpAddr;

use super::PodUid;
use crate::{
    kernel::KernelError,
    policy::{Identity, IdentityError},
};

/// What was wrong with a request to add or remove a pod.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("pod {0} is not enrolled")]
    Unknown(PodUid),
    #[error("pod {uid} is enrolled already, in another network namespace; remove it first")]
    OtherNetns { uid: PodUid },
    #[error("the network namespace of pod {uid} is enrolled already, as pod {other}")]
    NetnsTaken { uid: PodUid, other: PodUid },
    #[error(
        "the network namespace of pod {0} is the agent's own or the node's: a host-network pod cannot be enrolled"
    )]
    HostNetwork(PodUid),
    #[error("pod {uid}: address {ip} belongs to pod {other} already")]
    AddressTaken {
        uid: PodUid,
        ip: IpAddr,
        other: PodUid,
    },
    #[error(
        "pod {uid}: no address on any interface but loopback of {netns} that others can reach (link-local ones do not count); give the pod its address first"
    )]
    NoAddress { uid: PodUid, netns: String },
    #[error(
        "pod {uid}: {netns} has the addresses {found}, none of them the pod's ({expected}) by the mesh or by its earlier enrolment"
    )]
    OtherAddress {
        uid: PodUid,
        netns: String,
        found: String,
        expected: String,
    },
    #[error(
        "pod {uid}: the mesh gives each of its addresses ({found}) to another workload; name the pod in the mesh, or take the address away from the other"
    )]
    ForeignAddress { uid: PodUid, found: String },
    #[error(
        "pod {uid}: the control plane, which is asked for what is needed (XDS_ON_DEMAND), has not said what it knows of the address {ip}; see `culvert status`"
    )]
    Unanswered { uid: PodUid, ip: IpAddr },
    #[error(
        "pod {0}: its identity is not known: give --namespace and --service-account, or name it in the mesh"
    )]
    NoIdentity(PodUid),
    #[error("pod {uid}: {source}")]
    Identity { uid: PodUid, source: IdentityError },
    #[error("pod {uid}: the request says {asked}, the mesh says {known}")]
    IdentityConflict {
        uid: PodUid,
        asked: Identity,
        known: Identity,
    },
    #[error("the request came without a network namespace")]
    NoNetns,
    #[error("the agent is stopping; no pod is enrolled any more")]
    Stopping,
    #[error("a pod's uid is 1 to 253 characters without control characters or spaces")]
    BadUid,
    #[error("{0} pods are enrolled, more than this version's maps hold")]
    TooMany(usize),
    #[error(transparent)]
    Kernel(#[from] KernelError),
}
