//! A change of policy that is written only in part, because a table has no room or the agent was killed in the middle: no
//! connection is decided by what is there of it.

use anyhow::{Context as _, Result};
use aya::maps::{Array, Map, MapData};
use culvert_abi::{Address, Config, Endpoint, config_flag};
use culvert_harness::{Node, Proc, Workload, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, answered, connect_to, echo, only, serve, text};
use serde_json::Value;

use crate::{
    full_tables::nobodys_address,
    kernel_tables::{clear, decisions, fill, pinned, table},
    restart::start,
};

/// The server's second address.
const SECOND: &str = "10.77.1.111";

fn config(node: &Node) -> Result<Array<MapData, Config>> {
    let data = MapData::from_pin(pinned(node, "CONFIG"))?;
    Map::Array(data).try_into().context("map CONFIG")
}

fn wait_for_changing(node: &Node, wanted: bool) -> Result<()> {
    wait_until(SOON, "a change to begin or end", || {
        let changing = config(node)?.get(&0, 0)?.flags & config_flag::CHANGING != 0;
        Ok((changing == wanted).then_some(()))
    })
}

/// The mesh gives the server's first address to the server, or to somebody elsewhere.
fn give_the_first(scene: &mut Scene, to_the_server: bool, account: &str) -> Result<()> {
    let first = scene.server_a.address().to_string();
    let other = Workload {
        uid: "other".into(),
        name: "other".into(),
        workload_ips: vec![first.clone()],
        ..scene.workload(scene.pod_b())?.clone()
    };
    scene.change_mesh(|mesh| {
        mesh.workloads.retain(|workload| workload.uid != other.uid);
        let server = mesh.workload("server-a").expect("in the mesh");
        server.workload_ips = vec![SECOND.to_owned()];
        if to_the_server {
            server.workload_ips.insert(0, first);
        } else {
            mesh.workloads.push(other);
        }
        mesh.policies = vec![only(account)];
    })
}

fn hello(scene: &Scene) -> Result<Value> {
    let hello = ["--send", "hello", "--read", "5"];
    connect_to(&scene.client, &format!("{SECOND}:{PORT}"), &hello)
}

/// A change that denies the client, and of which the agent can write nothing about the server: the address that the change gives
/// back to it comes first, and finds no room. Returns what the client gets.
fn without_room_for_the_change(knobs: &'static str) -> Result<(Scene, Value)> {
    let mut scene = Scene::without(knobs)?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.server_a.add_address(SECOND.parse()?)?;
    give_the_first(&mut scene, true, "client")?;
    let workload = scene.workload(&scene.server_a)?;
    scene.agent1.unenrol(&workload.uid)?;
    scene.agent1.enrol_as(&scene.server_a, workload)?;
    give_the_first(&mut scene, false, "client")?;
    let first = match scene.server_a.address() {
        std::net::IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(_) => panic!("IPv4"),
    };
    let endpoint = wait_until(SOON, "the first address to be another's", || {
        let endpoints = table::<Address, Endpoint>(&scene.node1, "ENDPOINTS")?;
        let is_gone = endpoints.get(&first, 0).is_err();
        let (_, any) = endpoints.iter().flatten().next().context("an endpoint")?;
        Ok(is_gone.then_some(any))
    })?;
    wait_until(SOON, "the client to need no agent", || {
        let before = decisions(&scene.agent1, "admitted_direct")?;
        assert!(answered(&hello(&scene)?), "allowed until now");
        Ok((decisions(&scene.agent1, "admitted_direct")? > before).then_some(()))
    })?;
    let keys = fill(&scene.node1, "ENDPOINTS", 0, nobodys_address, endpoint)?;
    give_the_first(&mut scene, true, "nobody")?;
    wait_for_changing(&scene.node1, true)?;
    let report = hello(&scene)?;
    clear::<Address, Endpoint>(&scene.node1, "ENDPOINTS", &keys)?;
    Ok((scene, report))
}

#[test]
fn a_change_that_cannot_be_written_is_obeyed_by_the_agent() -> Result<()> {
    // Old verdicts are swept as well: by itself, the mark of the change is enough.
    for knobs in ["", "skip-sweep"] {
        let (scene, report) = without_room_for_the_change(knobs)?;
        assert!(!answered(&report), "{knobs}: {report}");
        assert!(decisions(&scene.agent1, "steered_changing")? >= 1);
        // It is written when there is room.
        wait_for_changing(&scene.node1, false)?;
        assert!(!answered(&hello(&scene)?), "{knobs}");
    }
    Ok(())
}

#[test]
fn twin_without_the_mark_of_a_change_the_old_policy_decides() -> Result<()> {
    let (scene, report) = without_room_for_the_change("skip-sweep,skip-changing")?;
    assert!(answered(&report), "{report}");
    assert_eq!(decisions(&scene.agent1, "steered_changing")?, 0);
    Ok(())
}

/// The agent is killed between the two ends of a change. Returns what the client gets whom the verdicts of before allow.
fn killed_in_a_change(knobs: &'static str) -> Result<(Scene, Value, Proc)> {
    let scene = Scene::without(knobs)?;
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    scene.agent1.kill()?;
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    let mut map = config(&scene.node1)?;
    let mut config = map.get(&0, 0)?;
    config.flags |= config_flag::CHANGING;
    map.set(0, config, 0)?;
    let report = echo(&scene.client, &scene.server_a)?;
    Ok((scene, report, server))
}

#[test]
fn what_an_agent_left_that_was_killed_in_a_change_decides_nothing() -> Result<()> {
    let (mut scene, report, _server) = killed_in_a_change("")?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    // Until the next one has decided.
    scene.agent1 = start(&scene.node1, "")?;
    scene.agent1.ready()?;
    wait_until(SOON, "direct connections", || {
        let before = decisions(&scene.agent1, "admitted_direct")?;
        let answered = answered(&echo(&scene.client, &scene.server_a)?);
        let direct = decisions(&scene.agent1, "admitted_direct")? > before;
        Ok((answered && direct).then_some(()))
    })
}

#[test]
fn twin_without_the_mark_of_a_change_what_was_half_written_decides() -> Result<()> {
    let (_scene, report, _server) = killed_in_a_change("skip-changing")?;
    assert!(answered(&report), "{report}");
    Ok(())
}
