//! An address changes its owner: what the kernel part recorded for the old one is nothing to the new one.

use anyhow::Result;
use culvert_harness::{Pod, PodOptions, Proc, Workload};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, answered, connect_to, serve_on, text, unplug,
};
use serde_json::Value;

use crate::{
    agent_gone::goes_on,
    ipv6::{dual_stack, serve_both},
    kernel_tables::decisions,
};

const SOURCE: u16 = 40001;
const LATER: u16 = 7001;

/// The client is refused by a port on which nobody listens, and leaves; its address goes to a pod that nobody enrolled, and
/// then somebody listens.
fn inherit_an_address(scene: &Scene) -> Result<(Value, Proc)> {
    let (to, port) = (scene.server_a.at(LATER), SOURCE.to_string());
    // The agent learns the verdict; then the kernel part admits, and the server's kernel refuses.
    connect_to(&scene.client, &to, &["--read", "1"])?;
    let refused = connect_to(&scene.client, &to, &["--bind-port", &port])?;
    assert_eq!(text(&refused, "connect"), "ECONNREFUSED", "{refused}");
    assert!(
        decisions(&scene.agent1, "admitted_direct")? >= 1,
        "the refused connect had a claim"
    );
    scene.client.remove()?;
    let std::net::IpAddr::V4(address) = scene.client.address() else {
        panic!("IPv4")
    };
    let heir = scene.node1.pod_with(
        "heir",
        PodOptions {
            address: Some(address),
            ..PodOptions::default()
        },
    )?;
    let server = serve_on(&scene.server_a, "echo", LATER)?;
    let report = connect_to(
        &heir,
        &to,
        &["--bind-port", &port, "--send", "hello", "--read", "5"],
    )?;
    Ok((report, server))
}

#[test]
fn the_heir_of_an_address_gets_nothing_from_a_refused_connect() -> Result<()> {
    let scene = Scene::new()?;
    let (report, server) = inherit_an_address(&scene)?;
    assert!(!answered(&report), "{report}");
    assert!(
        server.events("accepted").is_empty(),
        "{:?}",
        server.events("accepted")
    );
    Ok(())
}

#[test]
fn twin_with_claims_kept_the_heir_is_admitted() -> Result<()> {
    let (report, _server) = inherit_an_address(&Scene::without("keep-claims,skip-sequence")?)?;
    assert!(answered(&report), "{report}");
    Ok(())
}

/// The client leaves without a word while a flow is open, and its addresses go to a pod of the mesh with another identity.
fn succeed(scene: &mut Scene, account: &str) -> Result<(Pod, Proc)> {
    let port = SOURCE.to_string();
    let to = scene.server_a.at_v6(PORT)?;
    for to in [&to, &scene.server_a.at(PORT)] {
        let report = connect_to(&scene.client, to, &["--send", "hello", "--read", "5"])?;
        assert!(answered(&report), "{report}");
    }
    let hold = ["connect", "--to", &to, "--bind-port", &port, "--hold"];
    let held = scene.client.probe()?.args(hold).stdin().spawn()?;
    goes_on(&held, "before")?;
    unplug(&scene.client)?;
    scene.agent1.unenrol(&scene.workload(&scene.client)?.uid)?;
    scene.client.remove()?;
    let std::net::IpAddr::V4(address) = scene.client.address() else {
        panic!("IPv4")
    };
    let options = PodOptions {
        address: Some(address),
        address_v6: scene.client.address_v6(),
        ..PodOptions::default()
    };
    let heir = scene.node1.pod_with("heir", options)?;
    let flush = ["-6", "neigh", "flush", "all"];
    let ip = scene.server_a.command("ip").args(flush);
    ip.run(SOON)?.success()?;
    let workload = Workload::of_pod(&heir, NAMESPACE, account);
    scene.change_mesh(|mesh| {
        mesh.workloads.retain(|workload| workload.name != "client");
        mesh.workloads.push(workload.clone());
    })?;
    scene.agent1.enrol_as(&heir, &workload)?;
    Ok((heir, held))
}

/// The heir connects from where the old flow was, which its server may not have noticed yet.
fn connect_as_heir(scene: &Scene, heir: &Pod) -> Result<[Value; 2]> {
    let port = SOURCE.to_string();
    let bound = ["--bind-port", &port, "--reuse", "--send", "hello"];
    let arguments = [&bound[..], &["--read", "5"]].concat();
    Ok([
        connect_to(heir, &scene.server_a.at_v6(PORT)?, &arguments)?,
        connect_to(heir, &scene.server_a.at(PORT), &arguments)?,
    ])
}

#[test]
fn the_heir_of_an_open_flow_is_judged_as_itself() -> Result<()> {
    for (account, allowed) in [("intruder", false), ("client", true)] {
        let mut scene = dual_stack()?;
        let _server = serve_both(&scene.server_a, "echo")?;
        let (heir, held) = succeed(&mut scene, account)?;
        for _ in 0..2 {
            for report in connect_as_heir(&scene, &heir)? {
                assert_eq!(answered(&report), allowed, "{account}: {report}");
            }
        }
        drop(held);
    }
    Ok(())
}
