//! From a service to one of its endpoints.
//!
//! Pure: randomness is passed in. Called by the proxy for each connection and by the kernel's feeder for its slots.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{
    Health, HealthPolicy, LoadBalancer, LoadBalancerMode, LocalityScope, Mesh, Service, Workload,
};

/// A workload that serves a port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// The port its application listens on.
    pub target_port: u16,
}

impl Mesh {
    /// All workloads that serve this port of the service, fit or not, in the order of the resources.
    ///
    /// The workload's own port wins over the service's. A workload that lists ports serves no other.
    pub fn endpoints(&self, service: &Service, service_port: u16) -> Vec<Endpoint> {
        let backends = self.backends(&service.id).iter();
        backends
            .filter_map(|workload| {
                let target_port = target_port(workload, service, service_port)?;
                Some(Endpoint {
                    workload: workload.clone(),
                    target_port,
                })
            })
            .collect()
    }

    /// Those of the endpoints that `client` may be sent to when it connects to `destination`, an address and port of the
    /// service.
    pub fn candidates(
        &self,
        service: &Service,
        destination: SocketAddr,
        client: Option<&Workload>,
    ) -> Vec<Candidate> {
        let rules = &service.load_balancer;
        let fit = self
            .endpoints(service, destination.port())
            .into_iter()
            .filter_map(|endpoint| {
                let weight = endpoint.workload.capacity.unwrap_or(1);
                let healthy = endpoint.workload.status == Health::Healthy
                    || rules.health_policy == HealthPolicy::AllowAll;
                let ip = usable_address(&endpoint.workload, service, destination, client)?;
                let address = SocketAddr::new(ip, endpoint.target_port);
                (healthy && weight > 0).then_some((endpoint, address, weight))
            });
        near_enough(fit.collect(), rules, client)
    }

    /// One endpoint for a connection of `client`, at random by weight. None where there is no fit one, and where the service
    /// leaves the address as it is ([`LoadBalancerMode::Passthrough`]).
    ///
    /// The caller looks at the workload's network: an address on another one is reached through its gateway.
    pub fn choose_endpoint(
        &self,
        service: &Service,
        destination: SocketAddr,
        client: Option<&Workload>,
        random: &mut impl FnMut() -> u64,
    ) -> Option<(Arc<Workload>, SocketAddr)> {
        let candidates = self.candidates(service, destination, client);
        let total: u64 = candidates
            .iter()
            .map(|(_, _, weight)| u64::from(*weight))
            .sum();
        // The bias of the remainder is below 2^-32 for any real sum of weights.
        let mut ticket = random().checked_rem(total)?;
        for (endpoint, address, weight) in candidates {
            match ticket.checked_sub(u64::from(weight)) {
                Some(rest) => ticket = rest,
                None => return Some((endpoint.workload, address)),
            }
        }
        None
    }

    /// The endpoint with this address and port, if `client` may be sent to it.
    pub fn endpoint_at(
        &self,
        service: &Service,
        destination: SocketAddr,
        client: Option<&Workload>,
        chosen: SocketAddr,
    ) -> Option<Arc<Workload>> {
        self.candidates(service, destination, client)
            .into_iter()
            .find(|(_, address, _)| *address == chosen)
            .map(|(endpoint, _, _)| endpoint.workload)
    }
}

/// A service port whose target is 0 is one that each endpoint maps itself.
fn target_port(workload: &Workload, service: &Service, service_port: u16) -> Option<u16> {
    let services_own = service.ports.target(service_port)?;
    let (_, own) = workload
        .services
        .iter()
        .find(|(name, _)| *name == service.id)?;
    let target = if own.is_empty() {
        services_own
    } else {
        own.target(service_port)?
    };
    let target = if target == 0 { services_own } else { target };
    (target != 0).then_some(target)
}

/// Of the addresses that the service allows, one of a family that the client has too, and of the family it connects to.
fn usable_address(
    workload: &Workload,
    service: &Service,
    destination: SocketAddr,
    client: Option<&Workload>,
) -> Option<IpAddr> {
    let shared = |ip: &IpAddr| {
        client.is_some_and(|client| {
            client
                .addresses
                .iter()
                .any(|other| other.is_ipv4() == ip.is_ipv4())
        })
    };
    let allowed = workload.addresses.iter().copied();
    allowed
        .filter(|ip| service.ip_families.allow(*ip))
        .min_by_key(|ip| (!shared(ip), ip.is_ipv4() != destination.is_ipv4()))
}

/// An endpoint that a client may be sent to, the address to use, and its weight, which is never 0.
pub type Candidate = (Endpoint, SocketAddr, u32);

/// Applies the routing preferences.
fn near_enough(
    mut candidates: Vec<Candidate>,
    rules: &LoadBalancer,
    client: Option<&Workload>,
) -> Vec<Candidate> {
    let rank = |(endpoint, _, _): &Candidate| {
        shared_scopes(&rules.routing_preferences, client, &endpoint.workload)
    };
    let required = match rules.mode {
        LoadBalancerMode::Standard => return candidates,
        LoadBalancerMode::Passthrough => return Vec::new(),
        LoadBalancerMode::Strict => rules.routing_preferences.len(),
        LoadBalancerMode::Failover => candidates.iter().map(rank).max().unwrap_or(0),
    };
    candidates.retain(|candidate| rank(candidate) >= required);
    candidates
}

/// How many of the preferences, from the first without a gap, client and endpoint share.
fn shared_scopes(
    preferences: &[LocalityScope],
    client: Option<&Workload>,
    endpoint: &Workload,
) -> usize {
    let Some(client) = client else { return 0 };
    preferences
        .iter()
        .take_while(|scope| scope.shared(client, endpoint))
        .count()
}

impl LocalityScope {
    fn shared(self, a: &Workload, b: &Workload) -> bool {
        let same = |x: &Arc<str>, y: &Arc<str>| !x.is_empty() && x == y;
        match self {
            // The network without a name is one too.
            Self::Network => a.network == b.network,
            Self::Region => same(&a.locality.region, &b.locality.region),
            Self::Zone => Self::Region.shared(a, b) && same(&a.locality.zone, &b.locality.zone),
            Self::Subzone => {
                Self::Zone.shared(a, b) && same(&a.locality.subzone, &b.locality.subzone)
            }
            Self::Node => same(&a.node, &b.node) && Self::Cluster.shared(a, b),
            Self::Cluster => a.cluster_id == b.cluster_id,
        }
    }
}
