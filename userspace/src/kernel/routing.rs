//! The rule, route and sysctls that a pod needs, made and undone by the agent.
//!
//! Two marks lead to one table, whose routes deliver everything to the pod itself: a steered connection
//! (`STEER_MARK`, set by `connect`), and the answers to a connection that the agent opened to the application with the
//! client's address as source (the packet mark, which `tcp_fwmark_accept` hands to the application's end).
//!
//! The first of the routes names the pod's own device, so that it serves sockets that are bound to it, or bind to it after
//! they were steered; the kernel delivers what is local through the loopback device all the same. It vanishes when the
//! device goes down: the second names the loopback device, which does not. The others name the devices that were there when
//! the pod was enrolled, for sockets that bind to one once they are steered: where the kernel finds no route for a bound
//! socket, it sends to that device's link, whatever the tables say.

use std::{fs, io, net::Ipv4Addr, thread};

use culvert_abi::{MARK_MASK, STEER_MARK};
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        link::LinkFlags,
        route::{RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use super::{KernelError, Netns, sys};

/// Routing table and rule priority of ours inside a pod.
const TABLE: u32 = 15001;
const PRIORITY: u32 = 15001;
/// Sysctls that the agent's connections to the application need, and what for.
const SYSCTLS: [&str; 2] = [
    // The application's end of a connection takes the mark of the agent's SYN, so that its answers come back.
    "/proc/sys/net/ipv4/tcp_fwmark_accept",
    // So does a reset for a port on which nobody listens.
    "/proc/sys/net/ipv4/fwmark_reflect",
];

/// Devices besides its own for which a pod gets a route.
const MOST_DEVICES: usize = 64;

/// A pod's address and the index of the device that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodAddress {
    pub ip: Ipv4Addr,
    pub device: u32,
}

/// What was set up in a pod, and what was there before.
#[derive(Debug)]
pub struct PodRouting {
    packet_mark: u32,
    /// Values of [`SYSCTLS`].
    previous: Vec<String>,
}

impl PodRouting {
    /// Sets the pod up. Leftovers of an earlier agent are replaced; `before` is what that one found ([`Self::previous`]).
    pub fn install(
        netns: &Netns,
        address: PodAddress,
        packet_mark: u32,
        before: Option<&[String]>,
    ) -> Result<Self, KernelError> {
        let found = on_thread(netns, "set up", || {
            let mut found = Vec::new();
            for path in SYSCTLS {
                let old =
                    fs::read_to_string(path).map_err(|error| format!("read {path}: {error}"))?;
                fs::write(path, "1").map_err(|error| format!("write {path}: {error}"))?;
                found.push(old.trim().to_owned());
            }
            with_netlink(async |handle| {
                remove(&handle, packet_mark).await;
                loopback_up(&handle).await?;
                for mark in [STEER_MARK, packet_mark] {
                    add_rule(&handle, mark).await?;
                }
                let first = [address.device, loopback(&handle).await?];
                let mut devices = devices(&handle).await?;
                devices.retain(|device| !first.contains(device));
                devices.truncate(MOST_DEVICES);
                for (priority, device) in (1..).zip(first.into_iter().chain(devices)) {
                    let route = to_the_pod()
                        .output_interface(device)
                        .pref_source(address.ip)
                        .priority(priority)
                        .build();
                    let added = handle.route().add(route).execute().await;
                    added.map_err(|error| format!("add local route: {error}"))?;
                }
                Ok(())
            })?;
            Ok(found)
        })?;
        Ok(Self::remembered(
            packet_mark,
            before.map_or(found, <[String]>::to_vec),
        ))
    }

    /// The routing of a pod that an earlier agent set up.
    pub fn remembered(packet_mark: u32, previous: Vec<String>) -> Self {
        Self {
            packet_mark,
            previous,
        }
    }

    /// What was there before, for [`Self::remembered`].
    pub fn previous(&self) -> &[String] {
        &self.previous
    }

    /// Undoes [`Self::install`].
    pub fn uninstall(self, netns: &Netns) -> Result<(), KernelError> {
        on_thread(netns, "take down", || {
            with_netlink(async |handle| {
                remove(&handle, self.packet_mark).await;
                Ok(())
            })?;
            for (path, value) in SYSCTLS.iter().zip(&self.previous) {
                fs::write(path, value).map_err(|error| format!("restore {path}: {error}"))?;
            }
            Ok(())
        })
    }
}

/// A thread of its own: /proc/sys and netlink sockets belong to the namespace of the thread that opens them.
fn on_thread<T: Send>(
    netns: &Netns,
    doing: &'static str,
    work: impl FnOnce() -> Result<T, String> + Send,
) -> Result<T, KernelError> {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                sys::enter_network_namespace(netns)
                    .map_err(|error| format!("enter namespace: {error}"))?;
                work()
            })
            .join()
            .unwrap_or_else(|_| Err("the thread panicked".to_owned()))
    })
    .map_err(|detail| KernelError::Routing { doing, detail })
}

fn with_netlink<T>(work: impl AsyncFnOnce(Handle) -> Result<T, String>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error: io::Error| format!("start a runtime: {error}"))?;
    runtime.block_on(async {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|error| format!("open netlink: {error}"))?;
        let driver = tokio::spawn(connection);
        let result = work(handle).await;
        driver.abort();
        result
    })
}

async fn loopback(handle: &Handle) -> Result<u32, String> {
    use futures_util::TryStreamExt as _;
    let found = handle
        .link()
        .get()
        .match_name("lo".to_owned())
        .execute()
        .try_next()
        .await;
    found
        .map_err(|error| format!("find lo: {error}"))?
        .map(|link| link.header.index)
        .ok_or_else(|| "there is no loopback device".to_owned())
}

/// The devices that are up: the others take no routes.
async fn devices(handle: &Handle) -> Result<Vec<u32>, String> {
    use futures_util::TryStreamExt as _;
    let links = handle.link().get().execute();
    let up = links.try_filter(|link| std::future::ready(link.header.flags.contains(LinkFlags::Up)));
    let found = up.map_ok(|link| link.header.index).try_collect().await;
    found.map_err(|error| format!("list devices: {error}"))
}

async fn loopback_up(handle: &Handle) -> Result<(), String> {
    let index = loopback(handle).await?;
    let link = rtnetlink::LinkUnspec::new_with_index(index).up().build();
    handle
        .link()
        .set(link)
        .execute()
        .await
        .map_err(|error| format!("set lo up: {error}"))
}

/// Everything is the pod's own.
fn to_the_pod() -> RouteMessageBuilder<Ipv4Addr> {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(Ipv4Addr::UNSPECIFIED, 0)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .table_id(TABLE)
}

fn rule(mark: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = AddressFamily::Inet;
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(mark),
        RuleAttribute::FwMask(MARK_MASK),
        RuleAttribute::Table(TABLE),
    ];
    rule
}

async fn add_rule(handle: &Handle, mark: u32) -> Result<(), String> {
    let mut request = handle.rule().add();
    *request.message_mut() = rule(mark);
    request
        .execute()
        .await
        .map_err(|error| format!("add rule for mark {mark:#x}: {error}"))
}

/// What is absent need not be removed, hence no error.
async fn remove(handle: &Handle, packet_mark: u32) {
    for mark in [STEER_MARK, packet_mark] {
        while handle.rule().del(rule(mark)).execute().await.is_ok() {}
    }
    let route = to_the_pod().build();
    while handle.route().del(route.clone()).execute().await.is_ok() {}
}
