//! Bringing the kernel part in line with what changed: the tables first, as one, then the open flows that it forbids.

use std::{
    collections::HashSet,
    io,
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use culvert_abi::{Endpoint, Pod};

use super::{
    Enforcer,
    inherited::Inherited,
    now,
    pairs::{Pair, Source},
    state::State,
    sweep::View,
};
use crate::{
    kernel::{KernelError, NetnsCookie, OpenFlow, sys},
    mesh::Mesh,
    telemetry::FlowEnd,
};

/// Far more than a program of ours runs, where the kernel offers no better way to wait for its end.
const PROGRAMS_TAKE: Duration = Duration::from_millis(100);

/// Pairs that are judged while a change is being written; more of them are judged after the flows that it forbids are cut.
const AT_ONCE: usize = 1024;

/// What is left to do after a change was written.
#[derive(Default)]
struct Change {
    /// What open flows are to be judged by; nothing when they need not be.
    view: Option<View>,
    /// Pairs whose verdicts are still to be given.
    late: Vec<(NetnsCookie, Pair)>,
    failed: Option<KernelError>,
}

impl Enforcer {
    /// All pods of an earlier agent are back: from now on this one decides, and judges open flows, beginning with those that
    /// are there.
    pub fn start(&self) -> Result<usize, KernelError> {
        {
            let mut state = self.state();
            state.started = true;
            state.dirty = true;
            if state.is_waiting() {
                tracing::error!(
                    "there is no valid mesh yet: direct connections go on as an earlier agent decided them, until its last sign of life is older than CULVERT_VERDICT_MAX_AGE, and everything else is refused; mend the mesh file"
                );
            }
        }
        self.bring_in_line(None)
    }

    /// Brings the kernel in line with a new mesh; returns how many direct flows it cut.
    ///
    /// What could not be written or cut is noted, and [`Self::retry`] tries again.
    pub fn apply(&self, mesh: Arc<Mesh>) -> Result<usize, KernelError> {
        self.bring_in_line(Some(mesh))
    }

    pub(super) fn bring_in_line(&self, mesh: Option<Arc<Mesh>>) -> Result<usize, KernelError> {
        let Some(change) = self.write_change(mesh)? else {
            return Ok(0);
        };
        let mut failed = change.failed;
        let mut cut = 0;
        if let Some(view) = &change.view {
            cut = self.sweep(view);
            // Programs that read the old generation before it changed may make a flow after the first sweep.
            wait_for_running_programs();
            cut += self.sweep(view);
        }
        let mut state = self.state();
        for (asker, pair) in change.late {
            if let Err(error) = self.give_verdict(&mut state, asker, &pair) {
                failed = Some(error);
            }
        }
        state.has_void_verdicts = true;
        let policies: HashSet<_> = state
            .mesh
            .policies()
            .map(|policy| policy.name.clone())
            .collect();
        state.policies.retain(|name| policies.contains(name));
        match failed {
            Some(error) => Err(error),
            None => {
                // What is in the tables is this agent's by now.
                self.tables.vouch()?;
                Ok(cut)
            }
        }
    }

    /// The change itself, as one: where it decides anything differently, no connection is decided by what is half-written. `None`
    /// when nothing changed for the pods of this node.
    fn write_change(&self, mesh: Option<Arc<Mesh>>) -> Result<Option<Change>, KernelError> {
        let mut state = self.state();
        if let Some(mesh) = mesh {
            state.mesh = mesh;
            state.known = true;
        }
        if state.is_waiting() {
            state.dirty = true;
            return Ok(None);
        }
        // What a change means for pods that are not back is seen in their flows only.
        let again = std::mem::take(&mut state.dirty) || !state.waiting.is_empty();
        let now = now();
        let mut pods = std::mem::take(&mut state.pods);
        let mut changed = Vec::new();
        for (cookie, enrolled) in &mut pods {
            if state.refresh(enrolled, &self.settings, now) || again {
                changed.push(*cookie);
            }
        }
        state.pods = pods;
        let inherited = std::mem::take(&mut state.inherited);
        if changed.is_empty() && inherited.is_empty() {
            self.sync_services(&mut state);
            return Ok(None);
        }
        let mut change = Change::default();
        if let Err(error) = self.write_pods(&mut state, &changed, &inherited, &mut change) {
            state.dirty = true;
            state.inherited = inherited;
            change.failed = Some(error);
            // What is half-written decides nothing until it is written.
            if let Err(error) = self.tables.set_changing(true) {
                tracing::error!(%error, "the kernel part cannot be told that a change is not written");
            }
        } else if let Err(error) = self.tables.set_changing(false) {
            state.dirty = true;
            change.failed = Some(error);
        }
        self.sync_services(&mut state);
        if !self.settings.skip_sweep {
            change.view = state.view(&self.settings);
        }
        Ok(Some(change))
    }

    /// First the verdicts of the new generation, then the endpoints, which put them into force: a connection that is just being
    /// made finds the new verdict where its own is void.
    fn write_pods(
        &self,
        state: &mut State,
        changed: &[NetnsCookie],
        inherited: &Inherited,
        change: &mut Change,
    ) -> Result<(), KernelError> {
        if !inherited.is_empty() {
            // What an earlier agent chose by its own numbers.
            self.tables.services().clear()?;
        }
        while let Some(ip) = state.dropped.last().copied() {
            if !state.addresses.contains_key(&ip) {
                self.tables.remove_endpoint(ip)?;
            }
            state.dropped.pop();
        }
        let concerned: HashSet<IpAddr> = changed
            .iter()
            .filter_map(|cookie| state.pods.get(cookie))
            .flat_map(|enrolled| enrolled.endpoints.iter().map(|(ip, _)| *ip))
            .collect();
        let mut pairs = state
            .pairs
            .towards(|destination| concerned.contains(&destination.ip()));
        for (asker, destination, action) in inherited.pairs() {
            if let Some(enrolled) = state.pods.get(&asker) {
                let source = Source::Identity(enrolled.pod.identity.clone());
                let pair = Pair {
                    source,
                    destination,
                    action,
                };
                pairs.push((asker, pair));
            }
        }
        if self.settings.skip_sweep {
            pairs.clear();
        }
        change.late = pairs.split_off(pairs.len().min(AT_ONCE));
        let mut decided = Vec::with_capacity(pairs.len());
        let mut differs = !change.late.is_empty();
        for (asker, pair) in pairs {
            if let Some(verdict) = state.decide(asker, &pair) {
                differs |= verdict.verdict.action != pair.action;
                decided.push((asker, verdict));
            }
        }
        if differs {
            self.tables.set_changing(true)?;
        }
        for (asker, verdict) in decided {
            // Without it the pair asks the agent: slower, not wrong. The endpoints must follow whatever happens here.
            if let Err(error) = self.keep_verdict(state, asker, verdict) {
                tracing::warn!(%error, "a verdict could not be renewed");
            }
        }
        let mut result = Ok(());
        for cookie in changed {
            if let Some(enrolled) = state.pods.remove(cookie) {
                let written = self.write(state, &enrolled);
                state.pods.insert(*cookie, enrolled);
                if written.is_err() {
                    result = written;
                }
            }
        }
        self.close_inherited(state, inherited).and(result)
    }

    /// Pods that an earlier agent served and this one does not (yet): their traffic goes to an agent or nowhere, as that of
    /// nobody in particular.
    fn close_inherited(&self, state: &mut State, inherited: &Inherited) -> Result<(), KernelError> {
        if inherited.is_empty() {
            return Ok(());
        }
        // What was removed meanwhile stays removed.
        let present: HashSet<NetnsCookie> = self
            .tables
            .pods()?
            .into_iter()
            .map(|(cookie, _)| cookie)
            .collect();
        for (ip, endpoint) in &inherited.endpoints {
            if !present.contains(&NetnsCookie(endpoint.netns_cookie)) {
                continue;
            }
            if !state.addresses.contains_key(ip)
                && state.pods.contains_key(&NetnsCookie(endpoint.netns_cookie))
            {
                // An address that is not the pod's any more.
                self.tables.remove_endpoint(*ip)?;
            } else if !state.addresses.contains_key(ip) {
                state.next_generation += 1;
                let closed = Endpoint {
                    generation: state.next_generation,
                    flags: Endpoint::STEER,
                    ..*endpoint
                };
                self.tables.put_endpoint(*ip, closed)?;
            }
        }
        for (cookie, pod) in &inherited.pods {
            if present.contains(cookie) && !state.pods.contains_key(cookie) {
                let nobody = Pod {
                    identity: 0,
                    pod: 0,
                    view: 0,
                    ..*pod
                };
                self.tables.put_pod(*cookie, nobody)?;
            }
        }
        Ok(())
    }

    /// Cuts the flows that a view forbids; what could not be cut is owed. Connections need not wait meanwhile: nothing is locked.
    pub fn sweep(&self, view: &View) -> usize {
        let flows = match self.tables.flows() {
            Ok(flows) => flows,
            Err(error) => {
                tracing::error!(%error, "the open flows could not be read; trying again");
                self.owed.store(true, Ordering::Release);
                return 0;
            }
        };
        let mut decisions = view.decisions();
        let forbidden = flows.into_iter().filter(|flow| !decisions.is_allowed(flow));
        let forbidden = self.cuts.note(forbidden.collect(), FlowEnd::Revoked);
        let failed = view.cut(&forbidden);
        for place in failed.keys() {
            if let Some(flow) = forbidden.get(*place) {
                self.cuts.retract(&flow.name());
            }
        }
        if failed.is_empty() {
            self.said.store(0, Ordering::Release);
        }
        if let Some((place, errno)) = failed.iter().next() {
            let error = io::Error::from_raw_os_error(*errno);
            let example = forbidden.get(*place);
            let (client, server) = (example.map(OpenFlow::client), example.map(OpenFlow::server));
            // A flow that resists is tried again each second: all of them in a line, and only when there are others.
            self.owed.store(true, Ordering::Release);
            if self.said.swap(failed.len(), Ordering::AcqRel) != failed.len() {
                tracing::error!(%error, flows = failed.len(), ?client, ?server, "forbidden flows could not be cut at both ends; trying again");
            }
        }
        forbidden.len() - failed.len()
    }
}

pub fn wait_for_running_programs() {
    if let Err(error) = sys::wait_for_running_programs() {
        tracing::warn!(%error, "cannot wait for running programs; waiting a while instead");
        std::thread::sleep(PROGRAMS_TAKE);
    }
}
