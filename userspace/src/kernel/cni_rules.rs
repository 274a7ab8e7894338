//! istio-cni's own redirection inside a pod: chains of iptables that send connections to the agent's ports, with a rule and a route for
//! the answers. Where the kernel part steers they are in its way; they are taken over, and given back when the pod leaves.
//!
//! Invariant: what is not istio-cni's is not touched. Called by `enrol` and when the kernel part is unloaded.

mod policy_route;
mod programs;
mod tables;

use serde::{Deserialize, Serialize};

use super::{
    KernelError, Netns,
    routing::{self, Family},
};
use policy_route::PolicyRoute;
use programs::Place;
use tables::Taken;

/// What was taken over in one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniRules {
    tables: Vec<(Place, Vec<Taken>)>,
    routes: Vec<(Family, PolicyRoute)>,
}

impl CniRules {
    /// Whether there was anything.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// Whether a pod has such rules now.
    pub fn are_in(netns: &Netns) -> Result<bool, KernelError> {
        routing::on_thread(
            netns,
            "read istio-cni's part of",
            || Ok(!find()?.is_empty()),
        )
    }

    /// Takes away all that a pod has of them. `earlier` is what was taken before, where istio-cni may have been at work again since.
    pub fn take(netns: &Netns, earlier: &Self) -> Result<Self, KernelError> {
        let now = routing::on_thread(netns, "take over istio-cni's part of", || {
            let mut taken = Self::default();
            match taken.take_all() {
                Ok(()) => Ok(taken),
                Err(error) => match taken.put_all_back() {
                    Ok(()) => Err(error),
                    Err(undone) => Err(format!("{error}; and it was not undone: {undone}")),
                },
            }
        })?;
        Ok(now.over(earlier))
    }

    /// Gives back what was taken, where it is not there again.
    pub fn put_back(&self, netns: &Netns) -> Result<(), KernelError> {
        if self.is_empty() {
            return Ok(());
        }
        routing::on_thread(netns, "give back istio-cni's part of", || {
            self.put_all_back()
        })
    }

    /// Notes each part before it is taken, so that it can be put back if the next one cannot.
    fn take_all(&mut self) -> Result<(), String> {
        for (place, taken) in find()? {
            let script = tables::removal(&taken);
            self.tables.push((place, taken));
            place.restore(&script)?;
        }
        for family in Family::ALL {
            if self.tables.iter().any(|(place, _)| place.family == family) {
                let route = routing::with_netlink(async |handle| {
                    policy_route::take(&handle, family).await
                })?;
                self.routes.push((family, route));
            }
        }
        Ok(())
    }

    fn put_all_back(&self) -> Result<(), String> {
        for (family, route) in &self.routes {
            routing::with_netlink(async |handle| {
                policy_route::put_back(&handle, *family, route).await
            })?;
        }
        for (place, taken) in &self.tables {
            place.restore(&tables::restoral(taken, &place.save()?))?;
        }
        Ok(())
    }

    /// What was found now, and what was found earlier where now there is nothing.
    fn over(mut self, earlier: &Self) -> Self {
        for (place, taken) in &earlier.tables {
            if self.tables.iter().all(|(found, _)| found != place) {
                self.tables.push((*place, taken.clone()));
            }
        }
        for (family, route) in &earlier.routes {
            if self.routes.iter().all(|(found, _)| found != family) {
                self.routes.push((*family, route.clone()));
            }
        }
        self
    }
}

fn find() -> Result<Vec<(Place, Vec<Taken>)>, String> {
    let mut found = Vec::new();
    for place in Place::ALL {
        let taken = tables::find(&place.save()?).map_err(|rule| {
            format!("the rule `{rule}` of somebody else leads to a chain of istio-cni's; remove it")
        })?;
        if !taken.is_empty() {
            found.push((place, taken));
        }
    }
    Ok(found)
}
