//! The faults of xDS that are in what is sent: in resources, which then have other versions, so that clients are told as of any change; and in
//! responses. Pure. Called by `publish` and `xds`.

use bytes::Bytes;
use prost::Message as _;

use super::behaviour::XdsFault;
use super::snapshot::{Entry, Kind, Snapshot};
use crate::wire::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use crate::wire::istio::security::{self, Authorization};
use crate::wire::istio::workload::{self, Address, address::Type};

const WRONG_TYPE: &str = "type.googleapis.com/istio.workload.Elsewhere";
const WRONG_VERSION: &str = "0";
/// What a second workload is called.
const DOUBLE: &str = "-double";
/// A field 1 of nearly 4 GiB, of which there is one byte.
const ABSURD_LENGTH: &[u8] = &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f, b'x'];
/// Begins with a tag that no message can have.
const GARBAGE: &[u8] = &[0xff; 64];
const UNKNOWN: i32 = 99;
const SEVENTEEN_BYTES: &[u8] = &[10; 17];

/// Commits the faults in a snapshot. Returns the names that it does not have, or not of a fitting type.
pub fn snapshot<'a>(snapshot: &mut Snapshot, faults: &'a [XdsFault]) -> Vec<&'a str> {
    let mut missing = Vec::new();
    for fault in faults {
        let Some((name, distortion)) = of_resource(fault) else {
            continue;
        };
        let found = [Kind::Address, Kind::Authorization]
            .into_iter()
            .find_map(|kind| Some((kind, snapshot.resources(kind).entry(name)?)));
        let distorted = found.and_then(|(kind, entry)| Some((kind, distortion(kind, entry)?)));
        let Some((kind, entry)) = distorted else {
            missing.push(name);
            continue;
        };
        let resources = snapshot.resources_mut(kind);
        match fault {
            XdsFault::SharedAddress(_) => resources.insert(&format!("{name}{DOUBLE}"), entry),
            _ => resources.insert(name, entry),
        }
    }
    missing
}

/// Commits the faults in a response.
pub fn response(response: &mut DeltaDiscoveryResponse, faults: &[XdsFault]) {
    if faults.contains(&XdsFault::WrongResponseType) {
        response.type_url = WRONG_TYPE.to_owned();
    }
    if faults.contains(&XdsFault::WrongVersion) {
        for encoded in &mut response.resources {
            if let Ok(mut resource) = Resource::decode(encoded.clone()) {
                resource.version = WRONG_VERSION.to_owned();
                *encoded = resource.encode_to_vec().into();
            }
        }
    }
}

/// Makes another resource of one, if it is of a fitting type.
type Distortion = fn(Kind, &Entry) -> Option<Entry>;

/// The name of the resource that is affected, and how.
fn of_resource(fault: &XdsFault) -> Option<(&str, Distortion)> {
    match fault {
        XdsFault::Garbage(name) => Some((name, |kind, entry| with(kind, entry, GARBAGE))),
        XdsFault::AbsurdLength(name) => {
            Some((name, |kind, entry| with(kind, entry, ABSURD_LENGTH)))
        }
        XdsFault::AbsurdValues(name) => Some((name, absurd_values)),
        XdsFault::UnknownEnum(name) => Some((name, unknown_enum)),
        XdsFault::WrongType(name) => Some((name, wrong_type)),
        XdsFault::SharedAddress(name) => Some((name, double)),
        XdsFault::Stall
        | XdsFault::ResetAfter(_)
        | XdsFault::DelayMs(_)
        | XdsFault::WrongResponseType
        | XdsFault::WrongVersion => None,
    }
}

/// The resource with another encoding.
fn with(kind: Kind, entry: &Entry, value: impl AsRef<[u8]>) -> Option<Entry> {
    let value = Bytes::copy_from_slice(value.as_ref());
    Some(Entry::new(kind, value, entry.aliases.clone()))
}

fn wrong_type(kind: Kind, entry: &Entry) -> Option<Entry> {
    let mut wrong = with(kind, entry, &entry.value)?;
    wrong.type_url = WRONG_TYPE.to_owned();
    // The encoding is the same, and yet the client is to be told.
    wrong.version.push_str("-elsewhere");
    Some(wrong)
}

fn absurd_values(kind: Kind, entry: &Entry) -> Option<Entry> {
    let port = workload::Port {
        service_port: u32::MAX,
        target_port: 65536,
        app_protocol: 0,
    };
    let bytes = match kind {
        Kind::Address => {
            let mut address = Address::decode(entry.value.clone()).ok()?;
            match address.r#type.as_mut()? {
                Type::Workload(workload) => {
                    workload.addresses = vec![Bytes::from_static(SEVENTEEN_BYTES)];
                    let ports = workload::PortList { ports: vec![port] };
                    workload.services.insert("no-slash".to_owned(), ports);
                }
                Type::Service(service) => {
                    service.ports = vec![port];
                    for address in &mut service.addresses {
                        address.length = Some(u32::MAX);
                    }
                }
            }
            address.encode_to_vec()
        }
        Kind::Authorization => {
            let mut policy = Authorization::decode(entry.value.clone()).ok()?;
            let absurd = security::Match {
                source_ips: vec![security::Address {
                    address: Bytes::from_static(&[10, 0, 0, 0]),
                    length: u32::MAX,
                }],
                destination_ports: vec![65536],
                ..security::Match::default()
            };
            policy.rules.push(security::Rule {
                clauses: vec![security::Clause {
                    matches: vec![absurd],
                }],
            });
            policy.encode_to_vec()
        }
    };
    with(kind, entry, bytes)
}

fn unknown_enum(kind: Kind, entry: &Entry) -> Option<Entry> {
    let bytes = match kind {
        Kind::Address => {
            let mut address = Address::decode(entry.value.clone()).ok()?;
            match address.r#type.as_mut()? {
                Type::Workload(workload) => workload.tunnel_protocol = UNKNOWN,
                Type::Service(service) => service.ip_families = UNKNOWN,
            }
            address.encode_to_vec()
        }
        Kind::Authorization => {
            let mut policy = Authorization::decode(entry.value.clone()).ok()?;
            policy.action = UNKNOWN;
            policy.encode_to_vec()
        }
    };
    with(kind, entry, bytes)
}

/// The same workload under another uid.
fn double(kind: Kind, entry: &Entry) -> Option<Entry> {
    let mut address = Address::decode(entry.value.clone()).ok()?;
    let Type::Workload(workload) = address.r#type.as_mut()? else {
        return None;
    };
    workload.uid.push_str(DOUBLE);
    with(kind, entry, address.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{Mesh, MeshDefaults, MeshResources, WorkloadSpec};
    use crate::policy::{Action, PolicyName, Scope};

    fn good() -> Snapshot {
        let workload = WorkloadSpec {
            uid: "web".into(),
            namespace: "shop".into(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            ..WorkloadSpec::default()
        };
        let policy = crate::policy::Authorization {
            name: PolicyName::new("shop", "deny").unwrap(),
            scope: Scope::Namespace,
            action: Action::Deny,
            dry_run: false,
            rules: Vec::new(),
        };
        let resources = MeshResources {
            workloads: vec![workload],
            policies: vec![policy],
            ..MeshResources::default()
        };
        Snapshot::of(
            &Mesh::build(resources, &MeshDefaults::default()).unwrap(),
            1,
        )
    }

    fn distorted(fault: XdsFault) -> Snapshot {
        let mut snapshot = good();
        assert!(super::snapshot(&mut snapshot, &[fault]).is_empty());
        snapshot
    }

    #[test]
    fn a_distorted_resource_has_another_version_and_cannot_be_read_or_believed() {
        let web = "web".to_owned();
        let good = good();
        let whole = good.resources(Kind::Address).entry("web").unwrap();
        for fault in [
            XdsFault::Garbage(web.clone()),
            XdsFault::AbsurdLength(web.clone()),
            XdsFault::AbsurdValues(web.clone()),
            XdsFault::UnknownEnum(web.clone()),
            XdsFault::WrongType(web.clone()),
        ] {
            let unreadable = matches!(fault, XdsFault::Garbage(_) | XdsFault::AbsurdLength(_));
            let distorted = distorted(fault.clone());
            let entry = distorted.resources(Kind::Address).entry("web").unwrap();
            assert_ne!(entry.version, whole.version, "{fault:?}");
            let read = Address::decode(entry.value.clone());
            assert_eq!(read.is_err(), unreadable, "{fault:?}");
        }
        let policy = "shop/deny".to_owned();
        for fault in [
            XdsFault::AbsurdValues(policy.clone()),
            XdsFault::UnknownEnum(policy),
        ] {
            let distorted = distorted(fault);
            let entry = distorted.resources(Kind::Authorization).entry("shop/deny");
            assert_ne!(
                entry,
                good.resources(Kind::Authorization).entry("shop/deny")
            );
        }
    }

    #[test]
    fn an_address_can_be_shared() {
        let distorted = distorted(XdsFault::SharedAddress("web".to_owned()));
        let meant = distorted.resources(Kind::Address).meant("/10.0.0.1");
        let names: Vec<_> = meant.map(|(name, _)| name.to_string()).collect();
        assert_eq!(names, ["web", "web-double"]);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let faults = [
            XdsFault::Stall,
            XdsFault::Garbage("nobody".to_owned()),
            XdsFault::SharedAddress("shop/deny".to_owned()),
        ];
        assert_eq!(
            super::snapshot(&mut good(), &faults),
            ["nobody", "shop/deny"]
        );
    }
}
