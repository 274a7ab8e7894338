//! The messages to the kernel behind `routing`: one table of routes and the rules that lead to it, for either family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use culvert_abi::{MARK_MASK, STEER_MARK};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        link::LinkFlags,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use serde::{Deserialize, Serialize};

/// Routing table and rule priority of ours inside a pod.
const TABLE: u32 = 15001;
const PRIORITY: u32 = 15001;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    V4,
    V6,
}

impl From<Family> for AddressFamily {
    fn from(family: Family) -> Self {
        match family {
            Family::V4 => Self::Inet,
            Family::V6 => Self::Inet6,
        }
    }
}

impl Family {
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Everything is the pod's own.
    ToPod {
        device: u32,
        /// For sockets that are not bound to an address.
        source: Option<IpAddr>,
    },
    Nowhere,
}

/// Why a route was not added.
#[derive(Debug, thiserror::Error)]
#[error("add route {way:?}: {source}")]
pub(super) struct RouteError {
    way: Way,
    source: rtnetlink::Error,
}

impl RouteError {
    /// Whether the device is not one for this family (its IPv6 is switched off), or not there any more.
    pub fn is_without_family(&self) -> bool {
        matches!(errno(&self.source), Some(libc::EACCES | libc::ENODEV))
    }
}

/// In the place of what has this priority.
pub(super) async fn put_route(
    handle: &Handle,
    family: Family,
    way: Way,
    priority: u32,
) -> Result<(), RouteError> {
    let add = |way| {
        handle
            .route()
            .add(route(family, way, Some(priority)))
            .replace()
            .execute()
    };
    let added = match (add(way).await, way) {
        // An IPv6 address that is not confirmed yet is no source: the kernel will choose.
        (
            Err(_),
            Way::ToPod {
                device,
                source: Some(_),
            },
        ) => {
            add(Way::ToPod {
                device,
                source: None,
            })
            .await
        }
        (result, _) => result,
    };
    added.map_err(|source| RouteError { way, source })
}

/// The marks and masks of the rules: one where a single one matches both marks and nothing else.
pub(super) fn marks(packet_mark: u32) -> Vec<(u32, u32)> {
    let differ = (STEER_MARK ^ packet_mark) & MARK_MASK;
    if differ.is_power_of_two() {
        return vec![(STEER_MARK & !differ, MARK_MASK & !differ)];
    }
    vec![(STEER_MARK, MARK_MASK), (packet_mark, MARK_MASK)]
}

pub(super) async fn add_rules(
    handle: &Handle,
    family: Family,
    marks: &[(u32, u32)],
) -> Result<(), String> {
    for &(mark, mask) in marks {
        let mut request = handle.rule().add();
        *request.message_mut() = rule(family, mark, mask);
        match request.execute().await {
            Ok(()) => {}
            Err(error) if errno(&error) == Some(libc::EEXIST) => {}
            Err(error) => {
                return Err(format!(
                    "add {family:?} rule for mark {mark:#x}/{mask:#x}: {error}"
                ));
            }
        }
    }
    Ok(())
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(error) => error.to_io().raw_os_error(),
        _ => None,
    }
}

/// Far more than we make: a pod may add its own as fast as they are removed.
const MOST_LEFTOVERS: usize = 256;

/// Takes rules and routes away. What is absent need not be removed, hence no error.
pub(super) async fn clear(handle: &Handle, family: Family, marks: &[(u32, u32)]) {
    remove_rules(handle, family, marks).await;
    for way in ANY {
        let route = route(family, way, None);
        for _ in 0..MOST_LEFTOVERS {
            let route = handle.route().del(route.clone());
            if route.execute().await.is_err() {
                break;
            }
        }
    }
}

pub(super) async fn remove_rules(handle: &Handle, family: Family, marks: &[(u32, u32)]) {
    for &(mark, mask) in marks {
        for _ in 0..MOST_LEFTOVERS {
            let rule = handle.rule().del(rule(family, mark, mask));
            if rule.execute().await.is_err() {
                break;
            }
        }
    }
}

/// Takes away what comes after this priority, as far as one follows the other.
pub(super) async fn remove_routes_after(handle: &Handle, family: Family, last: u32) {
    for priority in (last + 1..).take(MOST_LEFTOVERS) {
        let mut removed = false;
        for way in ANY {
            let route = handle.route().del(route(family, way, Some(priority)));
            removed |= route.execute().await.is_ok();
        }
        if !removed {
            return;
        }
    }
}

/// With no device, any route of its kind.
const ANY: [Way; 2] = [
    Way::ToPod {
        device: 0,
        source: None,
    },
    Way::Nowhere,
];

/// Switches the loopback device on; returns its index.
pub async fn loopback_up(handle: &Handle) -> Result<u32, String> {
    let found = handle
        .link()
        .get()
        .match_name("lo".to_owned())
        .execute()
        .try_next()
        .await;
    let index = found
        .map_err(|error| format!("find lo: {error}"))?
        .map(|link| link.header.index)
        .ok_or_else(|| "there is no loopback device".to_owned())?;
    let link = rtnetlink::LinkUnspec::new_with_index(index).up().build();
    let set = handle.link().set(link).execute().await;
    set.map_err(|error| format!("set lo up: {error}"))?;
    Ok(index)
}

/// The devices that are up: the others take no routes.
pub(super) async fn devices(handle: &Handle) -> Result<Vec<u32>, String> {
    let links = handle.link().get().execute();
    let up = links.try_filter(|link| std::future::ready(link.header.flags.contains(LinkFlags::Up)));
    let found = up.map_ok(|link| link.header.index).try_collect().await;
    found.map_err(|error| format!("list devices: {error}"))
}

/// A route for everything.
pub fn default_route(family: Family, table: u32) -> RouteMessage {
    match family {
        Family::V4 => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
            .table_id(table)
            .build(),
        Family::V6 => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(Ipv6Addr::UNSPECIFIED, 0)
            .table_id(table)
            .build(),
    }
}

/// With device 0, any route of this kind.
fn route(family: Family, way: Way, priority: Option<u32>) -> RouteMessage {
    let mut route = default_route(family, TABLE);
    match way {
        Way::ToPod { device, source } => {
            route.header.kind = RouteType::Local;
            route.header.scope = RouteScope::Host;
            if device != 0 {
                route.attributes.push(RouteAttribute::Oif(device));
            }
            let source = source.map(|ip| match ip {
                IpAddr::V4(ip) => RouteAddress::Inet(ip),
                IpAddr::V6(ip) => RouteAddress::Inet6(ip),
            });
            route
                .attributes
                .extend(source.map(RouteAttribute::PrefSource));
        }
        Way::Nowhere => route.header.kind = RouteType::Unreachable,
    }
    route
        .attributes
        .extend(priority.map(RouteAttribute::Priority));
    route
}

fn rule(family: Family, mark: u32, mask: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family.into();
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(mark),
        RuleAttribute::FwMask(mask),
        RuleAttribute::Table(TABLE),
    ];
    rule
}
