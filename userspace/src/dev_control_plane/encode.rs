//! From the mesh's own types to the messages of `wire`: the way back of what a client of xDS does. Called by `snapshot`.
//!
//! Culvert's own annotations have no place in Istio's messages and are left out.

use std::net::IpAddr;

use bytes::Bytes;
use ipnet::IpNet;

#[cfg(test)]
mod tests;

use crate::mesh::{
    self, GatewayDestination, Health, HealthPolicy, IpFamilies, LoadBalancer, LoadBalancerMode,
    LocalityScope, NetworkCidr, PortMap, TunnelProtocol, WeightedWaypoint, Workload,
};
use crate::policy::{self, Authorization};
use crate::wire::istio::security;
use crate::wire::istio::workload::{
    self as wire, address::Type, gateway_address::Destination, load_balancing,
};

/// The resource of a workload.
pub fn workload(spec: &Workload) -> wire::Address {
    let services = spec
        .services
        .iter()
        .map(|(name, ports)| (name.as_str().to_owned(), port_list(ports)));
    let tunnel = match spec.protocol {
        TunnelProtocol::Tcp => wire::TunnelProtocol::None,
        TunnelProtocol::Hbone => wire::TunnelProtocol::Hbone,
    };
    let status = match spec.status {
        Health::Healthy => wire::WorkloadStatus::Healthy,
        Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
    };
    let network_mode = match spec.host_network {
        false => wire::NetworkMode::Standard,
        true => wire::NetworkMode::HostNetwork,
    };
    let workload = wire::Workload {
        uid: spec.uid.to_string(),
        name: spec.name.to_string(),
        namespace: spec.namespace.to_string(),
        addresses: spec.addresses.iter().map(|ip| octets(*ip)).collect(),
        hostname: spec.hostname.to_string(),
        network: spec.network.to_string(),
        tunnel_protocol: tunnel.into(),
        trust_domain: spec.trust_domain.to_string(),
        service_account: spec.service_account.to_string(),
        waypoint: spec.waypoint.as_ref().map(gateway),
        network_gateway: spec.network_gateway.as_ref().map(gateway),
        node: spec.node.to_string(),
        canonical_name: spec.canonical_name.to_string(),
        canonical_revision: spec.canonical_revision.to_string(),
        workload_type: wire::WorkloadType::Pod.into(),
        workload_name: spec.workload_name.to_string(),
        native_tunnel: false,
        application_tunnel: None,
        services: services.collect(),
        authorization_policies: spec
            .authorization_policies
            .iter()
            .map(ToString::to_string)
            .collect(),
        status: status.into(),
        cluster_id: spec.cluster_id.to_string(),
        locality: locality(&spec.locality),
        network_mode: network_mode.into(),
        capacity: spec.capacity,
    };
    wire::Address {
        r#type: Some(Type::Workload(workload)),
    }
}

/// The resource of a service.
pub fn service(service: &mesh::Service) -> wire::Address {
    let ip_families = match service.ip_families {
        IpFamilies::Automatic => wire::IpFamilies::Automatic,
        IpFamilies::Ipv4Only => wire::IpFamilies::Ipv4Only,
        IpFamilies::Ipv6Only => wire::IpFamilies::Ipv6Only,
        IpFamilies::Dual => wire::IpFamilies::Dual,
    };
    // One alone needs no weight, and clients that know of none read it.
    let (waypoint, weighted_waypoints) = match &*service.waypoints {
        [] => (None, Vec::new()),
        [only] => (Some(gateway(&only.gateway)), Vec::new()),
        several => (None, several.iter().map(weighted).collect()),
    };
    let service = wire::Service {
        name: service.name.to_string(),
        namespace: service.namespace().to_owned(),
        hostname: service.hostname().to_owned(),
        addresses: service.vips.iter().map(range).collect(),
        ports: port_list(&service.ports).ports,
        subject_alt_names: service
            .subject_alt_names
            .iter()
            .map(ToString::to_string)
            .collect(),
        waypoint,
        load_balancing: load_balancing(&service.load_balancer),
        ip_families: ip_families.into(),
        canonical: service.canonical,
        weighted_waypoints,
        visibility: wire::Visibility::Public.into(),
    };
    wire::Address {
        r#type: Some(Type::Service(service)),
    }
}

/// The resource of a policy.
pub fn authorization(policy: &Authorization) -> security::Authorization {
    let scope = match policy.scope {
        policy::Scope::Global => security::Scope::Global,
        policy::Scope::Namespace => security::Scope::Namespace,
        policy::Scope::WorkloadSelector => security::Scope::WorkloadSelector,
    };
    let action = match policy.action {
        policy::Action::Allow => security::Action::Allow,
        policy::Action::Deny => security::Action::Deny,
    };
    security::Authorization {
        name: policy.name.name().to_owned(),
        namespace: policy.name.namespace().to_owned(),
        scope: scope.into(),
        action: action.into(),
        rules: policy.rules.iter().map(rule).collect(),
        dry_run: policy.dry_run,
    }
}

/// An address as the messages have it: 4 or 16 bytes in network order.
pub fn octets(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}

fn port_list(ports: &PortMap) -> wire::PortList {
    let port = |(service_port, target_port): (u16, u16)| wire::Port {
        service_port: service_port.into(),
        target_port: target_port.into(),
        app_protocol: 0,
    };
    wire::PortList {
        ports: ports.iter().map(port).collect(),
    }
}

fn weighted(waypoint: &WeightedWaypoint) -> wire::WeightedWaypoint {
    wire::WeightedWaypoint {
        destination: Some(gateway(&waypoint.gateway)),
        weight: waypoint.weight.get(),
    }
}

fn gateway(gateway: &mesh::GatewayAddress) -> wire::GatewayAddress {
    let destination = match &gateway.destination {
        GatewayDestination::Service(name) => Destination::Hostname(wire::NamespacedHostname {
            namespace: name.namespace().to_owned(),
            hostname: name.hostname().to_owned(),
        }),
        GatewayDestination::Address(address) => Destination::Address(wire::NetworkAddress {
            network: address.network.to_string(),
            address: octets(address.ip),
            length: None,
        }),
    };
    wire::GatewayAddress {
        hbone_mtls_port: gateway.hbone_mtls_port.into(),
        destination: Some(destination),
    }
}

fn locality(locality: &mesh::Locality) -> Option<wire::Locality> {
    (*locality != mesh::Locality::default()).then(|| wire::Locality {
        region: locality.region.to_string(),
        zone: locality.zone.to_string(),
        subzone: locality.subzone.to_string(),
    })
}

fn range(range: &NetworkCidr) -> wire::NetworkAddress {
    let length = match range.single() {
        Some(_) => None,
        None => Some(range.net.prefix_len().into()),
    };
    wire::NetworkAddress {
        network: range.network.to_string(),
        address: octets(range.net.addr()),
        length,
    }
}

fn load_balancing(rules: &LoadBalancer) -> Option<wire::LoadBalancing> {
    let scope = |scope: &LocalityScope| -> i32 {
        let scope = match scope {
            LocalityScope::Network => load_balancing::Scope::Network,
            LocalityScope::Region => load_balancing::Scope::Region,
            LocalityScope::Zone => load_balancing::Scope::Zone,
            LocalityScope::Subzone => load_balancing::Scope::Subzone,
            LocalityScope::Node => load_balancing::Scope::Node,
            LocalityScope::Cluster => load_balancing::Scope::Cluster,
        };
        scope.into()
    };
    let mode = match rules.mode {
        LoadBalancerMode::Standard => load_balancing::Mode::UnspecifiedMode,
        LoadBalancerMode::Strict => load_balancing::Mode::Strict,
        LoadBalancerMode::Failover => load_balancing::Mode::Failover,
        LoadBalancerMode::Passthrough => load_balancing::Mode::Passthrough,
    };
    let health_policy = match rules.health_policy {
        HealthPolicy::OnlyHealthy => load_balancing::HealthPolicy::OnlyHealthy,
        HealthPolicy::AllowAll => load_balancing::HealthPolicy::AllowAll,
    };
    (*rules != LoadBalancer::default()).then(|| wire::LoadBalancing {
        routing_preference: rules.routing_preferences.iter().map(scope).collect(),
        mode: mode.into(),
        health_policy: health_policy.into(),
    })
}

fn rule(rule: &policy::Rule) -> security::Rule {
    let clause = |clause: &policy::Clause| security::Clause {
        matches: clause.matches.iter().map(conditions).collect(),
    };
    security::Rule {
        clauses: rule.clauses.iter().map(clause).collect(),
    }
}

fn conditions(conditions: &policy::Match) -> security::Match {
    let texts = |list: &[policy::StringMatch]| list.iter().map(text).collect();
    let nets = |list: &[IpNet]| list.iter().map(net).collect();
    let ports = |list: &[u16]| list.iter().map(|port| u32::from(*port)).collect();
    let accounts =
        |list: &[policy::ServiceAccountMatch]| list.iter().map(service_account).collect();
    security::Match {
        namespaces: texts(&conditions.namespaces),
        not_namespaces: texts(&conditions.not_namespaces),
        principals: texts(&conditions.principals),
        not_principals: texts(&conditions.not_principals),
        source_ips: nets(&conditions.source_ips),
        not_source_ips: nets(&conditions.not_source_ips),
        destination_ips: nets(&conditions.destination_ips),
        not_destination_ips: nets(&conditions.not_destination_ips),
        destination_ports: ports(&conditions.destination_ports),
        not_destination_ports: ports(&conditions.not_destination_ports),
        service_accounts: accounts(&conditions.service_accounts),
        not_service_accounts: accounts(&conditions.not_service_accounts),
    }
}

fn text(text: &policy::StringMatch) -> security::StringMatch {
    use security::string_match::MatchType;
    let kind = match text {
        policy::StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
        policy::StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
        policy::StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
        policy::StringMatch::Presence => MatchType::Presence(()),
    };
    security::StringMatch {
        match_type: Some(kind),
    }
}

fn net(net: &IpNet) -> security::Address {
    security::Address {
        address: octets(net.addr()),
        length: net.prefix_len().into(),
    }
}

fn service_account(account: &policy::ServiceAccountMatch) -> security::ServiceAccountMatch {
    security::ServiceAccountMatch {
        namespace: account.namespace.to_string(),
        service_account: account.service_account.to_string(),
    }
}
