//! istio-cni's rule and route: what it has marked with 0x111 is routed by table 100, which delivers everything to the pod itself.

use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, IpVersion,
    packet_route::{
        route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use serde::{Deserialize, Serialize};

use crate::kernel::routing::{Family, table};

const MARK: u32 = 0x111;
const TABLE: u32 = 100;

/// What was found and taken away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRoute {
    rules: Vec<TakenRule>,
    routes: Vec<TakenRoute>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TakenRule {
    priority: Option<u32>,
    mask: Option<u32>,
    protocol: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TakenRoute {
    protocol: u8,
    scope: u8,
    priority: Option<u32>,
}

/// Takes both away.
pub async fn take(handle: &Handle, family: Family) -> Result<PolicyRoute, String> {
    let mut taken = PolicyRoute::default();
    let version = match family {
        Family::V4 => IpVersion::V4,
        Family::V6 => IpVersion::V6,
    };
    let rules = handle.rule().get(version).execute();
    let rules: Vec<RuleMessage> = rules
        .try_collect()
        .await
        .map_err(|error| format!("list {family:?} rules: {error}"))?;
    for rule in rules.into_iter().filter(is_cni_s_rule) {
        taken.rules.push(TakenRule::of(&rule));
        let removed = handle.rule().del(rule).execute().await;
        removed.map_err(|error| format!("remove {family:?} rule for mark {MARK:#x}: {error}"))?;
    }
    let mut all = RouteMessage::default();
    all.header.address_family = family.into();
    let routes = handle.route().get(all).execute();
    let routes: Vec<RouteMessage> = routes
        .try_collect()
        .await
        .map_err(|error| format!("list {family:?} routes: {error}"))?;
    for route in routes.into_iter().filter(is_cni_s_route) {
        taken.routes.push(TakenRoute::of(&route));
        let removed = handle.route().del(route).execute().await;
        removed.map_err(|error| format!("remove {family:?} route of table {TABLE}: {error}"))?;
    }
    Ok(taken)
}

/// Puts back what was taken. What is there again is no error.
pub async fn put_back(handle: &Handle, family: Family, taken: &PolicyRoute) -> Result<(), String> {
    let loopback = table::loopback_up(handle).await?;
    for rule in &taken.rules {
        let mut request = handle.rule().add();
        *request.message_mut() = rule.message(family);
        match request.execute().await {
            Err(error) if !is_there(&error) => {
                return Err(format!(
                    "put back the {family:?} rule for mark {MARK:#x}: {error}"
                ));
            }
            _ => {}
        }
    }
    for route in &taken.routes {
        let message = route.message(family, loopback);
        match handle.route().add(message).execute().await {
            Err(error) if !is_there(&error) => {
                return Err(format!(
                    "put back the {family:?} route of table {TABLE}: {error}"
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

fn is_there(error: &rtnetlink::Error) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(error) if error.to_io().raw_os_error() == Some(libc::EEXIST))
}

fn is_cni_s_rule(rule: &RuleMessage) -> bool {
    let table = |attribute: &RuleAttribute| matches!(attribute, RuleAttribute::Table(TABLE));
    rule.attributes.contains(&RuleAttribute::FwMark(MARK))
        && (u32::from(rule.header.table) == TABLE || rule.attributes.iter().any(table))
}

fn is_cni_s_route(route: &RouteMessage) -> bool {
    let table = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Table(TABLE));
    route.header.kind == RouteType::Local
        && route.header.destination_prefix_length == 0
        && (u32::from(route.header.table) == TABLE || route.attributes.iter().any(table))
}

impl TakenRule {
    fn of(rule: &RuleMessage) -> Self {
        let mut taken = Self {
            priority: None,
            mask: None,
            protocol: None,
        };
        for attribute in &rule.attributes {
            match attribute {
                RuleAttribute::Priority(priority) => taken.priority = Some(*priority),
                RuleAttribute::FwMask(mask) => taken.mask = Some(*mask),
                RuleAttribute::Protocol(protocol) => taken.protocol = Some((*protocol).into()),
                _ => {}
            }
        }
        taken
    }

    fn message(&self, family: Family) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.family = family.into();
        rule.header.action = RuleAction::ToTable;
        let said = [
            self.priority.map(RuleAttribute::Priority),
            Some(RuleAttribute::FwMark(MARK)),
            self.mask.map(RuleAttribute::FwMask),
            self.protocol
                .map(|protocol| RuleAttribute::Protocol(protocol.into())),
            Some(RuleAttribute::Table(TABLE)),
        ];
        rule.attributes = said.into_iter().flatten().collect();
        rule
    }
}

impl TakenRoute {
    fn of(route: &RouteMessage) -> Self {
        let priority = |attribute: &RouteAttribute| match attribute {
            RouteAttribute::Priority(priority) => Some(*priority),
            _ => None,
        };
        Self {
            protocol: route.header.protocol.into(),
            scope: route.header.scope.into(),
            priority: route.attributes.iter().find_map(priority),
        }
    }

    fn message(&self, family: Family, loopback: u32) -> RouteMessage {
        let mut route = table::default_route(family, TABLE);
        route.header.kind = RouteType::Local;
        route.header.protocol = RouteProtocol::from(self.protocol);
        route.header.scope = RouteScope::from(self.scope);
        route.attributes.push(RouteAttribute::Oif(loopback));
        route
            .attributes
            .extend(self.priority.map(RouteAttribute::Priority));
        route
    }
}
