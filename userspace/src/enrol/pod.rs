//! A pod of this node, as asked for and as enrolled.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
};

use serde::{Deserialize, Serialize};

use super::{EnrolError, NetnsPlace};
use crate::{
    kernel::{NetnsCookie, PodSockets, SocketDiag},
    mesh::{Mesh, Workload},
    policy::Identity,
};

/// The name of a pod in the control plane, such as `cluster//Pod/namespace/name` or a Kubernetes uid.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(Arc<str>);

impl PodUid {
    pub fn new(text: &str) -> Result<Self, EnrolError> {
        let fine =
            (1..=253).contains(&text.len()) && text.chars().all(|c| !c.is_control() && c != ' ');
        if fine {
            Ok(Self(text.into()))
        } else {
            Err(EnrolError::BadUid)
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for PodUid {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Who asked for a pod to be enrolled, and may have it released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    Operator,
    /// istio-cni, which names all of its pods anew whenever the agent connects to it.
    Cni,
}

/// What a request to enrol says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSpec {
    pub uid: PodUid,
    pub netns: NetnsPlace,
    pub origin: Origin,
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub service_account: Option<String>,
}

impl PodSpec {
    /// The pod's workload: by uid, else by namespace and name.
    pub fn workload<'a>(&self, mesh: &'a Mesh) -> Option<&'a Arc<Workload>> {
        mesh.workload_by_uid(self.uid.as_str())
            .or_else(|| mesh.workload_by_name(self.namespace.as_deref()?, self.name.as_deref()?))
    }

    /// Who the pod is. What the request says and what the mesh says must agree.
    pub fn identity(&self, mesh: &Mesh, trust_domain: &str) -> Result<Identity, EnrolError> {
        let known = self
            .workload(mesh)
            .map(|workload| workload.identity().clone());
        let asked = match (&self.namespace, &self.service_account) {
            (Some(namespace), Some(account)) => {
                let domain = known.as_ref().map_or(trust_domain, Identity::trust_domain);
                let identity = Identity::new(domain, namespace, account).map_err(|source| {
                    EnrolError::Identity {
                        uid: self.uid.clone(),
                        source,
                    }
                })?;
                Some(identity)
            }
            _ => None,
        };
        match (asked, known) {
            (Some(asked), Some(known)) if asked != known => Err(EnrolError::IdentityConflict {
                uid: self.uid.clone(),
                asked,
                known,
            }),
            (Some(identity), _) | (None, Some(identity)) => Ok(identity),
            (None, None) => Err(EnrolError::NoIdentity(self.uid.clone())),
        }
    }
}

/// An enrolled pod.
pub struct LocalPod {
    pub spec: PodSpec,
    /// All addresses it may have, of both families, the primary one first.
    configured: Vec<IpAddr>,
    /// Those of them that the mesh gives to somebody else, so that they are not the pod's.
    foreign: RwLock<Vec<IpAddr>>,
    /// Indexes of the devices for which the pod has routes, the one with the primary address first.
    pub devices: Vec<u32>,
    pub identity: Identity,
    pub sockets: PodSockets,
    pub diag: SocketDiag,
}

impl LocalPod {
    pub(super) fn new(
        spec: PodSpec,
        configured: Vec<IpAddr>,
        devices: Vec<u32>,
        identity: Identity,
        sockets: PodSockets,
        diag: SocketDiag,
    ) -> Self {
        Self {
            spec,
            configured,
            foreign: RwLock::default(),
            devices,
            identity,
            sockets,
            diag,
        }
    }

    pub fn uid(&self) -> &PodUid {
        &self.spec.uid
    }

    /// The addresses that are the pod's, the primary one first. None, when the mesh gives all of them to others.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let own = self.configured.iter().copied();
        own.filter(|ip| !self.is_foreign(*ip)).collect()
    }

    /// Also those that the mesh gives to somebody else, for now.
    pub fn configured_addresses(&self) -> &[IpAddr] {
        &self.configured
    }

    /// Whether an address is one of the pod's.
    pub fn has_address(&self, ip: IpAddr) -> bool {
        self.configured.contains(&ip.to_canonical()) && !self.is_foreign(ip)
    }

    /// Whether the pod has an address that the mesh gives to somebody else.
    pub fn is_foreign(&self, ip: IpAddr) -> bool {
        self.foreign
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&ip.to_canonical())
    }

    /// Says which of the addresses are not the pod's; `true` if they were others before.
    pub fn set_foreign(&self, ips: Vec<IpAddr>) -> bool {
        let mut foreign = self.foreign.write().unwrap_or_else(PoisonError::into_inner);
        let changed = *foreign != ips;
        *foreign = ips;
        changed
    }

    pub fn cookie(&self) -> NetnsCookie {
        self.sockets.netns().cookie()
    }

    pub fn workload<'a>(&self, mesh: &'a Mesh) -> Option<&'a Arc<Workload>> {
        self.spec.workload(mesh)
    }
}
