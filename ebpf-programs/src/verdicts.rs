//! Cached decisions: looked up when a connection is opened, and again when the policies changed while it was being made.

use culvert_abi::{Claim, Endpoint, FlowKey, VerdictKey, action, scope};

use crate::maps::{self, ENDPOINTS};

/// What the decision about a connection is kept under.
#[inline(always)]
pub fn key(endpoint: &Endpoint, identity: u32, pod: u32, port: u16) -> VerdictKey {
    let by_pod = endpoint.flags & Endpoint::BY_POD != 0;
    VerdictKey {
        source: if by_pod { pod } else { identity },
        workload: endpoint.workload,
        port,
        scope: if by_pod { scope::POD } else { scope::IDENTITY },
        padding: 0,
    }
}

/// The generation under which a direct claim stands now: the one it was made under, or the present one if what was decided
/// since allows it too. `None`: it is void.
#[inline(always)]
pub fn standing(claim: &Claim, flow: &FlowKey) -> Option<u64> {
    // SAFETY: the agent replaces endpoints whole; a copy, because its fields must be of one moment.
    let endpoint = *unsafe { ENDPOINTS.get(&flow.server) }?;
    if endpoint.generation == claim.generation {
        return Some(claim.generation);
    }
    if endpoint.netns_cookie != claim.server_netns || endpoint.flags & Endpoint::STEER != 0 {
        return None;
    }
    let key = key(
        &endpoint,
        claim.source_identity,
        claim.source_pod,
        flow.server_port,
    );
    let verdict = maps::verdict(&key)?;
    (verdict.generation == endpoint.generation && verdict.action == action::ALLOW)
        .then_some(endpoint.generation)
}
