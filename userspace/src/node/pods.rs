//! The pods of this node: enrolling, releasing, and everything that belongs to one.

mod cni;
mod learning;
mod leaving;
mod waiting;

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::{
    sync::Mutex,
    task::{JoinError, JoinHandle},
    time::sleep,
};

use super::enforcer::{Enforcer, View};
use crate::{
    config::Config,
    enrol::{EnrolError, Enrolment, KnownPod, LocalPod, Memory, Origin, PodSpec, PodUid, Registry},
    kernel::{Kernel, KernelError, Netns, NetnsCookie, RoutingSettings, sys},
    proxy::{Context, PodProxy, Workers},
};
use leaving::{Leaving, UNDER_WAY};
use waiting::Waiting;
pub use waiting::WaitingPod;

/// All pods, with what was started for them.
pub struct Pods {
    registry: Registry,
    memory: Memory,
    running: Mutex<Running>,
    /// A copy of what waits, for those who only look.
    waiting: RwLock<Vec<WaitingPod>>,
    enforcer: Arc<Enforcer>,
    context: Arc<Context>,
    trust_domain: String,
    routing: RoutingSettings,
    /// The node's own namespace, which is no pod's.
    host: Option<NetnsCookie>,
}

struct Running {
    kernel: Kernel,
    workers: Option<Workers>,
    pods: HashMap<PodUid, (Enrolment, PodProxy)>,
    /// Pods that are to be served and cannot be yet.
    waiting: HashMap<PodUid, Waiting>,
    /// Pods that were released, with connections that go on through the agent.
    leaving: HashMap<NetnsCookie, Leaving>,
    /// Pods that had no device when they were last looked at.
    bare: HashSet<PodUid>,
    /// Programs were loaded since [`Pods::give_back_memory`].
    has_loaded: bool,
}

impl Pods {
    pub fn new(
        kernel: Kernel,
        enforcer: Arc<Enforcer>,
        workers: Workers,
        context: Arc<Context>,
        config: &Config,
        routing: RoutingSettings,
    ) -> Self {
        Self {
            registry: Registry::default(),
            memory: Memory::beside(&config.admin_socket),
            running: Mutex::new(Running {
                kernel,
                workers: Some(workers),
                pods: HashMap::new(),
                waiting: HashMap::new(),
                leaving: HashMap::new(),
                bare: HashSet::new(),
                has_loaded: false,
            }),
            waiting: RwLock::default(),
            enforcer,
            context,
            trust_domain: config.trust_domain.clone(),
            routing,
            host: Netns::open(&config.host_netns)
                .ok()
                .map(|netns| netns.cookie()),
        }
    }

    /// Serves the pods of an earlier agent again, and forgets those that have gone. What cannot be served yet waits, steered to
    /// a listener that is not there: refused, until [`Self::retry`] succeeds or the pod is removed.
    pub async fn restore(&self) {
        let recalled = self.memory.recall();
        let served = recalled.iter().filter(|known| !known.leaves);
        let specs: Vec<PodSpec> = served.map(|known| known.spec.clone()).collect();
        self.learn(&specs).await;
        let mut running = self.running.lock().await;
        for known in recalled {
            let uid = known.spec.uid.clone();
            if known.leaves {
                self.forget(&running, known);
                continue;
            }
            if known.spec.origin == Origin::Cni {
                running.waiting.insert(uid, Waiting::for_snapshot(known));
                continue;
            }
            let spec = known.spec.clone();
            if let Err(error) = self.enrol(&mut running, spec.clone(), Some(&known)).await {
                tracing::warn!(pod = %uid, %error, "a pod that was enrolled before cannot be served yet; its traffic is refused");
                let waiting = Waiting::again(spec, Some(known), error.to_string());
                running.waiting.insert(uid, waiting);
            }
        }
        self.remember(&running);
        match running.kernel.prune() {
            Ok(0) => {}
            Ok(pruned) => tracing::info!(pruned, "removed what was left of pods that have gone"),
            Err(error) => {
                tracing::warn!(%error, "cannot remove what is left of pods that have gone")
            }
        }
    }

    fn remember(&self, running: &Running) {
        let known = running.waiting.values();
        let known: Vec<KnownPod> = known.filter_map(|waiting| waiting.known.clone()).collect();
        let served = running.pods.values();
        let pods: Vec<KnownPod> = served
            .map(|(enrolment, _)| enrolment.known())
            .chain(known.iter().cloned())
            .chain(running.leaving.values().map(Leaving::known))
            .collect();
        self.memory.store(&pods);
        self.enforcer.set_waiting(known);
        self.context
            .telemetry
            .metrics
            .pods(running.pods.len(), running.waiting.len());
        *self.waiting.write().unwrap_or_else(PoisonError::into_inner) =
            running.waiting.values().map(Waiting::told).collect();
    }

    /// Enrols a pod; a second request for the same pod changes nothing.
    pub async fn add(&self, spec: PodSpec) -> Result<Arc<LocalPod>, EnrolError> {
        self.learn(std::slice::from_ref(&spec)).await;
        let mut running = self.running.lock().await;
        self.admit(&mut running, spec).await
    }

    /// Enrols a pod. What an earlier agent set up for it is taken over if it waits, or taken down if the pod is another by now.
    async fn admit(
        &self,
        running: &mut Running,
        spec: PodSpec,
    ) -> Result<Arc<LocalPod>, EnrolError> {
        let uid = spec.uid.clone();
        let waiting = running.waiting.get(&uid);
        let known = match waiting.and_then(|waiting| waiting.known.clone()) {
            Some(known) if spec.netns.open()?.cookie() == known.cookie => Some(known),
            Some(other) => {
                tracing::info!(pod = %uid, "a pod begins anew in another network namespace");
                running.waiting.remove(&uid);
                self.forget(running, other);
                None
            }
            None => None,
        };
        let pod = self.enrol(running, spec, known.as_ref()).await?;
        if running.waiting.remove(&uid).is_some() {
            self.remember(running);
        }
        Ok(pod)
    }

    /// Takes down what an earlier agent set up, as far as it is still there.
    fn forget(&self, running: &Running, known: KnownPod) {
        let uid = known.spec.uid.clone();
        let forgotten =
            tokio::task::block_in_place(|| Enrolment::forget(&running.kernel, known, self.routing));
        if let Err(error) = forgotten {
            tracing::info!(pod = %uid, %error, "what an earlier agent set up in a pod may still be there");
        }
    }

    /// `known` is what an earlier enrolment of the pod found.
    async fn enrol(
        &self,
        running: &mut Running,
        spec: PodSpec,
        known: Option<&KnownPod>,
    ) -> Result<Arc<LocalPod>, EnrolError> {
        let Running {
            kernel,
            workers,
            pods,
            leaving,
            has_loaded,
            ..
        } = running;
        let workers = workers.as_ref().ok_or(EnrolError::Stopping)?;
        let uid = spec.uid.clone();
        let netns = Enrolment::open(&spec)?;
        if self.host == Some(netns.cookie()) {
            return Err(EnrolError::HostNetwork(uid));
        }
        self.check_learnt(&uid, &netns)?;
        let mesh = self.context.mesh.load();
        let identity = spec.identity(&mesh, &self.trust_domain)?;
        if !self.registry.check(&uid, &netns)? {
            return self.registry.by_uid(&uid).ok_or(EnrolError::Unknown(uid));
        }
        let addresses = Enrolment::addresses(&spec, &netns, &mesh, known)?;
        let ips: Vec<IpAddr> = addresses.iter().map(|address| address.ip).collect();
        let (foreign, own) = self.enforcer.sort_addresses(&spec, &mesh, ips);
        drop(mesh);
        if own.is_empty() {
            let found: Vec<_> = foreign.iter().map(ToString::to_string).collect();
            return Err(EnrolError::ForeignAddress {
                uid,
                found: found.join(", "),
            });
        }
        self.registry.check_addresses(&uid, &own)?;
        let left = self.come_back(leaving, netns.cookie());
        // What the kernel part already decides goes on being decided.
        let is_new = known.is_none() && left.is_none();
        let is_in_use = is_new && netns.has_tcp_sockets().unwrap_or(true);
        *has_loaded = true;
        let (mut enrolment, listeners) = tokio::task::block_in_place(|| {
            Enrolment::begin(
                kernel,
                spec,
                netns,
                &addresses,
                identity.clone(),
                self.routing,
                known.or(left.as_ref()),
            )
        })?;
        let pod = Arc::clone(&enrolment.pod);
        pod.set_foreign(foreign);
        self.context.certificates.acquire(&identity);
        let proxy = match PodProxy::start(workers, &self.context, Arc::clone(&pod), listeners) {
            Ok(proxy) => proxy,
            Err(source) => {
                self.context.certificates.release(&identity);
                enrolment.end()?;
                return Err(KernelError::Netns {
                    doing: "accept connections",
                    source,
                }
                .into());
            }
        };
        // A handshake that was under way before there was a hook has no claim, and must have ended when claims are asked for.
        if is_in_use && enrolment.is_steered() {
            sleep(UNDER_WAY).await;
        }
        // The pod's connections are decided from here on.
        if enrolment.is_steered()
            && let Err(error) = self.enforcer.add(Arc::clone(&pod))
        {
            proxy.close().await;
            self.context.certificates.release(&identity);
            enrolment.end()?;
            return Err(error.into());
        }
        if let Err(error) = tokio::task::block_in_place(|| enrolment.take_over_rules()) {
            let removed = self.enforcer.remove(&pod);
            proxy.close().await;
            self.context.certificates.release(&identity);
            enrolment.end()?;
            removed?;
            self.enforcer.forget_claims(&pod)?;
            return Err(error);
        }
        self.registry.insert(Arc::clone(&pod));
        pods.insert(uid.clone(), (enrolment, proxy));
        self.remember(running);
        tracing::info!(pod = %uid, identity = %pod.identity, addresses = ?pod.addresses(), "pod enrolled");
        Ok(pod)
    }

    /// Releases a pod: its new connections are no longer ours.
    pub async fn remove(&self, uid: &PodUid) -> Result<(), EnrolError> {
        let mut running = self.running.lock().await;
        if let Some(waiting) = running.waiting.remove(uid) {
            let known = waiting.known;
            let forgotten = known.map_or(Ok(()), |known| {
                tokio::task::block_in_place(|| {
                    Enrolment::forget(&running.kernel, known, self.routing)
                })
            });
            self.remember(&running);
            return forgotten;
        }
        let released = self.release(&mut running, uid).await?;
        self.remember(&running);
        drop(running);
        self.finish(released).await
    }

    /// Takes a pod down, but for [`Self::finish`].
    async fn release(&self, running: &mut Running, uid: &PodUid) -> Result<Released, EnrolError> {
        let (enrolment, proxy) = running
            .pods
            .remove(uid)
            .ok_or_else(|| EnrolError::Unknown(uid.clone()))?;
        let pod = Arc::clone(&enrolment.pod);
        self.registry.remove(uid);
        let view = self.enforcer.remove(&pod).map(|view| view.map(Arc::new));
        // What is open is cut at once, what is on its way once it has arrived.
        let cutting = match &view {
            Ok(Some(view)) => Some(self.cut(view)),
            _ => None,
        };
        let ended = self.leave(running, enrolment, proxy).await;
        let forgotten = tokio::task::block_in_place(|| self.enforcer.forget_claims(&pod));
        let ended = ended.and(forgotten.map_err(Into::into));
        let mesh = self.context.mesh.load();
        if let Some(workload) = pod.workload(&mesh) {
            let others = running
                .pods
                .values()
                .filter_map(|(other, _)| other.pod.workload(&mesh));
            if !others
                .into_iter()
                .any(|other| other.workload_name == workload.workload_name)
            {
                self.context
                    .telemetry
                    .metrics
                    .forget_workload(&workload.namespace, &workload.workload_name);
            }
        }
        tracing::info!(pod = %uid, "pod released");
        Ok(Released {
            view,
            cutting,
            ended,
        })
    }

    /// Looks through the flows of a pod that has left once more. Nobody waits for this but who asked: the kernel may take its time
    /// to destroy sockets.
    async fn finish(&self, released: Released) -> Result<(), EnrolError> {
        if let Some(view) = released.view? {
            if let Some(cutting) = released.cutting {
                looked_through(cutting.await);
            }
            looked_through(self.cut(&view).await);
        }
        released.ended
    }

    /// Begins to cut the flows that a view forbids.
    fn cut(&self, view: &Arc<View>) -> JoinHandle<usize> {
        let (enforcer, view) = (Arc::clone(&self.enforcer), Arc::clone(view));
        tokio::task::spawn_blocking(move || enforcer.sweep(&view))
    }

    /// The pods that cannot be served yet, with the reason.
    pub fn waiting(&self) -> Vec<WaitingPod> {
        self.waiting
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Gives back what loading programs took for a moment: the loader reads the kernel's types each time, some 20 MiB in small pieces,
    /// which the allocator keeps for each thread that has ever done it. To be called now and then.
    pub async fn give_back_memory(&self) {
        let has_loaded = std::mem::take(&mut self.running.lock().await.has_loaded);
        if has_loaded {
            // It takes a while, and nothing waits for it.
            let _ = tokio::task::spawn_blocking(sys::give_back_memory).await;
        }
    }

    pub fn all(&self) -> Vec<Arc<LocalPod>> {
        self.registry.all()
    }

    pub fn by_cookie(&self, cookie: NetnsCookie) -> Option<Arc<LocalPod>> {
        self.registry.by_cookie(cookie)
    }

    /// Ends the proxies: no new connections, time for the open ones, then a reset. Pods stay in the mesh: what needs the agent
    /// is refused until the next one comes.
    pub async fn stop(&self, grace: Duration) {
        let mut running = self.running.lock().await;
        let mut closing: Vec<_> = running.leaving.values().map(Leaving::closing).collect();
        for (_, proxy) in running.pods.values() {
            proxy.drain();
            closing.push(proxy.closing());
        }
        let workers = running.workers.take();
        // A pod may leave meanwhile.
        drop(running);
        if let Some(workers) = workers {
            workers.stop(grace, closing).await;
        }
    }
}

/// A pod that was taken down.
struct Released {
    /// What its flows are judged by from now on.
    view: Result<Option<Arc<View>>, KernelError>,
    /// Those that were open are being cut.
    cutting: Option<JoinHandle<usize>>,
    ended: Result<(), EnrolError>,
}

fn looked_through(cut: Result<usize, JoinError>) {
    if let Err(error) = cut {
        tracing::error!(%error, "flows of a pod that left were not looked through");
    }
}
