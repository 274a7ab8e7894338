//! Who has an address on a link: ARP for IPv4, neighbour discovery (RFC 4861) for IPv6. Frames that ask and answer, and their
//! reading; whatever is short, odd or unknown is `None`. Called by the raw probes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::packet::{
    Arp, BROADCAST, Mac, arp, arp_frame, ip_frame, ipv6, ipv6_packet, mac_at, v6_at,
};

const PROTOCOL_ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Solicited, and to be believed over what was known.
const BELIEVE: [u8; 4] = [0x60, 0, 0, 0];
const SOURCE_OPTION: u8 = 1;
const TARGET_OPTION: u8 = 2;

/// What somebody says on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbour {
    /// `asker` wants to know who has `wanted`.
    Asks {
        asker: (Mac, IpAddr),
        wanted: IpAddr,
    },
    /// This hardware address has that address.
    Has(Mac, IpAddr),
}

/// Reads a frame of either kind. A question that does not name its asker (duplicate address detection) is none.
pub fn neighbour(frame: &[u8]) -> Option<Neighbour> {
    if let Some(arp) = arp(frame) {
        let (mac, ip) = arp.sender;
        return Some(match arp.request {
            true => Neighbour::Asks {
                asker: (mac, ip.into()),
                wanted: arp.target.1.into(),
            },
            false => Neighbour::Has(mac, ip.into()),
        });
    }
    let (protocol, from, _, message) = ipv6(frame)?;
    if protocol != PROTOCOL_ICMPV6 {
        return None;
    }
    let target = v6_at(message, 8)?;
    // Only an option in the first place is read: Linux sends no other.
    let option = |kind| (message.get(24..26)? == [kind, 1]).then(|| mac_at(message, 26))?;
    match *message.first()? {
        SOLICITATION => Some(Neighbour::Asks {
            // A question to one whose hardware address is known need not give the asker's.
            asker: (
                option(SOURCE_OPTION).or_else(|| mac_at(frame, 6))?,
                from.into(),
            ),
            wanted: target.into(),
        }),
        ADVERTISEMENT => Some(Neighbour::Has(option(TARGET_OPTION)?, target.into())),
        _ => None,
    }
}

/// A frame that asks who has `wanted`; whoever hears it learns also where the asker is.
pub fn question((mac, ip): (Mac, IpAddr), wanted: IpAddr) -> Vec<u8> {
    match (ip, wanted) {
        (IpAddr::V6(ip), IpAddr::V6(wanted)) => {
            let [.., x, y, z] = wanted.octets();
            let group =
                Ipv6Addr::from_octets([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, x, y, z]);
            let message = message(SOLICITATION, [0; 4], wanted, SOURCE_OPTION, mac);
            let packet = ipv6_packet((ip, group), PROTOCOL_ICMPV6, (message, 2));
            ip_frame(mac, [0x33, 0x33, 0xff, x, y, z], &packet)
        }
        (ip, wanted) => arp_frame(
            BROADCAST,
            Arp {
                request: true,
                sender: (mac, v4(ip)),
                target: ([0; 6], v4(wanted)),
            },
        ),
    }
}

/// The answer to `asker`: the address is here.
pub fn answer((mac, ip): (Mac, IpAddr), asker: (Mac, IpAddr)) -> Vec<u8> {
    match (ip, asker.1) {
        (IpAddr::V6(ip), IpAddr::V6(to)) => {
            let message = message(ADVERTISEMENT, BELIEVE, ip, TARGET_OPTION, mac);
            let packet = ipv6_packet((ip, to), PROTOCOL_ICMPV6, (message, 2));
            ip_frame(mac, asker.0, &packet)
        }
        (ip, to) => arp_frame(
            asker.0,
            Arp {
                request: false,
                sender: (mac, v4(ip)),
                target: (asker.0, v4(to)),
            },
        ),
    }
}

fn message(kind: u8, flags: [u8; 4], target: Ipv6Addr, option: u8, mac: Mac) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0];
    message.extend(flags);
    message.extend(target.octets());
    message.extend([option, 1]);
    message.extend(mac);
    message
}

/// Nobody's address where the family is not IPv4: such a question has no answer.
fn v4(ip: IpAddr) -> Ipv4Addr {
    match ip {
        IpAddr::V4(ip) => ip,
        IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    #[test]
    fn what_is_asked_and_answered_is_read_again_and_nothing_else_is() {
        for [own, other] in [["10.77.1.10", "10.77.1.11"], ["fd77::1:a", "fd77::1:b"]] {
            let (own, other): (IpAddr, IpAddr) = (own.parse().unwrap(), other.parse().unwrap());
            let asks = question((MAC, own), other);
            let expected = Neighbour::Asks {
                asker: (MAC, own),
                wanted: other,
            };
            assert_eq!(neighbour(&asks), Some(expected));
            let has = answer((MAC, own), ([9; 6], other));
            assert_eq!(neighbour(&has), Some(Neighbour::Has(MAC, own)));
            for frame in [asks, has] {
                for end in 0..frame.len().min(42) {
                    assert_eq!(neighbour(&frame[..end]), None, "{end} bytes");
                }
                for at in 12..frame.len() {
                    let mut odd = frame.clone();
                    odd[at] ^= 0xff;
                    let _ = neighbour(&odd);
                }
            }
        }
    }
}
