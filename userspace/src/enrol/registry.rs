//! The pods of this node, by every name they are looked up with.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use super::{EnrolError, LocalPod, PodUid};
use crate::kernel::{Netns, NetnsCookie};

/// As many as the kernel part's PODS map holds.
const MOST_PODS: usize = 4096;

/// Enrolled pods.
#[derive(Default)]
pub struct Registry {
    pods: RwLock<HashMap<PodUid, Arc<LocalPod>>>,
}

impl Registry {
    pub fn by_uid(&self, uid: &PodUid) -> Option<Arc<LocalPod>> {
        self.read().get(uid).cloned()
    }

    pub fn by_cookie(&self, cookie: NetnsCookie) -> Option<Arc<LocalPod>> {
        self.read()
            .values()
            .find(|pod| pod.cookie() == cookie)
            .cloned()
    }

    /// All pods, by uid.
    pub fn all(&self) -> Vec<Arc<LocalPod>> {
        let mut pods: Vec<_> = self.read().values().cloned().collect();
        pods.sort_by(|a, b| a.uid().cmp(b.uid()));
        pods
    }

    /// Whether a pod may be added. `Ok(false)` when this very pod is there already.
    pub fn check(&self, uid: &PodUid, netns: &Netns) -> Result<bool, EnrolError> {
        let pods = self.read();
        if let Some(pod) = pods.get(uid) {
            return if pod.cookie() == netns.cookie() {
                Ok(false)
            } else {
                Err(EnrolError::OtherNetns { uid: uid.clone() })
            };
        }
        if let Some(pod) = pods.values().find(|pod| pod.cookie() == netns.cookie()) {
            return Err(EnrolError::NetnsTaken {
                uid: uid.clone(),
                other: pod.uid().clone(),
            });
        }
        if pods.len() >= MOST_PODS {
            Err(EnrolError::TooMany(pods.len()))
        } else {
            Ok(true)
        }
    }

    /// Whether nobody has one of these addresses yet.
    pub fn check_addresses(&self, uid: &PodUid, ips: &[IpAddr]) -> Result<(), EnrolError> {
        let pods = self.read();
        for ip in ips {
            if let Some(pod) = pods.values().find(|pod| pod.has_address(*ip)) {
                return Err(EnrolError::AddressTaken {
                    uid: uid.clone(),
                    ip: *ip,
                    other: pod.uid().clone(),
                });
            }
        }
        Ok(())
    }

    pub fn insert(&self, pod: Arc<LocalPod>) {
        self.write().insert(pod.uid().clone(), pod);
    }

    pub fn remove(&self, uid: &PodUid) -> Option<Arc<LocalPod>> {
        self.write().remove(uid)
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<PodUid, Arc<LocalPod>>> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<PodUid, Arc<LocalPod>>> {
        self.pods.write().unwrap_or_else(PoisonError::into_inner)
    }
}
