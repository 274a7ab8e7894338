//! Setting a pod up and taking it down: namespace, routing, listeners, hook.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::Arc,
};

use super::{EnrolError, LocalPod, PodSpec};
use crate::{
    kernel::{Attachment, Kernel, Netns, PodListeners, PodRouting, PodSockets, SocketDestroyer},
    policy::Identity,
};

/// What was set up for a pod, to be undone when it leaves.
pub struct Enrolment {
    pub pod: Arc<LocalPod>,
    routing: PodRouting,
    attachment: Attachment,
}

impl Enrolment {
    /// Opens the pod's namespace and finds its address.
    pub fn examine(spec: &PodSpec) -> Result<(Arc<Netns>, Ipv4Addr), EnrolError> {
        let netns = Netns::open(&spec.netns)?;
        let own = Netns::open(Path::new("/proc/self/ns/net"))?;
        if own.cookie() == netns.cookie() {
            return Err(EnrolError::HostNetwork(spec.uid.clone()));
        }
        let address = netns.run(address).ok().flatten().ok_or_else(|| EnrolError::NoAddress {
            uid: spec.uid.clone(),
            netns: spec.netns.display().to_string(),
        })?;
        Ok((Arc::new(netns), address))
    }

    /// Sets everything up but the kernel part's tables: until the pod is entered there, its traffic is left alone.
    ///
    /// The hook comes last: it sends connections to listeners that exist.
    pub fn begin(
        kernel: &Kernel,
        spec: PodSpec,
        netns: Arc<Netns>,
        ip: Ipv4Addr,
        identity: Identity,
        packet_mark: u32,
    ) -> Result<(Self, PodListeners), EnrolError> {
        let sockets = PodSockets::new(Arc::clone(&netns), Arc::clone(kernel.tables()), packet_mark);
        let destroyer = SocketDestroyer::new(&netns)?;
        let routing = PodRouting::install(&netns, ip, packet_mark)?;
        let attached = sockets.listen().and_then(|listeners| Ok((listeners, kernel.attach_pod(&netns)?)));
        match attached {
            Ok((listeners, attachment)) => {
                let pod = LocalPod { spec, ip: IpAddr::V4(ip), identity, sockets, destroyer };
                Ok((Self { pod: Arc::new(pod), routing, attachment }, listeners))
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

/// The first IPv4 address of the namespace this thread is in that is neither loopback nor link-local.
fn address() -> Option<Ipv4Addr> {
    nix::ifaddrs::getifaddrs().ok()?.find_map(|interface| {
        let ip = interface.address?.as_sockaddr_in()?.ip();
        (!ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified()).then_some(ip)
    })
}
