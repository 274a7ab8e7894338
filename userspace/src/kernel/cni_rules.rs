//! istio-cni's own redirection inside a pod: chains of iptables that send connections to the agent's ports. Where the kernel part
//! steers they are in its way: the chains are emptied, and filled again when the pod leaves.
//!
//! The chains themselves, what leads to them, and the rule and route for the answers (which concern nobody then) stay: when a pod
//! leaves the mesh istio-cni first deletes all that, one by one, and if something is missing gives up before it tells the agent
//! (`RemovePodFromMesh` and `DeleteInpodRules` in Istio's `cni/pkg`). A chain that is gone later was deleted by it, and stays gone.
//!
//! Invariant: what is not istio-cni's is not touched. Called by `enrol` and when the kernel part is unloaded.

mod programs;
mod tables;

use serde::{Deserialize, Serialize};

use super::{KernelError, Netns, routing};
use programs::Place;
use tables::Taken;

/// What was taken over in one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniRules {
    tables: Vec<(Place, Vec<Taken>)>,
}

impl CniRules {
    /// Whether there was anything.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// Whether a pod has such rules now. Empty chains are none.
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

    /// Gives back what was taken, where there is room for it: not where istio-cni has deleted its chains, or filled them again.
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
        Ok(())
    }

    fn put_all_back(&self) -> Result<(), String> {
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
        self
    }
}

fn find() -> Result<Vec<(Place, Vec<Taken>)>, String> {
    let mut found = Vec::new();
    for place in Place::ALL {
        let taken = tables::find(&place.save()?);
        if !taken.is_empty() {
            found.push((place, taken));
        }
    }
    Ok(found)
}
