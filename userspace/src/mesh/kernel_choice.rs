//! Which services the kernel part can choose endpoints for, and among which: exactly those that the agent would.
//!
//! Pure. Everything that is not said here is left to the agent. Called by `node`, which feeds the kernel part.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::balance::Candidate;
use super::{Locality, Mesh, Service, Workload};

/// The most endpoints of a service that the kernel part chooses from.
pub const MOST_ENDPOINTS: usize = 4096;
/// The most endpoints, fit or not, times ports of one service: each is looked at.
const MOST_LOOKS: usize = 1 << 18;
/// The most pairs of address and port of one service.
const MOST_PORTS: usize = 1024;

/// What decides which endpoints a client may be sent to, beside the service. Clients for which this is equal are sent to the
/// same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClientView {
    network: Arc<str>,
    locality: Locality,
    node: Arc<str>,
    cluster_id: Arc<str>,
    ipv4: bool,
    ipv6: bool,
}

/// A service's address and port, and the endpoints to choose from by weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelChoice {
    /// What clients connect to.
    pub address: SocketAddr,
    /// At least one, at most [`MOST_ENDPOINTS`].
    pub candidates: Vec<Candidate>,
}

impl ClientView {
    /// The view that this workload has.
    pub fn of(client: &Workload) -> Self {
        Self {
            network: client.network.clone(),
            locality: client.locality.clone(),
            node: client.node.clone(),
            cluster_id: client.cluster_id.clone(),
            ipv4: client.addresses.iter().any(IpAddr::is_ipv4),
            ipv6: client.addresses.iter().any(IpAddr::is_ipv6),
        }
    }
}

impl Mesh {
    /// The addresses and ports of a service that the kernel part can choose for, where the client is on `network` and has the
    /// view of `client`.
    ///
    /// Not those that the client's namespace or the endpoint's network matters for, that stand for a range, that are reached in
    /// another address family, or that lead to a waypoint or nowhere.
    pub fn kernel_choices(
        &self,
        network: &str,
        service: &Service,
        client: &Workload,
    ) -> Vec<KernelChoice> {
        let mut addresses: Vec<IpAddr> = service
            .vips
            .iter()
            .filter(|vip| *vip.network == *network)
            .filter_map(|vip| vip.single())
            .filter(|ip| self.is_the_only_one_at(network, *ip, service))
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        let too_many = addresses.len().saturating_mul(service.ports.len()) > MOST_PORTS
            || self
                .backends(&service.id)
                .len()
                .saturating_mul(service.ports.len())
                > MOST_LOOKS;
        if !service.waypoints.is_empty() || too_many || addresses.is_empty() {
            return Vec::new();
        }
        let mut choices = Vec::new();
        for (port, _) in service.ports.iter() {
            // Within a family the candidates are the same for every address.
            let mut of_family = [None, None];
            for ip in &addresses {
                let address = SocketAddr::new(*ip, port);
                let [four, six] = &mut of_family;
                let candidates = if ip.is_ipv4() { four } else { six };
                let candidates = candidates
                    .get_or_insert_with(|| self.candidates(service, address, Some(client)));
                if can_choose(candidates, address, network) {
                    choices.push(KernelChoice {
                        address,
                        candidates: candidates.clone(),
                    });
                }
            }
        }
        choices
    }

    fn is_the_only_one_at(&self, network: &str, ip: IpAddr, service: &Service) -> bool {
        matches!(self.services_at(network, ip), [only] if only.id == service.id)
    }
}

fn can_choose(candidates: &[Candidate], destination: SocketAddr, network: &str) -> bool {
    (1..=MOST_ENDPOINTS).contains(&candidates.len())
        && candidates.iter().all(|(endpoint, address, _)| {
            address.is_ipv4() == destination.is_ipv4() && *endpoint.workload.network == *network
        })
}

#[cfg(test)]
mod tests;
