//! The rules, routes and sysctls that a pod needs, made and undone by the agent.
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
//!
//! Either family has such a table, also one that the pod has no address of: what is marked must not leave the pod by another
//! way.
//!
//! Where istio-cni's rules steer, theirs lead the answers back too, until istio-cni takes them away, which it does before it says that
//! the pod leaves. What is open then goes on by a rule of ours, for a mark that theirs takes for the agent's as well
//! ([`RoutingSettings::application_mark`]), and a route for it.

use std::{io, net::IpAddr, path::Path, thread};

use culvert_abi::MARK_MASK;
use rtnetlink::Handle;

use super::{KernelError, Netns, RedirectMode, sys};

mod sysctls;
pub(super) mod table;

pub(super) use table::Family;
use table::Way;

/// Devices for which a pod gets a route.
const MOST_DEVICES: usize = 64;

/// A pod's address and the index of the device that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodAddress {
    pub ip: IpAddr,
    pub device: u32,
}

/// What is the same for all pods.
#[derive(Clone, Copy, Debug)]
pub struct RoutingSettings {
    pub redirect: RedirectMode,
    pub packet_mark: u32,
    /// Where the agent carries a connection, the application sees the client's address, not its pod's own.
    pub original_source: bool,
    /// A test wants pods to go on accepting what a SYN carries.
    pub keep_fast_open: bool,
}

/// Tells what goes to an application from what leaves the pod. Outside the bits that istio-cni's rules compare.
const TO_APPLICATION: u32 = 0x1000;
const _: () = assert!(TO_APPLICATION & MARK_MASK == 0);

impl RoutingSettings {
    /// The mark of connections that the agent opens to the pod's application, and of the answers.
    pub fn application_mark(&self) -> u32 {
        match self.redirect {
            RedirectMode::Ebpf => self.packet_mark,
            // Here what leaves the pod has the packet mark as well.
            RedirectMode::Iptables => self.packet_mark | TO_APPLICATION,
        }
    }

    /// Whether an agent with this way to steer found `previous` ([`PodRouting::previous`]).
    pub fn has_found(&self, previous: &[String]) -> bool {
        previous.len() == sysctls::number(self.redirect)
    }

    /// The marks and masks of the rules.
    fn marks(&self) -> Vec<(u32, u32)> {
        match self.redirect {
            RedirectMode::Ebpf => table::marks(self.packet_mark),
            RedirectMode::Iptables => vec![self.carried()],
        }
    }

    /// Those that either way to steer may have left.
    fn all_marks(&self) -> Vec<(u32, u32)> {
        let mut marks = table::marks(self.packet_mark);
        marks.push(self.carried());
        marks
    }

    fn carried(&self) -> (u32, u32) {
        (
            self.packet_mark | TO_APPLICATION,
            MARK_MASK | TO_APPLICATION,
        )
    }
}

/// What was set up in a pod, and what was there before.
#[derive(Debug)]
pub struct PodRouting {
    settings: RoutingSettings,
    /// The devices with a route.
    devices: Vec<u32>,
    /// See [`sysctls`].
    previous: Vec<String>,
}

impl PodRouting {
    /// Sets the pod up. What an earlier agent left is taken over; `before` is what that one found ([`Self::previous`]).
    pub fn install(
        netns: &Netns,
        addresses: &[PodAddress],
        settings: RoutingSettings,
        before: Option<&[String]>,
    ) -> Result<Self, KernelError> {
        let (devices, found) = on_thread(netns, "set up", || {
            let mut found = Vec::new();
            let done = sysctls::set(settings, &mut found).and_then(|()| {
                with_netlink(async |handle| routes(&handle, addresses, settings).await)
            });
            match done {
                Ok(devices) => Ok((devices, found)),
                // What an earlier agent left stays: with it, what needs this agent is refused.
                Err(error) if before.is_some() => Err(error),
                Err(error) => match take_down(settings, &found) {
                    Ok(()) => Err(error),
                    Err(undone) => Err(format!("{error}; and it was not undone: {undone}")),
                },
            }
        })?;
        Ok(Self {
            settings,
            devices,
            // Where that one left steering to istio-cni's rules it did not look at all of it.
            previous: match before {
                Some(before) => before
                    .iter()
                    .chain(found.iter().skip(before.len()))
                    .cloned()
                    .collect(),
                None => found,
            },
        })
    }

    /// The routing of a pod that an earlier agent set up.
    pub fn remembered(settings: RoutingSettings, previous: Vec<String>) -> Self {
        Self {
            settings,
            devices: Vec::new(),
            previous,
        }
    }

    /// What was there before, for [`Self::remembered`].
    pub fn previous(&self) -> &[String] {
        &self.previous
    }

    /// The devices that have a route, the one with the pod's primary address first.
    pub fn devices(&self) -> &[u32] {
        &self.devices
    }

    /// Undoes of [`Self::install`] what new connections depend on, and nothing of what open ones need.
    pub fn release_new(&self, netns: &Netns) -> Result<(), KernelError> {
        on_thread(netns, "take down", || {
            sysctls::restore_for_new(&self.previous)
        })
    }

    /// Undoes [`Self::install`].
    pub fn uninstall(self, netns: &Netns) -> Result<(), KernelError> {
        on_thread(netns, "take down", || {
            take_down(self.settings, &self.previous)
        })
    }
}

/// Switches the loopback device of this thread's namespace on.
pub(super) fn loopback_up() -> Result<(), String> {
    with_netlink(async |handle| table::loopback_up(&handle).await.map(drop))
}

fn take_down(settings: RoutingSettings, previous: &[String]) -> Result<(), String> {
    with_netlink(async |handle| {
        for family in Family::ALL {
            table::clear(&handle, family, &settings.all_marks()).await;
        }
        Ok(())
    })?;
    sysctls::restore(previous)
}

/// Rules and routes of both families; returns the devices with a route.
async fn routes(
    handle: &Handle,
    addresses: &[PodAddress],
    settings: RoutingSettings,
) -> Result<Vec<u32>, String> {
    let loopback = table::loopback_up(handle).await?;
    let mut devices: Vec<u32> = addresses.iter().map(|address| address.device).collect();
    devices.extend(table::devices(handle).await?);
    let mut seen = Vec::new();
    devices.retain(|device| {
        let new = *device != loopback && !seen.contains(device);
        seen.push(*device);
        new
    });
    devices.truncate(MOST_DEVICES);
    if settings.redirect == RedirectMode::Iptables {
        // Nothing is steered that a socket could be bound for.
        devices.clear();
    }
    for family in Family::ALL {
        if family == Family::V6 && !has_ipv6() {
            continue;
        }
        // What an earlier agent left is replaced in place: open connections need it at every moment, or what they send would find
        // another way out of the pod.
        let mut last = 0;
        for (priority, (way, needed)) in (1..).zip(ways(family, addresses, &devices, loopback)) {
            match table::put_route(handle, family, way, priority).await {
                Ok(()) => {}
                Err(error) if !needed && error.is_without_family() => {}
                Err(error) => return Err(error.to_string()),
            }
            last = priority;
        }
        let marks = settings.marks();
        table::add_rules(handle, family, &marks).await?;
        let mut others = settings.all_marks();
        others.retain(|other| !marks.contains(other));
        table::remove_rules(handle, family, &others).await;
        table::remove_routes_after(handle, family, last).await;
    }
    Ok(devices)
}

/// The routes of a family in order, and whether the pod can be served without one whose device does not do this family.
fn ways(
    family: Family,
    addresses: &[PodAddress],
    devices: &[u32],
    loopback: u32,
) -> Vec<(Way, bool)> {
    let own: Vec<PodAddress> = addresses
        .iter()
        .filter(|address| Family::of(address.ip) == family)
        .copied()
        .collect();
    let to_pod = |device: u32| {
        let address = own.iter().find(|address| address.device == device);
        let other = own.first().filter(|_| {
            // A socket that is bound to a device hears nothing over IPv6 that is sent to the address of another one: there the
            // kernel chooses one of the device's.
            family == Family::V4 || device == loopback
        });
        Way::ToPod {
            device,
            source: address.or(other).map(|address| address.ip),
        }
    };
    let primary = own.first().map(|address| address.device);
    let others = devices
        .iter()
        .filter(|device| Some(**device) != primary)
        .map(|device| (to_pod(*device), false));
    match (primary, family) {
        (Some(primary), _) => [(to_pod(primary), true), (to_pod(loopback), true)]
            .into_iter()
            .chain(others)
            .collect(),
        // An application is told at once that IPv6 does not get it anywhere, as it would be without us, and tries IPv4. The
        // others serve bound sockets, which this one does not: they end at the agent, which refuses them.
        (None, Family::V6) => std::iter::once((Way::Nowhere, false))
            .chain(others)
            .collect(),
        // IPv4 would send a bound socket's packets to the link after it has found such a route.
        (None, Family::V4) => std::iter::once((to_pod(loopback), true))
            .chain(others)
            .collect(),
    }
}

fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// A thread of its own: /proc/sys and netlink sockets belong to the namespace of the thread that opens them.
pub(super) fn on_thread<T: Send>(
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

pub(super) fn with_netlink<T>(
    work: impl AsyncFnOnce(Handle) -> Result<T, String>,
) -> Result<T, String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const LOOPBACK: u32 = 1;

    fn address(ip: &str, device: u32) -> PodAddress {
        PodAddress {
            ip: ip.parse().unwrap(),
            device,
        }
    }

    fn found(family: Family, addresses: &[PodAddress]) -> Vec<(u32, String)> {
        ways(family, addresses, &[2, 3], LOOPBACK)
            .into_iter()
            .map(|(way, _)| match way {
                Way::ToPod { device, source } => {
                    (device, source.map_or_else(String::new, |ip| ip.to_string()))
                }
                Way::Nowhere => (0, "nowhere".to_owned()),
            })
            .collect()
    }

    #[test]
    fn each_device_s_route_prefers_the_device_s_own_address() {
        let addresses = [
            address("10.0.0.1", 2),
            address("fd00::1", 2),
            address("fd00::3", 3),
            address("10.0.0.2", 2),
        ];
        let one_device = &addresses[..2];
        let ip = |device, ip: &str| (device, ip.to_owned());
        assert_eq!(
            found(Family::V4, &addresses),
            [
                ip(2, "10.0.0.1"),
                ip(LOOPBACK, "10.0.0.1"),
                ip(3, "10.0.0.1")
            ]
        );
        assert_eq!(
            found(Family::V6, &addresses),
            [ip(2, "fd00::1"), ip(LOOPBACK, "fd00::1"), ip(3, "fd00::3")]
        );
        assert_eq!(
            found(Family::V6, one_device),
            [ip(2, "fd00::1"), ip(LOOPBACK, "fd00::1"), ip(3, "")]
        );
    }

    #[test]
    fn a_family_without_an_address_leads_nowhere_out_of_the_pod() {
        let ip = |device, ip: &str| (device, ip.to_owned());
        assert_eq!(
            found(Family::V6, &[address("10.0.0.1", 2)]),
            [ip(0, "nowhere"), ip(2, ""), ip(3, "")]
        );
        assert_eq!(
            found(Family::V4, &[address("fd00::1", 2)]),
            [ip(LOOPBACK, ""), ip(2, ""), ip(3, "")]
        );
    }
}
