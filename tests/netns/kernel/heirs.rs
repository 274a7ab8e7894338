//! An address changes its owner: what the kernel part recorded for the old one is nothing to the new one.

use anyhow::Result;
use culvert_harness::{PodOptions, Proc};
use culvert_tests::scene::{Scene, answered, connect_to, serve_on, text};
use serde_json::Value;

use crate::kernel_tables::decisions;

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
