//! What the control plane knows of a pod is asked for before the pod is enrolled, where it says only what it is asked for.
//!
//! Invariant: no pod is enrolled before there was an answer about each of its addresses: without its workload it would be served without
//! its annotations, and could have an address that is another's.

use std::net::IpAddr;

use super::Pods;
use crate::{
    enrol::{EnrolError, Enrolment, PodSpec, PodUid},
    kernel::Netns,
};

impl Pods {
    /// Asks about pods that are to be enrolled, and waits a few seconds for the answers. To be called without the lock.
    pub(super) async fn learn(&self, specs: &[PodSpec]) {
        let Some(demand) = &self.context.demand else {
            return;
        };
        // One that cannot be looked at cannot be enrolled either, which is said then.
        let ips: Vec<IpAddr> = tokio::task::block_in_place(|| {
            let netns = specs.iter().filter_map(|spec| Enrolment::open(spec).ok());
            netns.flat_map(|netns| Enrolment::found(&netns)).collect()
        });
        demand.own_addresses(&self.context.network, &ips).await;
    }

    /// Whether the control plane has said what it knows of a pod.
    pub(super) fn check_learnt(&self, uid: &PodUid, netns: &Netns) -> Result<(), EnrolError> {
        let Some(demand) = &self.context.demand else {
            return Ok(());
        };
        let found = tokio::task::block_in_place(|| Enrolment::found(netns));
        let unknown = found
            .into_iter()
            .find(|ip| !demand.knows(&self.context.network, *ip));
        match unknown {
            Some(ip) => Err(EnrolError::Unanswered {
                uid: uid.clone(),
                ip,
            }),
            None => Ok(()),
        }
    }
}
