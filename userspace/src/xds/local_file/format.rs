//! The layout of the mesh file and its way into the mesh's own types.
//!
//! Key names are the documented ones, unknown keys are refused: a misspelt `rules` must not become a policy without rules.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;

use super::super::annotations::Annotations;
use super::super::scalars::{Name, Pattern, Port, Principal, ServiceAccount, TargetPort, Text};
use crate::mesh::{
    self, GatewayDestination, Health, HealthPolicy, IpFamilies, LoadBalancerMode, LocalityScope,
    MeshResources, NetworkCidr, PortMap, ServiceName, ServiceNameError, TunnelProtocol,
    WeightedWaypoint, WorkloadSpec,
};
use crate::policy::{self, Authorization, PolicyName, PolicyNameError};

/// The whole file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Document {
    workloads: Option<Vec<Workload>>,
    services: Option<Vec<Service>>,
    policies: Option<Vec<Policy>>,
    namespaces: Option<Vec<Namespace>>,
}

/// Ours: the format that this one follows knows no annotations.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Namespace {
    name: Text<Name>,
    #[serde(default)]
    annotations: Annotations,
}

type Ports = BTreeMap<Text<Port>, Text<TargetPort>>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Workload {
    uid: String,
    name: String,
    namespace: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    trust_domain: String,
    #[serde(default)]
    workload_ips: Vec<Text<IpAddr>>,
    #[serde(default)]
    network: String,
    #[serde(default)]
    network_mode: NetworkMode,
    #[serde(default)]
    protocol: Protocol,
    #[serde(default)]
    node: String,
    #[serde(default)]
    hostname: String,
    waypoint: Option<Gateway>,
    network_gateway: Option<Gateway>,
    #[serde(default)]
    services: BTreeMap<Text<ServiceName>, Ports>,
    #[serde(default)]
    authorization_policies: Vec<Text<PolicyName>>,
    #[serde(default)]
    status: Status,
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    locality: Locality,
    capacity: Option<Text<u32>>,
    #[serde(default)]
    canonical_name: String,
    #[serde(default)]
    canonical_revision: String,
    #[serde(default)]
    workload_name: String,
    #[serde(default)]
    annotations: Annotations,
}

#[derive(Deserialize, Default)]
enum Protocol {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "HBONE")]
    Hbone,
}

#[derive(Deserialize, Default)]
enum NetworkMode {
    #[default]
    #[serde(alias = "STANDARD")]
    Standard,
    #[serde(alias = "HOST_NETWORK")]
    HostNetwork,
}

#[derive(Deserialize, Default)]
enum Status {
    #[default]
    #[serde(alias = "HEALTHY")]
    Healthy,
    #[serde(alias = "UNHEALTHY")]
    Unhealthy,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Locality {
    #[serde(default)]
    region: String,
    #[serde(default)]
    zone: String,
    #[serde(default)]
    subzone: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Gateway {
    destination: Text<GatewayDestination>,
    #[serde(default = "hbone_port")]
    hbone_mtls_port: Text<Port>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WeightedGateway {
    destination: Text<GatewayDestination>,
    #[serde(default = "hbone_port")]
    hbone_mtls_port: Text<Port>,
    weight: NonZeroU32,
}

fn hbone_port() -> Text<Port> {
    Text(Port(15008))
}

#[derive(Deserialize)]
#[serde(try_from = "ServiceKeys")]
struct Service(mesh::Service);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceKeys {
    name: Text<Name>,
    namespace: Text<Name>,
    hostname: Text<Name>,
    #[serde(default)]
    vips: Vec<Text<NetworkCidr>>,
    #[serde(default)]
    ports: Ports,
    #[serde(default)]
    subject_alt_names: Vec<String>,
    waypoint: Option<Gateway>,
    /// In place of the one.
    #[serde(default)]
    weighted_waypoints: Vec<WeightedGateway>,
    load_balancer: Option<LoadBalancer>,
    #[serde(default)]
    ip_families: Families,
    #[serde(default)]
    canonical: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LoadBalancer {
    #[serde(default)]
    routing_preferences: Vec<Preference>,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    health_policy: Fitness,
}

#[derive(Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Preference {
    #[serde(alias = "Network")]
    Network,
    #[serde(alias = "Region")]
    Region,
    #[serde(alias = "Zone")]
    Zone,
    #[serde(alias = "Subzone")]
    Subzone,
    #[serde(alias = "Node")]
    Node,
    #[serde(alias = "Cluster")]
    Cluster,
}

#[derive(Deserialize, Default)]
enum Mode {
    #[default]
    #[serde(alias = "STANDARD")]
    Standard,
    #[serde(alias = "STRICT")]
    Strict,
    #[serde(alias = "FAILOVER")]
    Failover,
    #[serde(alias = "PASSTHROUGH")]
    Passthrough,
}

#[derive(Deserialize, Default)]
enum Fitness {
    #[default]
    #[serde(alias = "ONLY_HEALTHY")]
    OnlyHealthy,
    #[serde(alias = "ALLOW_ALL")]
    AllowAll,
}

#[derive(Deserialize, Default)]
enum Families {
    #[default]
    #[serde(alias = "AUTOMATIC")]
    Automatic,
    #[serde(rename = "IPv4", alias = "IPV4_ONLY")]
    Ipv4,
    #[serde(rename = "IPv6", alias = "IPV6_ONLY")]
    Ipv6,
    #[serde(alias = "DUAL")]
    Dual,
}

#[derive(Deserialize)]
#[serde(try_from = "PolicyKeys")]
struct Policy(Authorization);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PolicyKeys {
    name: Text<Name>,
    namespace: Text<Name>,
    scope: Scope,
    action: Action,
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    rules: Vec<Vec<Vec<Match>>>,
}

#[derive(Deserialize)]
enum Scope {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Deserialize)]
enum Action {
    Allow,
    Deny,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Match {
    #[serde(default)]
    namespaces: Vec<Pattern>,
    #[serde(default)]
    not_namespaces: Vec<Pattern>,
    #[serde(default)]
    principals: Vec<Principal>,
    #[serde(default)]
    not_principals: Vec<Principal>,
    #[serde(default)]
    service_accounts: Vec<ServiceAccount>,
    #[serde(default)]
    not_service_accounts: Vec<ServiceAccount>,
    #[serde(default)]
    source_ips: Vec<Text<IpNet>>,
    #[serde(default)]
    not_source_ips: Vec<Text<IpNet>>,
    #[serde(default)]
    destination_ips: Vec<Text<IpNet>>,
    #[serde(default)]
    not_destination_ips: Vec<Text<IpNet>>,
    #[serde(default)]
    destination_ports: Vec<Text<Port>>,
    #[serde(default)]
    not_destination_ports: Vec<Text<Port>>,
}

impl Document {
    /// None if the file has none of the lists.
    pub fn into_resources(self) -> Option<MeshResources> {
        if self.workloads.is_none()
            && self.services.is_none()
            && self.policies.is_none()
            && self.namespaces.is_none()
        {
            return None;
        }
        let mut shared = Shared::default();
        Some(MeshResources {
            workloads: self
                .workloads
                .into_iter()
                .flatten()
                .map(|workload| workload.into_spec(&mut shared))
                .collect(),
            services: self
                .services
                .into_iter()
                .flatten()
                .map(|Service(service)| service)
                .collect(),
            policies: self
                .policies
                .into_iter()
                .flatten()
                .map(|Policy(policy)| policy)
                .collect(),
            namespaces: self
                .namespaces
                .into_iter()
                .flatten()
                .map(|namespace| mesh::Namespace {
                    name: shared.text(&namespace.name.0.0),
                    annotations: namespace.annotations.0,
                })
                .collect(),
        })
    }
}

/// Texts that many workloads repeat, each kept once.
#[derive(Default)]
struct Shared(HashSet<Arc<str>>);

impl Shared {
    fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        self.0.insert(new.clone());
        new
    }
}

impl Workload {
    fn into_spec(self, shared: &mut Shared) -> WorkloadSpec {
        let services = self
            .services
            .into_iter()
            .map(|(name, ports)| (name.0, port_map(ports)));
        WorkloadSpec {
            uid: self.uid.into(),
            name: self.name.into(),
            namespace: shared.text(&self.namespace),
            service_account: shared.text(&self.service_account),
            trust_domain: shared.text(&self.trust_domain),
            addresses: unwrapped(self.workload_ips),
            network: shared.text(&self.network),
            host_network: matches!(self.network_mode, NetworkMode::HostNetwork),
            protocol: match self.protocol {
                Protocol::Tcp => TunnelProtocol::Tcp,
                Protocol::Hbone => TunnelProtocol::Hbone,
            },
            node: shared.text(&self.node),
            hostname: shared.text(&self.hostname),
            waypoint: self.waypoint.map(Gateway::into_address),
            network_gateway: self.network_gateway.map(Gateway::into_address),
            services: services.collect(),
            authorization_policies: unwrapped(self.authorization_policies),
            status: match self.status {
                Status::Healthy => Health::Healthy,
                Status::Unhealthy => Health::Unhealthy,
            },
            cluster_id: shared.text(&self.cluster_id),
            locality: mesh::Locality {
                region: shared.text(&self.locality.region),
                zone: shared.text(&self.locality.zone),
                subzone: shared.text(&self.locality.subzone),
            },
            capacity: self.capacity.map(|Text(capacity)| capacity),
            canonical_name: shared.text(&self.canonical_name),
            canonical_revision: shared.text(&self.canonical_revision),
            workload_name: shared.text(&self.workload_name),
            annotations: self.annotations.0,
        }
    }
}

impl Gateway {
    fn into_address(self) -> mesh::GatewayAddress {
        let Text(Port(hbone_mtls_port)) = self.hbone_mtls_port;
        mesh::GatewayAddress {
            destination: self.destination.0,
            hbone_mtls_port,
        }
    }
}

impl WeightedGateway {
    fn into_waypoint(self) -> WeightedWaypoint {
        let gateway = Gateway {
            destination: self.destination,
            hbone_mtls_port: self.hbone_mtls_port,
        };
        WeightedWaypoint {
            gateway: gateway.into_address(),
            weight: self.weight,
        }
    }
}

impl TryFrom<ServiceKeys> for Service {
    type Error = ServiceNameError;

    fn try_from(keys: ServiceKeys) -> Result<Self, ServiceNameError> {
        let only = keys.waypoint.map(Gateway::into_address);
        let waypoints = match keys.weighted_waypoints {
            none if none.is_empty() => only.map(WeightedWaypoint::from).into_iter().collect(),
            weighted => weighted
                .into_iter()
                .map(WeightedGateway::into_waypoint)
                .collect(),
        };
        Ok(Self(mesh::Service {
            id: ServiceName::new(&keys.namespace.0.0, &keys.hostname.0.0)?,
            name: keys.name.0.0.into(),
            vips: unwrapped(keys.vips),
            ports: port_map(keys.ports),
            subject_alt_names: keys.subject_alt_names.into_iter().map(Into::into).collect(),
            waypoints,
            load_balancer: keys
                .load_balancer
                .map(LoadBalancer::into_rules)
                .unwrap_or_default(),
            ip_families: match keys.ip_families {
                Families::Automatic => IpFamilies::Automatic,
                Families::Ipv4 => IpFamilies::Ipv4Only,
                Families::Ipv6 => IpFamilies::Ipv6Only,
                Families::Dual => IpFamilies::Dual,
            },
            canonical: keys.canonical,
        }))
    }
}

impl LoadBalancer {
    fn into_rules(self) -> mesh::LoadBalancer {
        let scope = |preference| match preference {
            Preference::Network => LocalityScope::Network,
            Preference::Region => LocalityScope::Region,
            Preference::Zone => LocalityScope::Zone,
            Preference::Subzone => LocalityScope::Subzone,
            Preference::Node => LocalityScope::Node,
            Preference::Cluster => LocalityScope::Cluster,
        };
        mesh::LoadBalancer {
            routing_preferences: self.routing_preferences.into_iter().map(scope).collect(),
            mode: match self.mode {
                Mode::Standard => LoadBalancerMode::Standard,
                Mode::Strict => LoadBalancerMode::Strict,
                Mode::Failover => LoadBalancerMode::Failover,
                Mode::Passthrough => LoadBalancerMode::Passthrough,
            },
            health_policy: match self.health_policy {
                Fitness::OnlyHealthy => HealthPolicy::OnlyHealthy,
                Fitness::AllowAll => HealthPolicy::AllowAll,
            },
        }
    }
}

impl TryFrom<PolicyKeys> for Policy {
    type Error = PolicyNameError;

    fn try_from(keys: PolicyKeys) -> Result<Self, PolicyNameError> {
        Ok(Self(Authorization {
            name: PolicyName::new(&keys.namespace.0.0, &keys.name.0.0)?,
            scope: match keys.scope {
                Scope::Global => policy::Scope::Global,
                Scope::Namespace => policy::Scope::Namespace,
                Scope::WorkloadSelector => policy::Scope::WorkloadSelector,
            },
            action: match keys.action {
                Action::Allow => policy::Action::Allow,
                Action::Deny => policy::Action::Deny,
            },
            dry_run: keys.dry_run,
            rules: keys.rules.into_iter().map(rule).collect(),
        }))
    }
}

fn rule(clauses: Vec<Vec<Match>>) -> policy::Rule {
    let clause = |matches: Vec<Match>| policy::Clause {
        matches: matches.into_iter().map(Match::into_match).collect(),
    };
    policy::Rule {
        clauses: clauses.into_iter().map(clause).collect(),
    }
}

impl Match {
    fn into_match(self) -> policy::Match {
        let patterns = |list: Vec<Pattern>| list.into_iter().map(|Pattern(one)| one).collect();
        let principals =
            |list: Vec<Principal>| list.into_iter().map(|Principal(one)| one).collect();
        let accounts =
            |list: Vec<ServiceAccount>| list.into_iter().map(|ServiceAccount(one)| one).collect();
        let ports = |list: Vec<Text<Port>>| list.into_iter().map(|Text(Port(port))| port).collect();
        policy::Match {
            namespaces: patterns(self.namespaces),
            not_namespaces: patterns(self.not_namespaces),
            principals: principals(self.principals),
            not_principals: principals(self.not_principals),
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            source_ips: unwrapped(self.source_ips),
            not_source_ips: unwrapped(self.not_source_ips),
            destination_ips: unwrapped(self.destination_ips),
            not_destination_ips: unwrapped(self.not_destination_ips),
            destination_ports: ports(self.destination_ports),
            not_destination_ports: ports(self.not_destination_ports),
        }
    }
}

fn unwrapped<T>(texts: Vec<Text<T>>) -> Vec<T> {
    texts.into_iter().map(|Text(value)| value).collect()
}

fn port_map(ports: Ports) -> PortMap {
    ports
        .into_iter()
        .map(|(Text(Port(service)), Text(TargetPort(target)))| (service, target))
        .collect()
}
