//! A large mesh as a control plane would send it: pods of 1,000 deployments in 100 namespaces, on 500 nodes.

use std::net::IpAddr;

use bytes::Bytes;
use culvert::wire::envoy::service::discovery::v3::{Content, Resource};
use culvert::wire::istio::workload::{Address, Locality, Port, PortList, Workload, address::Type};
use culvert_harness::{Pod, Workload as Described};
use prost::Message as _;

use super::server::ADDRESS;

/// The namespace of the pods that exist.
pub const TRAFFIC: &str = "traffic";

const NAMESPACES: u32 = 100;
const DEPLOYMENTS: u32 = 1_000;
const NODES: u32 = 500;

/// Workload `number`, as it is after so many changes.
pub fn workload(number: u32, changes: u32) -> Bytes {
    let deployment = number % DEPLOYMENTS;
    let namespace = format!("namespace-{}", deployment % NAMESPACES);
    let name = format!("deployment-{deployment}");
    let pod = format!("{name}-5d8f7c9b6-{number}");
    let uid = format!("Kubernetes//Pod/{namespace}/{pod}");
    let [_, a, b, c] = number.to_be_bytes();
    let service = format!("{namespace}/{name}.{namespace}.svc.cluster.local");
    let ports = PortList {
        ports: vec![Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
    };
    let workload = Workload {
        uid,
        name: pod,
        namespace: namespace.clone(),
        addresses: vec![vec![10, 128 | a, b, c].into()],
        tunnel_protocol: 1,
        trust_domain: "cluster.local".to_owned(),
        service_account: name.clone(),
        node: format!("node-{}", number % NODES),
        canonical_name: name.clone(),
        canonical_revision: "v1".to_owned(),
        workload_name: name,
        cluster_id: "Kubernetes".to_owned(),
        locality: Some(Locality {
            region: "region".to_owned(),
            zone: format!("zone-{}", number % 3),
            subzone: String::new(),
        }),
        services: [(service, ports)].into(),
        // What an operator sees change most: whether it is healthy.
        status: i32::try_from(changes % 2).unwrap_or(0),
        ..Workload::default()
    };
    resource(workload, changes)
}

/// A pod that exists, as it always is.
pub fn of_pod(pod: &Pod) -> Bytes {
    let IpAddr::V4(address) = pod.address() else {
        unreachable!("pods of the harness have IPv4 addresses first");
    };
    let described = Described::of_pod(pod, TRAFFIC, pod.name());
    let workload = Workload {
        uid: described.uid,
        name: described.name,
        namespace: described.namespace,
        addresses: vec![address.octets().to_vec().into()],
        tunnel_protocol: 1,
        trust_domain: "cluster.local".to_owned(),
        service_account: described.service_account,
        node: described.node,
        ..Workload::default()
    };
    resource(workload, 0)
}

/// A resource, encoded.
fn resource(workload: Workload, changes: u32) -> Bytes {
    let name = workload.uid.clone();
    let address = Address {
        r#type: Some(Type::Workload(workload)),
    };
    let resource = Resource {
        name,
        version: changes.to_string(),
        resource: Some(Content {
            type_url: ADDRESS.to_owned(),
            value: address.encode_to_vec().into(),
        }),
        ..Resource::default()
    };
    resource.encode_to_vec().into()
}
