//! Which addresses a pod is enrolled with: those that its namespace has and that the mesh, or the pod's earlier enrolment, names.
//!
//! Invariant: an address that only the pod itself claims to have counts for nothing once somebody else has said which are the
//! pod's, or that it is another's. Called by `setup`, and by the enforcer whenever the mesh changes ([`belongs_to_another`]).

use std::net::{IpAddr, Ipv6Addr};

use nix::{ifaddrs::InterfaceAddress, net::if_::InterfaceFlags};

use super::{EnrolError, KnownPod, PodSpec};
use crate::{
    kernel::{Netns, PodAddress},
    mesh::{Mesh, Workload},
};

/// Addresses of one pod; more are left out, so that a pod cannot fill the kernel part's tables.
const MOST_ADDRESSES: usize = 16;

/// A pod's addresses, the primary one first. Never empty.
pub(super) fn of_pod(
    spec: &PodSpec,
    netns: &Netns,
    mesh: &Mesh,
    before: Option<&KnownPod>,
) -> Result<Vec<PodAddress>, EnrolError> {
    let found = netns.run(found).unwrap_or_default();
    let named = spec
        .workload(mesh)
        .map(|workload| &*workload.addresses)
        .filter(|addresses| !addresses.is_empty());
    let expected = before.map(|before| before.ips.as_slice()).or(named);
    let place = || spec.netns.to_string();
    if found.is_empty() {
        return Err(EnrolError::NoAddress {
            uid: spec.uid.clone(),
            netns: place(),
        });
    }
    let chosen = choose(&found, expected);
    if chosen.is_empty() {
        return Err(EnrolError::OtherAddress {
            uid: spec.uid.clone(),
            netns: place(),
            found: list(found.iter().map(|address| address.ip)),
            expected: list(expected.unwrap_or_default()),
        });
    }
    Ok(chosen)
}

/// All that a pod may turn out to be enrolled with, if nobody names any.
pub(super) fn all(netns: &Netns) -> Vec<IpAddr> {
    let found = netns.run(found).unwrap_or_default();
    choose(&found, None)
        .iter()
        .map(|address| address.ip)
        .collect()
}

/// Whether an address that a pod has is another's by the mesh: the pod can give itself any before the mesh names it.
pub fn belongs_to_another(
    own: Option<&Workload>,
    mesh: &Mesh,
    network: &str,
    address: IpAddr,
) -> bool {
    !own.is_some_and(|own| own.has_address(address))
        && mesh.workload_by_ip(network, address).is_some()
}

/// Those that are expected, in the order in which they are, or all of them where nobody expects anything.
fn choose(found: &[PodAddress], expected: Option<&[IpAddr]>) -> Vec<PodAddress> {
    let candidates: Vec<PodAddress> = match expected {
        None => found.to_vec(),
        Some(expected) => expected
            .iter()
            .filter_map(|ip| found.iter().find(|address| address.ip == *ip).copied())
            .collect(),
    };
    let mut chosen: Vec<PodAddress> = Vec::new();
    for address in candidates {
        if chosen.len() < MOST_ADDRESSES && chosen.iter().all(|other| other.ip != address.ip) {
            chosen.push(address);
        }
    }
    chosen
}

/// The addresses of the namespace this thread is in that others can reach: not those of the loopback device.
fn found() -> Vec<PodAddress> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    interfaces
        .filter(|interface| !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK))
        .filter_map(|interface| {
            let ip = ip(&interface).filter(can_be_reached)?;
            let device = nix::net::if_::if_nametoindex(interface.interface_name.as_str()).ok()?;
            Some(PodAddress { ip, device })
        })
        .collect()
}

fn ip(interface: &InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    let v4 = address
        .as_sockaddr_in()
        .map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| Some(IpAddr::V6(address.as_sockaddr_in6()?.ip())))
}

fn can_be_reached(ip: &IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || is_mapped(ip),
    };
    !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast() && !link_local
}

/// Nobody can be reached by an IPv4 address in IPv6; it would only be confused with the IPv4 address.
fn is_mapped(ip: &Ipv6Addr) -> bool {
    ip.to_ipv4_mapped().is_some()
}

fn list<T: ToString>(addresses: impl IntoIterator<Item = T>) -> String {
    addresses
        .into_iter()
        .map(|address| address.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(ips: &[&str]) -> Vec<PodAddress> {
        (1..)
            .zip(ips)
            .map(|(device, ip)| PodAddress {
                ip: ip.parse().unwrap(),
                device,
            })
            .collect()
    }

    fn chosen(have: &[&str], expected: Option<&[&str]>) -> Vec<String> {
        let expected: Option<Vec<IpAddr>> =
            expected.map(|all| all.iter().map(|ip| ip.parse().unwrap()).collect());
        choose(&found(have), expected.as_deref())
            .iter()
            .map(|address| address.ip.to_string())
            .collect()
    }

    #[test]
    fn the_mesh_s_addresses_are_taken_in_the_mesh_s_order() {
        let have = ["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"];
        assert_eq!(
            chosen(&have, Some(&["fd00::1", "10.9.9.9", "10.0.0.2", "fd00::1"])),
            ["fd00::1", "10.0.0.2"]
        );
        assert_eq!(chosen(&have, None), have);
        assert!(chosen(&have, Some(&["10.9.9.9"])).is_empty());
        assert!(
            chosen(&have, Some(&[])).is_empty(),
            "an earlier enrolment without addresses says that none is the pod's"
        );
    }

    #[test]
    fn a_pod_that_gives_itself_a_thousand_addresses_is_known_by_few() {
        let many: Vec<String> = (0..1000u32)
            .map(|n| Ipv6Addr::from(0xfd00 << 112 | u128::from(n)).to_string())
            .collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(chosen(&many, None).len(), MOST_ADDRESSES);
    }

    #[test]
    fn only_addresses_that_others_can_reach_count() {
        for ip in ["10.0.0.1", "100.64.0.1", "fd00::1", "2001:db8::1"] {
            assert!(can_be_reached(&ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "127.0.0.2",
            "0.0.0.0",
            "169.254.3.4",
            "::1",
            "::",
            "fe80::1",
            "ff02::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(!can_be_reached(&ip.parse().unwrap()), "{ip}");
        }
    }
}
