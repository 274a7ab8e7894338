//! Processes of the node itself: kubelet's probes reach applications, host-network pods do not get that privilege.

use aya_ebpf::{bindings::bpf_sock_addr, helpers::generated::bpf_get_current_ancestor_cgroup_id};
use culvert_abi::{Address, OWN_PORTS, Quota, knob, role};

use crate::{
    address::target_port,
    maps::{CONFIG, ENDPOINTS, SOCKETS, knob},
};

/// Levels of cgroups that are looked at; systemd's hierarchy for pods has about five.
const DEEPEST: i32 = 16;

/// A connection of a namespace that is no pod's. Nothing is refused or steered here: a socket that gets no role arrives in
/// the pod like any other connection from outside.
#[inline(always)]
pub fn connect(addr: *mut bpf_sock_addr, netns_cookie: u64, target: &Address) {
    let Some(config) = CONFIG.get(0) else {
        return;
    };
    if config.host_netns == 0 || config.host_netns != netns_cookie {
        return;
    }
    // SAFETY: read of a context field that the verifier types as a socket.
    let sk = unsafe { (*addr).__bindgen_anon_1.sk };
    // SAFETY: the agent replaces endpoints whole; single fields of a map value.
    let Some(endpoint) = (unsafe { ENDPOINTS.get(target) }) else {
        // A socket that is used again for another destination.
        if let Some(state) = SOCKETS.find(sk.cast())
            && state.role == role::NODE
        {
            state.role = role::NONE;
        }
        return;
    };
    let (server_netns, workload) = (endpoint.netns_cookie, endpoint.workload);
    if OWN_PORTS.contains(&target_port(addr)) || in_pod(config.pods_cgroup) {
        return;
    }
    let Some(state) = SOCKETS.find_or_create(sk.cast()) else {
        return;
    };
    if state.role == role::PROXY {
        return;
    }
    state.role = role::NODE;
    state.identity = 0;
    state.pod = 0;
    state.quota = Quota::HOST;
    state.server_netns = server_netns;
    state.workload = workload;
}

/// Whether this process belongs to a pod, one of the host's network for example.
#[inline(always)]
fn in_pod(pods_cgroup: u64) -> bool {
    if knob(knob::HOST_PODS_ARE_NODE) {
        return false;
    }
    for level in 0..DEEPEST {
        // SAFETY: helper call without memory.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if ancestor == pods_cgroup {
            return true;
        }
        // There is none so deep.
        if ancestor == 0 {
            return false;
        }
    }
    // Deeper than we look: not known to be outside.
    true
}
