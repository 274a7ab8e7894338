//! Both ends verify a direct flow: a client whose SYN was not admitted by the pod it was meant for sends nothing.

use anyhow::{Result, bail};
use culvert_harness::{Pod, PodOptions, Proc};
use culvert_tests::scene::{
    PORT, SOON, Scene, answered, connect_to, echo, serve, serve_on, text, unplug,
};
use serde_json::Value;

use crate::kernel_tables::{decisions, flows, wait_for_no_claims};

pub const MARKER: &str = "for-the-server-only";
/// Where the impostor listens and no real server does.
const OTHER: u16 = 7001;

/// What an impostor got, and what the client saw of it.
pub struct Impostor {
    pub report: Value,
    server: Proc,
}

/// A pod that was never enrolled, with the address of one that has lost its link.
pub fn impostor_at(scene: &Scene, victim: &Pod) -> Result<Pod> {
    let std::net::IpAddr::V4(address) = victim.address() else {
        bail!("IPv4")
    };
    let options = PodOptions {
        address: Some(address),
        ..PodOptions::default()
    };
    let impostor = scene.node1.pod_with("impostor", options)?;
    let flush = scene.client.command("ip").args(["neigh", "flush", "all"]);
    flush.run(SOON)?.success()?;
    Ok(impostor)
}

impl Impostor {
    /// `server-a` loses its link, somebody who was never enrolled takes its address, and the client, whom a cached verdict
    /// lets connect directly, has something to say to it.
    pub fn meets_the_client(scene: &Scene, agent_lives: bool) -> Result<Self> {
        let server = serve(&scene.server_a, "sink")?;
        scene.warm(&scene.client, &scene.server_a)?;
        wait_for_no_claims(&scene.node1)?;
        drop(server);
        unplug(&scene.server_a)?;
        let impostor = impostor_at(scene, &scene.server_a)?;
        let server = serve(&impostor, "collect")?;
        if !agent_lives {
            scene.agent1.kill()?;
        }
        let say = ["--send", MARKER, "--half-close", "--read-all"];
        let report = connect_to(&scene.client, &impostor.at(PORT), &say)?;
        Ok(Self { report, server })
    }

    /// Bytes of the client that the impostor read, at the end of the connection that it accepted.
    pub fn read(&self) -> Result<u64> {
        let closed = self.server.wait_for_event("closed", SOON)?;
        Ok(closed["bytes_read"].as_u64().unwrap_or(u64::MAX))
    }
}

#[test]
fn an_impostor_at_a_server_s_address_reads_nothing() -> Result<()> {
    let scene = Scene::new()?;
    let log = scene.agent1.log().mark();
    let impostor = Impostor::meets_the_client(&scene, true)?;
    assert_eq!(impostor.read()?, 0, "{}", impostor.report);
    let agent = &scene.agent1;
    agent
        .process()
        .wait_for_line_after(log, "isolated_not_admitted", SOON)?;
    assert_eq!(decisions(agent, "isolated_not_admitted")?, 1);
    assert_eq!(decisions(agent, "isolation_failed")?, 0);
    wait_for_no_claims(&scene.node1)?;
    assert!(flows(&scene.node1)?.is_empty());
    Ok(())
}

#[test]
fn an_impostor_reads_nothing_without_the_agent_either() -> Result<()> {
    let scene = Scene::new()?;
    let impostor = Impostor::meets_the_client(&scene, false)?;
    assert_ne!(text(&impostor.report, "send"), "ok", "{}", impostor.report);
    assert_eq!(impostor.read()?, 0, "{}", impostor.report);
    Ok(())
}

#[test]
fn twin_without_the_check_of_admission_an_impostor_reads_everything() -> Result<()> {
    let scene = Scene::without("skip-admitted")?;
    let impostor = Impostor::meets_the_client(&scene, true)?;
    assert_eq!(impostor.read()?, MARKER.len() as u64, "{}", impostor.report);
    Ok(())
}

#[test]
fn the_check_of_admission_disturbs_no_connection_that_was_admitted() -> Result<()> {
    let scene = Scene::new()?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve_on(&scene.server_a, "once", OTHER)?,
    );
    // With and without SYN cookies: the claim must still be there when the client's end is established.
    for cookies in ["1", "2"] {
        let key = "net.ipv4.tcp_syncookies";
        scene.server_a.netns().set_sysctl(key, cookies)?;
        for _ in 0..3 {
            let report = echo(&scene.client, &scene.server_a)?;
            assert!(answered(&report), "{report}");
        }
        let to = scene.server_a.at(OTHER);
        let many = ["conn", "--to", &to, "--count", "500", "--threads", "4"];
        let load = scene.client.probe()?.args(many).run(SOON)?.json()?;
        assert_eq!(load["errors"], 0, "{load}");
    }
    assert!(decisions(&scene.agent1, "direct")? >= 1000);
    assert_eq!(decisions(&scene.agent1, "isolated_not_admitted")?, 0);
    Ok(())
}
