//! What ztunnel makes of values that this agent refuses: the message that it would have read, which then is decoded as strictly as any.
//!
//! Facts about ztunnel are those of its public sources in 2026. What it refuses as well stays as it is and is refused: an unknown value of any
//! enumeration but a service's visibility, an address of a workload, service or gateway that is none, a name without its namespace. Called by
//! `feed` for each resource where the operator asked for it (`CULVERT_LENIENT`).

use super::policies;
use crate::wire::istio::{security, workload as wire};

/// How many values of a resource were changed or left out.
type Changes = usize;

/// Ports are what their lowest 16 bits say.
pub fn workload(message: &mut wire::Workload) -> Changes {
    let gateways = message.waypoint.iter_mut();
    let gateways = gateways.chain(&mut message.network_gateway).map(gateway);
    let services = message.services.values_mut();
    let services = services.map(|list| ports(&mut list.ports));
    gateways.sum::<Changes>() + services.sum::<Changes>()
}

/// Ports are what their lowest 16 bits say; an address with an impossible prefix stands for itself alone; who may see it is not looked at.
pub fn service(message: &mut wire::Service) -> Changes {
    let mut changes = ports(&mut message.ports);
    let weighted = message.weighted_waypoints.iter_mut();
    let weighted = weighted.filter_map(|one| one.destination.as_mut());
    let gateways = message.waypoint.iter_mut().chain(weighted).map(gateway);
    changes += gateways.sum::<Changes>();
    for address in &mut message.addresses {
        let bits = address.address.len().saturating_mul(8);
        let fits = |length: u32| usize::try_from(length).is_ok_and(|length| length <= bits);
        if address.length.is_some_and(|length| !fits(length)) {
            address.length = None;
            changes += 1;
        }
    }
    if wire::Visibility::try_from(message.visibility).is_err() {
        message.visibility = wire::Visibility::default().into();
        changes += 1;
    }
    changes
}

/// Ports are what their lowest 16 bits say, and prefixes what their lowest 8 do. What cannot be read even so is left out, and its field
/// says nothing if nothing else is in it: the match then covers more than it was meant to, or, if it says nothing at all, nothing.
pub fn policy(message: &mut security::Authorization) -> Changes {
    let clauses = message.rules.iter_mut().flat_map(|rule| &mut rule.clauses);
    let matches = clauses.flat_map(|clause| &mut clause.matches);
    matches.map(one_match).sum()
}

fn one_match(message: &mut security::Match) -> Changes {
    let nets = [
        &mut message.source_ips,
        &mut message.not_source_ips,
        &mut message.destination_ips,
        &mut message.not_destination_ips,
    ];
    let ports = [
        &mut message.destination_ports,
        &mut message.not_destination_ports,
    ];
    let texts = [
        &mut message.namespaces,
        &mut message.not_namespaces,
        &mut message.principals,
        &mut message.not_principals,
    ];
    let nets = nets.into_iter().map(readable_nets);
    let ports = ports.into_iter().flatten().map(port);
    let texts = texts
        .into_iter()
        .map(|list| readable(list, |text| text.match_type.is_some()));
    nets.sum::<Changes>() + ports.sum::<Changes>() + texts.sum::<Changes>()
}

fn readable_nets(list: &mut Vec<security::Address>) -> Changes {
    let mut changes = 0;
    for net in &mut *list {
        changes += wrap(&mut net.length, u8::MAX.into());
    }
    changes + readable(list, |net| policies::net("address", net).is_ok())
}

fn readable<T>(list: &mut Vec<T>, is_readable: impl Fn(&T) -> bool) -> Changes {
    let before = list.len();
    list.retain(is_readable);
    before - list.len()
}

fn gateway(message: &mut wire::GatewayAddress) -> Changes {
    port(&mut message.hbone_mtls_port)
}

fn ports(list: &mut [wire::Port]) -> Changes {
    let of = |entry: &mut wire::Port| port(&mut entry.service_port) + port(&mut entry.target_port);
    list.iter_mut().map(of).sum()
}

fn port(value: &mut u32) -> Changes {
    wrap(value, u16::MAX.into())
}

/// Leaves what `mask` leaves of it.
fn wrap(value: &mut u32, mask: u32) -> Changes {
    let before = *value;
    *value &= mask;
    usize::from(*value != before)
}

#[cfg(test)]
mod tests {
    use super::super::{ResourceError, Shared};
    use super::*;

    fn net(address: &[u8], length: u32) -> security::Address {
        security::Address {
            address: address.to_vec().into(),
            length,
        }
    }

    fn of_match(one: security::Match) -> security::Authorization {
        let clause = security::Clause { matches: vec![one] };
        security::Authorization {
            name: "p".to_owned(),
            namespace: "ns".to_owned(),
            rules: vec![security::Rule {
                clauses: vec![clause],
            }],
            ..security::Authorization::default()
        }
    }

    #[test]
    fn of_a_match_only_what_cannot_be_read_is_left_out() {
        let principal = security::StringMatch {
            match_type: Some(security::string_match::MatchType::Exact("a".to_owned())),
        };
        let mut message = of_match(security::Match {
            source_ips: vec![
                net(&[10, 0, 0, 1], 33),
                net(&[10, 0, 0, 0], 8),
                net(&[10], 8),
            ],
            not_destination_ips: vec![net(&[10, 0, 0, 0], 256 + 16)],
            destination_ports: vec![80, 65_536 + 443],
            principals: vec![security::StringMatch::default(), principal],
            ..security::Match::default()
        });
        assert!(policies::policy(message.clone()).is_err());
        assert_eq!(policy(&mut message), 5);
        let read = policies::policy(message).unwrap();
        let one = &read.rules[0].clauses[0].matches[0];
        assert_eq!(one.source_ips, ["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(one.not_destination_ips, ["10.0.0.0/16".parse().unwrap()]);
        assert_eq!(one.destination_ports, [80, 443]);
        assert_eq!(one.principals.len(), 1);
    }

    #[test]
    fn what_ztunnel_refuses_is_refused() {
        let mut message = of_match(security::Match::default());
        message.action = 7;
        assert_eq!(policy(&mut message), 0);
        let refused = ResourceError::Unknown {
            field: "action",
            value: 7,
        };
        assert_eq!(policies::policy(message), Err(refused));
        let mut message = wire::Workload {
            uid: "w".to_owned(),
            addresses: vec![vec![10].into()],
            ..wire::Workload::default()
        };
        assert_eq!(workload(&mut message), 0);
        let refused = super::super::workload(message, &mut Shared::default());
        assert!(matches!(refused, Err(ResourceError::Address { .. })));
    }

    #[test]
    fn ports_prefixes_and_visibility_of_a_service_are_no_reason_to_refuse_it() {
        let mut message = wire::Service {
            namespace: "ns".to_owned(),
            hostname: "h".to_owned(),
            visibility: 9,
            ports: vec![wire::Port {
                service_port: 80,
                target_port: 65_536 + 8080,
                ..wire::Port::default()
            }],
            addresses: vec![wire::NetworkAddress {
                address: vec![10, 96, 0, 1].into(),
                length: Some(33),
                ..wire::NetworkAddress::default()
            }],
            ..wire::Service::default()
        };
        assert!(super::super::service(message.clone(), &mut Shared::default()).is_err());
        assert_eq!(service(&mut message), 3);
        let read = super::super::service(message, &mut Shared::default()).unwrap();
        assert_eq!(read.ports.target(80), Some(8080));
        let net = read.vips.first().map(|vip| vip.net.to_string());
        assert_eq!(net.as_deref(), Some("10.96.0.1/32"));
    }
}
