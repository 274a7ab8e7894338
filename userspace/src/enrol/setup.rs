//! Setting a pod up and taking it down: namespace, routing, listeners, hook.

use std::{net::IpAddr, path::Path, sync::Arc};

use super::{EnrolError, KnownPod, LocalPod, PodSpec, addresses};
use crate::{
    kernel::{
        Attachment, CniRules, Kernel, KernelError, Netns, PodAddress, PodListeners, PodRouting,
        PodSockets, RedirectMode, RoutingSettings, SocketDiag,
    },
    mesh::Mesh,
    policy::Identity,
};

/// What was set up for a pod, to be undone when it leaves.
pub struct Enrolment {
    pub pod: Arc<LocalPod>,
    routing: PodRouting,
    /// None where istio-cni's rules steer.
    steering: Option<Steering>,
}

/// What has the kernel part steer a pod's connections.
struct Steering {
    /// None when no connection is steered any more.
    attachment: Option<Attachment>,
    taken: CniRules,
}

impl Enrolment {
    /// Opens the pod's namespace.
    pub fn open(spec: &PodSpec) -> Result<Arc<Netns>, EnrolError> {
        let netns = spec.netns.open()?;
        let own = Netns::open(Path::new("/proc/self/ns/net"))?;
        if own.cookie() == netns.cookie() {
            return Err(EnrolError::HostNetwork(spec.uid.clone()));
        }
        Ok(netns)
    }

    /// The addresses of a namespace, whoever they belong to; a bounded number of them.
    pub fn found(netns: &Netns) -> Vec<IpAddr> {
        addresses::all(netns)
    }

    /// Finds the pod's addresses, the primary one first: those it was enrolled with before, else those the mesh names, else all.
    pub fn addresses(
        spec: &PodSpec,
        netns: &Netns,
        mesh: &Mesh,
        before: Option<&KnownPod>,
    ) -> Result<Vec<PodAddress>, EnrolError> {
        addresses::of_pod(spec, netns, mesh, before)
    }

    /// Sets everything up but the kernel part's tables: until the pod is entered there, its traffic is left alone.
    ///
    /// The hook comes last: it sends connections to listeners that exist. Dropping the listeners takes them from it.
    pub fn begin(
        kernel: &Kernel,
        spec: PodSpec,
        netns: Arc<Netns>,
        addresses: &[PodAddress],
        identity: Identity,
        settings: RoutingSettings,
        before: Option<&KnownPod>,
    ) -> Result<(Self, PodListeners), EnrolError> {
        if addresses.is_empty() {
            return Err(EnrolError::NoAddress {
                uid: spec.uid,
                netns: spec.netns.to_string(),
            });
        }
        let sockets = PodSockets::new(Arc::clone(&netns), Arc::clone(kernel.tables()), settings);
        let diag = SocketDiag::new(&netns, spec.uid.as_str(), kernel.diag())?;
        // First what another program in the pod may have: then nothing of the pod's is touched.
        let listeners = sockets.listen()?;
        let mut before = before.filter(|before| !before.replaced.is_empty());
        if settings.redirect == RedirectMode::Iptables {
            if let Some(known) = before.take_if(|known| !settings.has_found(&known.replaced)) {
                // What an agent set up that did not leave it to istio-cni's rules.
                Self::forget(kernel, known.clone(), settings)?;
            }
            if !CniRules::are_in(&netns)? {
                return Err(KernelError::NoRedirection.into());
            }
        }
        let replaced = before.map(|before| before.replaced.as_slice());
        let routing = PodRouting::install(&netns, addresses, settings, replaced)?;
        let steering = match settings.redirect {
            RedirectMode::Iptables => None,
            RedirectMode::Ebpf => match Steering::begin(kernel, &sockets, &listeners, before) {
                Ok(steering) => Some(steering),
                Err(error) => {
                    sockets.unlisten();
                    // What an earlier agent set up stays: without it, what is steered would find another way.
                    if before.is_none()
                        && let Err(undone) = routing.uninstall(&netns)
                    {
                        tracing::warn!(error = %undone, "a pod that could not be enrolled keeps parts of its routing");
                    }
                    return Err(error.into());
                }
            },
        };
        let pod = LocalPod::new(
            spec,
            addresses.iter().map(|address| address.ip).collect(),
            routing.devices().to_vec(),
            identity,
            sockets,
            diag,
        );
        let enrolment = Self {
            pod: Arc::new(pod),
            routing,
            steering,
        };
        Ok((enrolment, listeners))
    }

    /// Takes over the redirection that istio-cni made in the pod. Once the pod is in the kernel part's tables: until then it steers, and
    /// what it sends to ports that nobody serves yet is refused, not sent as it is.
    pub fn take_over_rules(&mut self) -> Result<(), EnrolError> {
        let Some(steering) = &mut self.steering else {
            return Ok(());
        };
        steering.taken = CniRules::take(self.pod.sockets.netns(), &steering.taken)?;
        if !steering.taken.is_empty() {
            tracing::info!(pod = %self.pod.uid(), "istio-cni's redirection in a pod was taken over");
        }
        Ok(())
    }

    /// What a later agent needs to serve this pod again.
    pub fn known(&self) -> KnownPod {
        let taken = self
            .steering
            .as_ref()
            .map(|steering| steering.taken.clone());
        KnownPod {
            spec: self.pod.spec.clone(),
            cookie: self.pod.cookie(),
            leaves: false,
            ips: self.pod.configured_addresses().to_vec(),
            replaced: self.routing.previous().to_vec(),
            taken: taken.unwrap_or_default(),
        }
    }

    /// Whether the kernel part decides the pod's connections.
    pub fn is_steered(&self) -> bool {
        self.steering.is_some()
    }

    /// Takes down what an earlier agent set up for a pod that this one does not serve.
    pub fn forget(
        kernel: &Kernel,
        known: KnownPod,
        settings: RoutingSettings,
    ) -> Result<(), EnrolError> {
        kernel.forget_pod(known.cookie)?;
        let netns = known.spec.netns.open()?;
        if netns.cookie() == known.cookie {
            Self::undo(known, &netns, settings)?;
        }
        Ok(())
    }

    /// Gives a pod its network back as it was.
    pub fn undo(
        known: KnownPod,
        netns: &Netns,
        settings: RoutingSettings,
    ) -> Result<(), KernelError> {
        let given_back = known.taken.put_back(netns);
        PodRouting::remembered(settings, known.replaced).uninstall(netns)?;
        given_back
    }

    /// No connection is steered any more: new ones are as if the agent were not there, open ones still find it.
    pub fn withdraw(&mut self) -> Result<(), EnrolError> {
        let Some(steering) = &mut self.steering else {
            return Ok(());
        };
        // First, so that what istio-cni would have steered is not sent as it is in between.
        let taken = std::mem::take(&mut steering.taken);
        let given_back = taken.put_back(self.pod.sockets.netns());
        if let Some(attachment) = steering.attachment.take() {
            attachment.detach()?;
            self.routing.release_new(self.pod.sockets.netns())?;
        }
        Ok(given_back?)
    }

    /// Takes the pod down, as far as its namespace still exists.
    pub fn end(mut self) -> Result<(), EnrolError> {
        let withdrawn = self.withdraw();
        self.pod.sockets.unlisten();
        self.routing.uninstall(self.pod.sockets.netns())?;
        withdrawn
    }
}

impl Steering {
    fn begin(
        kernel: &Kernel,
        sockets: &PodSockets,
        listeners: &PodListeners,
        before: Option<&KnownPod>,
    ) -> Result<Self, KernelError> {
        sockets.publish(listeners)?;
        Ok(Self {
            attachment: Some(kernel.attach_pod(sockets.netns())?),
            taken: before
                .map(|before| before.taken.clone())
                .unwrap_or_default(),
        })
    }
}
