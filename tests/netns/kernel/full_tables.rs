//! Tables without room: enrolment fails and says which table, a connection is refused or the agent's, nothing is admitted that
//! the kernel part could not note, and each case is counted.

use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;

use anyhow::{Context as _, Result};
use aya::maps::{Map, MapData, SockHash};
use culvert_abi::{
    Address, Claim, Endpoint, Flow, FlowKey, Isolated, Listener, Pod as PodEntry, Quota,
    ServiceKey, Slot, SlotKey,
};
use culvert_harness::{Foreign, Hook, Proc, Service, TcpState, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, answered, connect, connect_to, echo, serve, unplug,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    admission::impostor_at,
    enrolment::network,
    forgery::{Family, race_a_lost_syn},
    kernel_tables::{
        claims, clear, decisions, fill, flows, is_full, nobodys_flow, pinned, quotas, steered,
        table, wait_for_no_claims,
    },
};

/// A key of a namespace that is none.
fn nobodys(number: u64) -> u64 {
    u64::MAX - number
}

pub fn nobodys_address(number: u64) -> Address {
    let mut address = [0xfd; 16];
    address[8..].copy_from_slice(&number.to_be_bytes());
    address
}

/// An entry as the agent makes them.
fn any_of<K: aya::Pod, V: aya::Pod>(scene: &Scene, name: &str) -> Result<V> {
    let found = table::<K, V>(&scene.node1, name)?.iter().flatten().next();
    found
        .map(|(_, value)| value)
        .with_context(|| format!("{name} is empty"))
}

/// A map of sockets, filled with one listener of this process under keys of nobody's.
fn fill_with_a_socket<K: aya::Pod>(
    scene: &Scene,
    name: &str,
    key: impl Fn(u64) -> K,
) -> Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut map = sockets::<K>(scene, name)?;
    for key in (1..).map(key) {
        match map.insert(key, listener.as_raw_fd(), 0) {
            Ok(()) => {}
            Err(error) if is_full(&error) => break,
            Err(error) => return Err(error).with_context(|| format!("filling {name}")),
        }
    }
    Ok(listener)
}

fn sockets<K: aya::Pod>(scene: &Scene, name: &str) -> Result<SockHash<MapData, K>> {
    let data = MapData::from_pin(pinned(&scene.node1, name))?;
    Map::SockHash(data)
        .try_into()
        .with_context(|| format!("map {name}"))
}

fn nobodys_socket(number: u64) -> Isolated {
    Isolated {
        key: nobodys_flow(number),
        socket_cookie: number,
        socket_netns: u64::MAX,
    }
}

/// Leaves one of the tables of isolated sockets without room, and without the programs that make them mute.
pub fn fill_isolated(scene: &Scene, name: &str) -> Result<TcpListener> {
    let map = sockets::<Isolated>(scene, name)?;
    // One socket may be there under many keys only where the map has no programs; none of that is what fails here.
    for hook in [Hook::SkMsg, Hook::StreamVerdict] {
        Foreign::load(hook)?.displace(std::os::fd::AsFd::as_fd(map.fd()))?;
    }
    fill_with_a_socket(scene, name, nobodys_socket)
}

/// Fills a table for as long as the result lives.
type Filled<'a> = Box<dyn FnOnce() -> Result<()> + 'a>;

fn filled<'a, K: aya::Pod, V: aya::Pod>(
    scene: &'a Scene,
    name: &'a str,
    key: impl Fn(u64) -> K,
) -> Result<Filled<'a>> {
    let value = any_of::<K, V>(scene, name)?;
    let keys = fill(&scene.node1, name, 0, key, value)?;
    Ok(Box::new(move || clear::<K, V>(&scene.node1, name, &keys)))
}

#[test]
fn a_pod_that_finds_no_room_is_not_enrolled_and_stays_as_it_was() -> Result<()> {
    let scene = Scene::new()?;
    let (guest, outsider) = (scene.node1.pod("guest")?, scene.node1.pod("outsider")?);
    let _server = serve(&guest, "echo")?;
    let before = network(&guest)?;
    let enrol = || {
        let agent = &scene.agent1;
        agent.enrol(&guest, "guest-uid", NAMESPACE, "guest", "guest")
    };
    let cookie = guest.netns().cookie()?;
    let std::net::IpAddr::V4(address) = guest.address() else {
        panic!("IPv4")
    };
    let address = address.to_ipv6_mapped().octets();
    for name in ["PODS", "ENDPOINTS", "LISTENERS"] {
        let empty: Filled<'_> = match name {
            "PODS" => filled::<u64, PodEntry>(&scene, name, nobodys)?,
            "ENDPOINTS" => filled::<Address, Endpoint>(&scene, name, nobodys_address)?,
            _ => {
                let key = |number| Listener {
                    netns_cookie: nobodys(number),
                    kind: 1,
                    padding: 0,
                };
                let listener = fill_with_a_socket(&scene, name, key)?;
                Box::new(move || {
                    drop(listener);
                    Ok(())
                })
            }
        };
        let said = format!("{:#}", enrol().unwrap_err());
        assert!(said.contains(name), "{name}: {said}");
        assert_eq!(network(&guest)?, before, "{name}");
        let node = &scene.node1;
        assert!(
            table::<u64, PodEntry>(node, "PODS")?
                .get(&cookie, 0)
                .is_err()
        );
        let endpoints = table::<Address, Endpoint>(node, "ENDPOINTS")?;
        assert!(endpoints.get(&address, 0).is_err(), "{name}");
        // The kernel detaches a hook some moments after its last name and descriptor have gone.
        wait_until(SOON, "the guest to be reached as before", || {
            Ok(answered(&echo(&outsider, &guest)?).then_some(()))
        })?;
        empty()?;
    }
    enrol()?;
    assert!(!answered(&echo(&outsider, &guest)?), "in the mesh at last");
    Ok(())
}

/// Connects to a service; tells whether the kernel part chose the endpoint.
fn is_chosen_by_the_kernel(scene: &Scene, vip: &str) -> Result<bool> {
    let before = decisions(&scene.agent1, "service_resolved")?;
    let hello = ["--send", "hello", "--read", "5"];
    let report = connect_to(&scene.client, vip, &hello)?;
    assert!(answered(&report), "{report}");
    Ok(decisions(&scene.agent1, "service_resolved")? > before)
}

#[test]
fn a_service_that_finds_no_room_is_the_agents() -> Result<()> {
    let key = |number| ServiceKey {
        address: nobodys_address(number),
        view: u32::MAX,
        port: 1,
        padding: 0,
    };
    let service = culvert_abi::Service {
        table: u64::MAX,
        slots: 0,
        number: 0,
    };
    let slot_key = |number| SlotKey {
        table: u64::MAX,
        slot: number as u32,
        padding: 0,
    };
    let slot = Slot {
        address: [0; 16],
        workload: 0,
        threshold: 0,
        alias: 0,
        port: 0,
        padding: 0,
    };
    for name in ["SERVICES", "SLOTS"] {
        let mut scene = Scene::new()?;
        let _server = serve(&scene.server_a, "echo")?;
        let node = scene.node1.clone();
        let empty: Box<dyn FnOnce() -> Result<()>> = if name == "SERVICES" {
            let keys = fill(&node, name, 0, key, service)?;
            Box::new(move || clear::<ServiceKey, culvert_abi::Service>(&node, name, &keys))
        } else {
            let keys = fill(&node, name, 0, slot_key, slot)?;
            Box::new(move || clear::<SlotKey, Slot>(&node, name, &keys))
        };
        let shop = Service::new(NAMESPACE, "shop", "10.96.0.9").port(80, PORT);
        scene.change_mesh(|mesh| {
            let server = mesh.workload("server-a").expect("a workload");
            *server = server.clone().serves(&shop, 80, PORT);
            mesh.services.push(shop);
        })?;
        for _ in 0..3 {
            assert!(!is_chosen_by_the_kernel(&scene, "10.96.0.9:80")?, "{name}");
        }
        empty()?;
        // At the next change.
        scene.change_mesh(|mesh| mesh.policies.push(culvert_tests::scene::strict()))?;
        wait_until(SOON, "the service to find room", || {
            Ok(is_chosen_by_the_kernel(&scene, "10.96.0.9:80")?.then_some(()))
        })?;
    }
    Ok(())
}

/// Connections while no claim can be noted: one that a verdict lets pass, and one to the other node.
fn without_room_for_claims(scene: &Scene) -> Result<(Vec<Value>, [Proc; 2])> {
    let servers = [
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    ];
    for server in [&scene.server_a, scene.server_b()?] {
        scene.warm(&scene.client, server)?;
    }
    wait_for_no_claims(&scene.node1)?;
    let claim = Claim {
        client_netns: u64::MAX,
        server_netns: u64::MAX,
        generation: 0,
        opened_ns: 0,
        socket_cookie: 0,
        chosen: [0; 16],
        kind: 0,
        sequence: 0,
        workload: 0,
        source_identity: 0,
        source_pod: 0,
        admitted: 0,
        service: 0,
        reason: 0,
        chosen_port: 0,
        padding: 0,
        quota: 0,
    };
    let keys = fill(&scene.node1, "CLAIMS", 0, nobodys_flow, claim)?;
    let reports = [&scene.server_a, scene.server_b()?]
        .map(|server| echo(&scene.client, server))
        .into_iter()
        .collect::<Result<_>>()?;
    clear::<FlowKey, Claim>(&scene.node1, "CLAIMS", &keys)?;
    Ok((reports, servers))
}

#[test]
fn without_room_for_claims_nobody_is_taken_for_anybody() -> Result<()> {
    let scene = Scene::new()?;
    let (reports, servers) = without_room_for_claims(&scene)?;
    assert!(
        reports.iter().all(|report| !answered(report)),
        "{reports:?}"
    );
    for server in servers {
        assert_eq!(server.events("accepted").len(), 1, "only the one before");
    }
    assert!(decisions(&scene.agent1, "claim_map_full")? >= 2);
    assert!(claims(&scene.node1)?.is_empty());
    for server in [&scene.server_a, scene.server_b()?] {
        assert!(scene.warm(&scene.client, server).is_ok());
    }
    Ok(())
}

#[test]
fn twin_with_unclaimed_connections_passed_no_claim_is_needed() -> Result<()> {
    let scene = Scene::without("pass-unclaimed,skip-isolation")?;
    let (reports, _servers) = without_room_for_claims(&scene)?;
    assert!(answered(&reports[0]), "{reports:?}");
    Ok(())
}

/// A connection that a verdict lets pass, while no flow can be noted.
fn without_room_for_flows(scene: &Scene) -> Result<(Value, Proc)> {
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let flow = Flow {
        client_netns: u64::MAX,
        server_netns: u64::MAX,
        generation: 0,
        opened_ns: 0,
        client_socket: 0,
        server_socket: 0,
        sequence: 0,
        workload: 0,
        source_identity: 0,
        source_pod: 0,
        service: 0,
        quota: 0,
    };
    fill(&scene.node1, "FLOWS", 0, nobodys_flow, flow)?;
    Ok((echo(&scene.client, &scene.server_a)?, server))
}

// Heavy: a quarter of a million entries.
#[test]
fn without_room_for_flows_nothing_is_admitted_uncounted() -> Result<()> {
    let scene = Scene::new()?;
    let (report, server) = without_room_for_flows(&scene)?;
    assert!(!answered(&report), "{report}");
    for closed in server.events("closed").iter().skip(1) {
        assert_eq!(closed["bytes_read"], 0, "{closed}");
    }
    assert_eq!(decisions(&scene.agent1, "isolated_flow_map_full")?, 1);
    assert_eq!(decisions(&scene.agent1, "isolation_failed")?, 0);
    wait_for_no_claims(&scene.node1)
}

// Heavy: a quarter of a million entries.
#[test]
fn twin_without_isolation_a_flow_is_admitted_uncounted() -> Result<()> {
    let scene = Scene::without("skip-isolation")?;
    let (report, _server) = without_room_for_flows(&scene)?;
    assert!(answered(&report), "{report}");
    Ok(())
}

#[test]
fn with_as_many_flows_as_a_node_may_have_the_agent_carries_the_next() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let mut quotas = quotas(&scene.node1)?;
    let unused = quotas.get(&Quota::NODE, 0)?;
    let used_up = Quota {
        flows: culvert_abi::FLOWS_PER_NODE,
        ..unused
    };
    quotas.set(Quota::NODE, used_up, 0)?;
    let before = steered(&scene.agent1)?;
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    assert_eq!(decisions(&scene.agent1, "steered_flow_quota")?, 1);
    quotas.set(Quota::NODE, unused, 0)?;
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    assert_eq!(steered(&scene.agent1)?, before + 1);
    assert!(flows(&scene.node1)?.len() <= 1);
    Ok(())
}

#[test]
fn what_cannot_be_isolated_is_counted_and_destroyed() -> Result<()> {
    let scene = Scene::new()?;
    let _filled = fill_isolated(&scene, "ISOLATED_SERVERS")?;
    let log = scene.agent1.log().mark();
    let forgery = race_a_lost_syn(&scene, Family::V4)?;
    assert_eq!(forgery.wire["syn_ack"], true, "{}", forgery.wire);
    let agent = scene.agent1.process();
    agent.wait_for_line_after(log, "isolated_sequence", SOON)?;
    assert_eq!(decisions(&scene.agent1, "isolation_failed")?, 1);
    wait_until(SOON, "the forged connection's socket to be gone", || {
        let sockets = scene.server_a.sockets()?;
        let mut peers = sockets.iter().map(|socket| socket.peer.to_string());
        Ok((!peers.any(|peer| peer == forgery.peer)).then_some(()))
    })
}

/// Ends of flows that fit into the ring: more make it overflow.
const EVENTS: u64 = (1 << 21) / 168;

#[test]
fn events_that_find_no_room_are_counted_and_hold_nobody_up() -> Result<()> {
    let scene = Scene::new()?;
    let once = ["serve", "--port", "7000", "--mode", "once", "--quiet"];
    let server = scene.server_a.probe()?.args(once).spawn()?;
    server.wait_for_line("listening", SOON)?;
    scene.warm(&scene.client, &scene.server_a)?;
    let agent = &scene.agent1;
    agent.process().kill(Signal::SIGSTOP)?;
    let (to, count) = (scene.server_a.at(PORT), EVENTS + 500);
    let load = ["conn", "--to", &to, "--threads", "4"];
    let load = scene.client.probe()?.args(load);
    let load = load.args(["--count", &count.to_string()]).run(SOON * 2);
    // The last ones end a moment after their client: what is lost while the sums are taken is in none of them.
    let ended = wait_until(SOON, "every flow to end", || {
        Ok(flows(&scene.node1)?.is_empty().then_some(()))
    });
    agent.process().kill(Signal::SIGCONT)?;
    let load = load?.json()?;
    ended?;
    assert_eq!(load["errors"], 0, "{load}");
    let lost = wait_until(SOON, "the lost events to be counted", || {
        let lost = agent.metric("culvert_flow_events_lost_total", &[])?;
        Ok((lost > 0.0).then_some(lost))
    })?;
    assert_eq!(lost as u64, decisions(agent, "event_lost")?);
    // The sums are kept beside the ring.
    let labels = [
        "reporter=\"source\"",
        "source_principal=\"spiffe://cluster.local/ns/demo/sa/client\"",
    ];
    // And the one that taught the verdict.
    let all = load["count"].as_u64().unwrap_or_default() + 1;
    let counted = || agent.metric("istio_tcp_connections_closed_total", &labels);
    wait_until(SOON, "every connection to be counted", || {
        Ok((counted()? as u64 >= all).then_some(()))
    })
    .with_context(|| format!("{all} ended, {lost} lost, {:?} counted", counted()))?;
    assert_eq!(counted()? as u64, all);
    Ok(())
}

/// Isolations that fit into the ring of alarms: more make it overflow.
const ALARMS: u64 = (1 << 18) / 168;

#[test]
fn isolated_sockets_stay_mute_where_an_alarm_finds_no_room() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_a, "sink")?;
    scene.warm(&scene.client, &scene.server_a)?;
    wait_for_no_claims(&scene.node1)?;
    drop(server);
    unplug(&scene.server_a)?;
    let impostor = impostor_at(&scene, &scene.server_a)?;
    let server = serve(&impostor, "collect")?;
    let agent = &scene.agent1;
    agent.process().kill(Signal::SIGSTOP)?;
    let (to, count) = (impostor.at(PORT), (ALARMS + 200).to_string());
    let burst = ["burst", "--to", &to, "--count", &count];
    let burst = scene.client.probe()?.args(burst);
    let burst = burst.args(["--wait-ms", "10000", "--send", "for the server only"]);
    let burst = burst.stdin().spawn()?;
    let open = burst.wait_for_event("open", SOON);
    agent.process().kill(Signal::SIGCONT)?;
    let open = open?;
    assert_eq!(open["outcomes"]["ok"].to_string(), count, "{open}");
    assert_eq!(open["outcomes"]["sent: ok"], Value::Null, "{open}");
    wait_until(SOON, "the alarms that were lost to be counted", || {
        Ok((decisions(agent, "alarm_lost")? >= 100).then_some(()))
    })?;
    assert_eq!(
        decisions(agent, "isolated_not_admitted")?.to_string(),
        count
    );
    assert_eq!(decisions(agent, "isolation_failed")?, 0);
    wait_until(
        SOON,
        "those whose alarm was lost to be destroyed too",
        || {
            let sockets = scene.client.sockets()?;
            let mut open = sockets.iter().filter(|socket| {
                socket.state == TcpState::Established && socket.peer.to_string() == to
            });
            Ok(open.next().is_none().then_some(()))
        },
    )?;
    drop(burst);
    for closed in server.events("closed") {
        assert_eq!(closed["bytes_read"], 0, "{closed}");
    }
    // The agent is well.
    let _server = serve(scene.server_b()?, "echo")?;
    let report = echo(&scene.client, scene.server_b()?)?;
    assert!(answered(&report), "{report}");
    let refused = connect(&scene.intruder, &scene.client, &["--read", "1"])?;
    assert!(!answered(&refused));
    Ok(())
}
