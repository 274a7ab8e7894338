//! The pods of this node: enrolling, releasing, and everything that belongs to one.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use tokio::sync::Mutex;

use super::enforcer::Enforcer;
use crate::{
    config::Config,
    enrol::{EnrolError, Enrolment, LocalPod, Memory, PodSpec, PodUid, Registry},
    kernel::{Kernel, NetnsCookie},
    proxy::{Context, PodProxy, Workers},
};

/// All pods, with what was started for them.
pub struct Pods {
    registry: Registry,
    memory: Memory,
    running: Mutex<Running>,
    enforcer: Arc<Enforcer>,
    context: Arc<Context>,
    trust_domain: String,
    packet_mark: u32,
}

struct Running {
    kernel: Kernel,
    workers: Option<Workers>,
    pods: HashMap<PodUid, (Enrolment, PodProxy)>,
}

impl Pods {
    pub fn new(kernel: Kernel, enforcer: Arc<Enforcer>, workers: Workers, context: Arc<Context>, config: &Config) -> Self {
        Self {
            registry: Registry::default(),
            memory: Memory::beside(&config.admin_socket),
            running: Mutex::new(Running { kernel, workers: Some(workers), pods: HashMap::new() }),
            enforcer,
            context,
            trust_domain: config.trust_domain.clone(),
            packet_mark: config.packet_mark,
        }
    }

    /// Serves the pods of an earlier agent again, and forgets those that have gone.
    pub async fn restore(&self) {
        for spec in self.memory.recall() {
            let uid = spec.uid.clone();
            if let Err(error) = self.add(spec).await {
                tracing::warn!(pod = %uid, %error, "a pod that was enrolled before could not be enrolled again; its traffic is refused");
            }
        }
        let running = self.running.lock().await;
        self.remember(&running);
        match running.kernel.prune() {
            Ok(0) => {}
            Ok(pruned) => tracing::info!(pruned, "removed what was left of pods that have gone"),
            Err(error) => tracing::warn!(%error, "cannot remove what is left of pods that have gone"),
        }
    }

    fn remember(&self, running: &Running) {
        self.memory.store(running.pods.values().map(|(enrolment, _)| enrolment.pod.as_ref()));
    }

    /// Enrols a pod; a second request for the same pod changes nothing.
    pub async fn add(&self, spec: PodSpec) -> Result<Arc<LocalPod>, EnrolError> {
        let mut running = self.running.lock().await;
        let Running { kernel, workers, pods } = &mut *running;
        let mesh = self.context.mesh.load();
        let identity = spec.identity(&mesh, &self.trust_domain)?;
        let (netns, ip) = Enrolment::examine(&spec)?;
        let uid = spec.uid.clone();
        if !self.registry.check(&uid, &netns, IpAddr::V4(ip))? {
            return self.registry.by_uid(&uid).ok_or(EnrolError::Unknown(uid));
        }
        drop(mesh);
        let workers = workers.as_ref().ok_or_else(|| EnrolError::Unknown(uid.clone()))?;
        let (enrolment, listeners) =
            tokio::task::block_in_place(|| Enrolment::begin(kernel, spec, netns, ip, identity.clone(), self.packet_mark))?;
        let pod = Arc::clone(&enrolment.pod);
        self.context.certificates.acquire(&identity);
        let proxy = match PodProxy::start(workers, &self.context, Arc::clone(&pod), listeners) {
            Ok(proxy) => proxy,
            Err(source) => {
                self.context.certificates.release(&identity);
                enrolment.end()?;
                return Err(crate::kernel::KernelError::Netns { doing: "accept connections", source }.into());
            }
        };
        // The pod's connections are decided from here on.
        if let Err(error) = self.enforcer.add(Arc::clone(&pod)) {
            proxy.close();
            self.context.certificates.release(&identity);
            enrolment.end()?;
            return Err(error.into());
        }
        self.registry.insert(Arc::clone(&pod));
        pods.insert(uid.clone(), (enrolment, proxy));
        self.context.telemetry.metrics.pods(pods.len(), 0);
        self.remember(&running);
        tracing::info!(pod = %uid, identity = %pod.identity, ip = %pod.ip, "pod enrolled");
        Ok(pod)
    }

    /// Releases a pod: its new connections are no longer ours.
    pub async fn remove(&self, uid: &PodUid) -> Result<(), EnrolError> {
        let mut running = self.running.lock().await;
        let (enrolment, proxy) = running.pods.remove(uid).ok_or_else(|| EnrolError::Unknown(uid.clone()))?;
        let pod = Arc::clone(&enrolment.pod);
        self.registry.remove(uid);
        let removed = self.enforcer.remove(&pod);
        let ended = tokio::task::block_in_place(|| enrolment.end());
        proxy.close();
        self.context.certificates.release(&pod.identity);
        self.context.telemetry.metrics.pods(running.pods.len(), 0);
        self.remember(&running);
        let workload_gone = |name: &str| {
            !running.pods.values().any(|(other, _)| {
                other.pod.workload(&self.context.mesh.load()).is_some_and(|other| &*other.workload_name == name)
            })
        };
        if let Some(workload) = pod.workload(&self.context.mesh.load())
            && workload_gone(&workload.workload_name)
        {
            self.context.telemetry.metrics.forget_workload(&workload.namespace, &workload.workload_name);
        }
        tracing::info!(pod = %uid, "pod released");
        removed?;
        ended
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
        for (_, proxy) in running.pods.values() {
            proxy.drain();
        }
        if let Some(workers) = running.workers.take() {
            workers.stop(grace).await;
        }
    }
}
