//! Setting a pod up and taking it down: namespace, routing, listeners, hook.

use std::{net::IpAddr, path::Path, sync::Arc};

use nix::net::if_::InterfaceFlags;

use super::{EnrolError, KnownPod, LocalPod, PodSpec};
use crate::{
    kernel::{
        Attachment, Kernel, Netns, PodAddress, PodListeners, PodRouting, PodSockets,
        SocketDestroyer,
    },
    mesh::Mesh,
    policy::Identity,
};

/// What was set up for a pod, to be undone when it leaves.
pub struct Enrolment {
    pub pod: Arc<LocalPod>,
    routing: PodRouting,
    attachment: Attachment,
}

impl Enrolment {
    /// Opens the pod's namespace.
    pub fn open(spec: &PodSpec) -> Result<Arc<Netns>, EnrolError> {
        let netns = Netns::open(&spec.netns)?;
        let own = Netns::open(Path::new("/proc/self/ns/net"))?;
        if own.cookie() == netns.cookie() {
            return Err(EnrolError::HostNetwork(spec.uid.clone()));
        }
        Ok(Arc::new(netns))
    }

    /// Finds the pod's address: the one it was enrolled with before, else the one the mesh names, else the first there is.
    pub fn address(
        spec: &PodSpec,
        netns: &Netns,
        mesh: &Mesh,
        before: Option<&KnownPod>,
    ) -> Result<PodAddress, EnrolError> {
        let found = netns.run(addresses).unwrap_or_default();
        let named = || {
            spec.workload(mesh)
                .map(|workload| workload.addresses.as_slice())
                .unwrap_or_default()
        };
        let known = before.map_or_else(named, |before| std::slice::from_ref(&before.ip));
        let address = match found.as_slice() {
            [] => {
                let netns = spec.netns.display().to_string();
                return Err(EnrolError::NoAddress {
                    uid: spec.uid.clone(),
                    netns,
                });
            }
            [first, ..] if known.is_empty() => Some(first),
            all => all
                .iter()
                .find(|address| known.contains(&IpAddr::V4(address.ip))),
        };
        match address {
            Some(address) => Ok(*address),
            None => Err(EnrolError::OtherAddress {
                uid: spec.uid.clone(),
                netns: spec.netns.display().to_string(),
                found: list(found.iter().map(|address| address.ip)),
                expected: list(known),
            }),
        }
    }

    /// Sets everything up but the kernel part's tables: until the pod is entered there, its traffic is left alone.
    ///
    /// The hook comes last: it sends connections to listeners that exist.
    pub fn begin(
        kernel: &Kernel,
        spec: PodSpec,
        netns: Arc<Netns>,
        address: PodAddress,
        identity: Identity,
        packet_mark: u32,
        before: Option<&KnownPod>,
    ) -> Result<(Self, PodListeners), EnrolError> {
        let sockets = PodSockets::new(Arc::clone(&netns), Arc::clone(kernel.tables()), packet_mark);
        let destroyer = SocketDestroyer::new(&netns)?;
        let replaced = before.map(|before| before.replaced.as_slice());
        let routing = PodRouting::install(&netns, address, packet_mark, replaced)?;
        let attached = sockets
            .listen()
            .and_then(|listeners| Ok((listeners, kernel.attach_pod(&netns)?)));
        match attached {
            Ok((listeners, attachment)) => {
                let PodAddress { ip, device } = address;
                let pod = LocalPod {
                    spec,
                    ip: IpAddr::V4(ip),
                    device,
                    identity,
                    sockets,
                    destroyer,
                };
                Ok((
                    Self {
                        pod: Arc::new(pod),
                        routing,
                        attachment,
                    },
                    listeners,
                ))
            }
            Err(error) => {
                sockets.unlisten();
                if let Err(undone) = routing.uninstall(&netns) {
                    tracing::warn!(error = %undone, "a pod that could not be enrolled keeps parts of its routing");
                }
                Err(error.into())
            }
        }
    }

    /// What a later agent needs to serve this pod again.
    pub fn known(&self) -> KnownPod {
        KnownPod {
            spec: self.pod.spec.clone(),
            cookie: self.pod.cookie(),
            ip: self.pod.ip,
            replaced: self.routing.previous().to_vec(),
        }
    }

    /// Takes down what an earlier agent set up for a pod that this one does not serve.
    pub fn forget(kernel: &Kernel, known: KnownPod, packet_mark: u32) -> Result<(), EnrolError> {
        kernel.forget_pod(known.cookie)?;
        let netns = Netns::open(&known.spec.netns)?;
        if netns.cookie() == known.cookie {
            PodRouting::remembered(packet_mark, known.replaced).uninstall(&netns)?;
        }
        Ok(())
    }

    /// Takes the pod down, as far as its namespace still exists.
    pub fn end(self) -> Result<(), EnrolError> {
        let detached = self.attachment.detach();
        self.pod.sockets.unlisten();
        let uninstalled = self.routing.uninstall(self.pod.sockets.netns());
        detached?;
        uninstalled?;
        Ok(())
    }
}

/// The IPv4 addresses of the namespace this thread is in that others can reach: not those of the loopback device.
fn addresses() -> Vec<PodAddress> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    interfaces
        .filter(|interface| !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK))
        .filter_map(|interface| {
            let ip = interface.address?.as_sockaddr_in()?.ip();
            let device = nix::net::if_::if_nametoindex(interface.interface_name.as_str()).ok()?;
            Some(PodAddress { ip, device })
        })
        .filter(|PodAddress { ip, .. }| {
            !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified()
        })
        .collect()
}

fn list<T: ToString>(addresses: impl IntoIterator<Item = T>) -> String {
    addresses
        .into_iter()
        .map(|address| address.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
