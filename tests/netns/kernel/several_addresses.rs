//! A pod with several addresses is one pod: reached at each, known from each, and judged by the one it uses.

use std::net::IpAddr;

use anyhow::Result;
use culvert_harness::{AgentOptions, Match, Pod, Policy, Workload, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect_to, mesh_status, text,
};
use serde_json::Value;

use crate::{
    ipv6::{serve_both, wait_for_accepted},
    kernel_tables::{decisions, wait_for_no_claims},
    restart::entry,
};

const HELLO: [&str; 4] = ["--send", "hello", "--read", "5"];
const SECOND: [&str; 2] = ["10.77.1.101", "fd77::1:101"];
const SERVER: [&str; 2] = ["10.77.1.111", "fd77::1:111"];

/// `client` and `server-a` have a second address of either family.
fn scene(policies: Vec<Policy>) -> Result<Scene> {
    let mut scene = Scene::with(Setting {
        ipv6: true,
        policies: Some(policies),
        ..Setting::default()
    })?;
    let (client, server) = (scene.client.clone(), scene.server_a.clone());
    give(&mut scene, &client, SECOND)?;
    give(&mut scene, &server, SERVER)?;
    Ok(scene)
}

fn give(scene: &mut Scene, pod: &Pod, addresses: [&str; 2]) -> Result<()> {
    for address in addresses {
        pod.add_address(address.parse()?)?;
    }
    scene.change_mesh(|mesh| {
        let workload = mesh.workload(pod.name()).expect("in the mesh");
        workload.workload_ips.extend(addresses.map(str::to_owned));
    })?;
    let workload = scene.workload(pod)?;
    scene.agent1.unenrol(&workload.uid)?;
    scene.agent1.enrol_as(pod, workload)
}

fn at(address: &str) -> String {
    match address.parse() {
        Ok(IpAddr::V6(address)) => format!("[{address}]:{PORT}"),
        _ => format!("{address}:{PORT}"),
    }
}

fn hello_from(pod: &Pod, source: &str, to: &str) -> Result<Value> {
    connect_to(pod, to, &[&["--bind-ip", source], &HELLO[..]].concat())
}

#[test]
fn each_address_is_reached_directly_and_each_may_be_the_source() -> Result<()> {
    let scene = scene(Vec::new())?;
    let server = serve_both(&scene.server_a, "echo")?;
    let own = scene.client.addresses();
    for (family, first) in own.iter().enumerate() {
        let sources = [&first.to_string(), SECOND[family]];
        let to = [
            &scene.server_a.addresses()[family].to_string(),
            SERVER[family],
        ];
        for to in to.map(at) {
            // The first of all makes the verdict.
            let report = connect_to(&scene.client, &to, &HELLO)?;
            assert!(answered(&report), "{to}: {report}");
            for source in sources {
                let mark = scene.agent1.log().mark();
                let report = hello_from(&scene.client, source, &to)?;
                assert!(answered(&report), "{source} to {to}: {report}");
                let fields = [
                    ("path", "direct"),
                    ("src.addr", text(&report, "local")),
                    ("src.workload", "client"),
                    ("dst.addr", &to),
                    ("dst.workload", "server-a"),
                ];
                scene.agent1.wait_for_access(mark, &fields, SOON)?;
            }
        }
    }
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 8);
    wait_for_accepted(&server, 12)?;
    wait_for_no_claims(&scene.node1)
}

#[test]
fn another_node_sees_the_address_that_the_client_chose() -> Result<()> {
    let scene = scene(Vec::new())?;
    let server = serve_both(scene.server_b()?, "echo")?;
    let targets = scene.server_b()?.addresses();
    for (family, target) in targets.iter().enumerate() {
        for source in [
            scene.client.addresses()[family].to_string(),
            SECOND[family].into(),
        ] {
            let report = hello_from(&scene.client, &source, &at(&target.to_string()))?;
            assert!(answered(&report), "{source}: {report}");
            let plain = |address: &str| address.replace(['[', ']'], "").replace("::ffff:", "");
            wait_until(SOON, "the server to see the client's address", || {
                let mut peers = server.events("accepted").into_iter();
                let local = plain(text(&report, "local"));
                Ok(peers
                    .any(|event| plain(text(&event, "peer")) == local)
                    .then_some(()))
            })?;
        }
    }
    Ok(())
}

/// Only the client's second addresses are allowed.
fn only_the_second() -> Policy {
    let nets = ["10.77.1.101/32", "fd77::1:101/128"];
    Policy::allow(NAMESPACE, "second").rule(vec![nets.map(Match::source).to_vec()])
}

#[test]
fn a_policy_on_addresses_judges_the_one_that_is_used() -> Result<()> {
    let scene = scene(vec![only_the_second()])?;
    let _servers = (
        serve_both(&scene.server_a, "echo")?,
        serve_both(scene.server_b()?, "echo")?,
    );
    for server in [&scene.server_a, scene.server_b()?] {
        for (family, target) in server.addresses().iter().enumerate() {
            let to = at(&target.to_string());
            let first = scene.client.addresses()[family].to_string();
            for attempt in 0..3 {
                let report = hello_from(&scene.client, &first, &to)?;
                assert!(!answered(&report), "{attempt}: {first} to {to}: {report}");
                let report = hello_from(&scene.client, SECOND[family], &to)?;
                assert!(answered(&report), "{attempt}: second to {to}: {report}");
            }
        }
    }
    Ok(())
}

#[test]
fn an_address_that_the_mesh_does_not_name_is_nobody_s() -> Result<()> {
    let scene = Scene::new()?;
    scene.server_a.add_address(SERVER[0].parse()?)?;
    let workload = scene.workload(&scene.server_a)?;
    scene.agent1.unenrol(&workload.uid)?;
    scene.agent1.enrol_as(&scene.server_a, workload)?;
    let server = serve_both(&scene.server_a, "echo")?;
    for _ in 0..2 {
        let report = connect_to(&scene.client, &at(SERVER[0]), &HELLO)?;
        assert!(!answered(&report), "{report}");
    }
    assert!(server.events("accepted").is_empty());
    Ok(())
}

#[test]
fn all_addresses_are_shown_and_kept_by_the_next_agent() -> Result<()> {
    let mut scene = scene(Vec::new())?;
    let _server = serve_both(&scene.server_a, "echo")?;
    let shown = |scene: &Scene| -> Result<Value> {
        let pods = scene.agent1.cli(["pod", "list", "--json"])?.success()?;
        let pods: Value = serde_json::from_str(&pods)?;
        let pods = pods.as_array().expect("a list").clone();
        let found = pods.into_iter().find(|pod| text(pod, "name") == "server-a");
        Ok(found.expect("server-a")["addresses"].clone())
    };
    let before = shown(&scene)?;
    assert_eq!(before.as_array().map(Vec::len), Some(4), "{before}");
    scene.agent1.kill()?;
    scene.agent1 = scene.node1.start_agent(AgentOptions::default())?;
    scene.agent1.ready()?;
    mesh_status(&scene.agent1)?;
    assert_eq!(shown(&scene)?, before);
    for to in SERVER.map(at) {
        let report = connect_to(&scene.client, &to, &HELLO)?;
        assert!(answered(&report), "{to}: {report}");
    }
    Ok(())
}

#[test]
fn a_pod_cannot_take_a_second_address_of_another() -> Result<()> {
    let scene = scene(Vec::new())?;
    let guest = scene.node1.pod("guest")?;
    guest.add_address(SERVER[1].parse()?)?;
    let workload = Workload::of_pod(&guest, NAMESPACE, "guest");
    scene.agent1.enrol_as(&guest, &workload)?;
    // The mesh says whose it is: it is left out.
    let entry = entry(&scene.agent1, &workload.uid)?;
    let addresses = entry["addresses"].as_array().cloned().unwrap_or_default();
    assert!(!addresses.is_empty(), "{entry}");
    assert!(
        addresses.iter().all(|address| address != SERVER[1]),
        "{entry}"
    );
    Ok(())
}
