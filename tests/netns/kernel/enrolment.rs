//! Pods come and go, nodes too: what is taken down leaves nothing behind and disturbs nobody.

use anyhow::{Result, anyhow};
use culvert_harness::{AgentOptions, Pod, culvert_binary, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, answered, connect, echo, hold, serve, text, unplug,
};
use nix::sys::signal::Signal;

use crate::{
    agent_gone::goes_on,
    kernel_tables::{claims, pinned},
};

const HELLO: [&str; 4] = ["--send", "hello", "--read", "5"];

/// Everything of a pod's network that enrolment changes.
pub fn network(pod: &Pod) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for arguments in [
        &["rule"][..],
        &["route", "show", "table", "all"],
        &["-6", "rule"],
        &["-6", "route", "show", "table", "all"],
    ] {
        found.push(pod.command("ip").args(arguments).run(SOON)?.success()?);
    }
    for key in [
        "net.ipv4.tcp_fwmark_accept",
        "net.ipv4.fwmark_reflect",
        "net.ipv6.fwmark_reflect",
        "net.ipv4.tcp_fastopen",
    ] {
        found.push(pod.netns().sysctl(key)?);
    }
    for port in [15001, 15006, 15008] {
        let open = pod
            .sockets()?
            .iter()
            .any(|socket| socket.local.port() == port);
        found.push(format!("{port}: {open}"));
    }
    Ok(found)
}

#[test]
fn a_released_pod_is_as_it_was_and_can_come_back() -> Result<()> {
    let scene = Scene::new()?;
    let (guest, outsider) = (scene.node1.pod("guest")?, scene.node1.pod("outsider")?);
    let _server = serve(&guest, "echo")?;
    let before = network(&guest)?;
    assert!(answered(&connect(&outsider, &guest, &HELLO)?));
    for _ in 0..2 {
        scene
            .agent1
            .enrol(&guest, "guest-uid", NAMESPACE, "guest", "guest")?;
        let during = network(&guest)?;
        assert!(
            during[0].contains("fwmark 0x539/0xffd") && during.contains(&"15006: true".to_owned()),
            "{during:?}"
        );
        assert!(
            !answered(&connect(&outsider, &guest, &HELLO)?),
            "the mesh does not know the pod"
        );
        scene.agent1.unenrol("guest-uid")?;
        assert_eq!(network(&guest)?, before);
        assert!(
            answered(&connect(&outsider, &guest, &HELLO)?),
            "plain again"
        );
    }
    Ok(())
}

#[test]
fn a_pod_released_by_a_later_agent_is_as_it_was() -> Result<()> {
    let scene = Scene::new()?;
    let guest = scene.node1.pod("guest")?;
    let before = network(&guest)?;
    scene
        .agent1
        .enrol(&guest, "guest-uid", NAMESPACE, "guest", "guest")?;
    scene.agent1.kill()?;
    let agent = scene.node1.start_agent(AgentOptions::default())?;
    agent.ready()?;
    agent.unenrol("guest-uid")?;
    assert_eq!(network(&guest)?, before);
    Ok(())
}

#[test]
fn a_flow_survives_the_release_of_its_server() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let held = hold(&scene.client, &scene.server_a)?;
    goes_on(&held, "enrolled")?;
    let workload = scene.workload(&scene.server_a)?;
    scene.agent1.unenrol(&workload.uid)?;
    goes_on(&held, "released")?;
    scene.agent1.enrol_as(&scene.server_a, workload)?;
    goes_on(&held, "enrolled again")?;
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    Ok(())
}

#[test]
fn the_flows_of_a_released_client_are_nobodys_and_judged_so() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let held = hold(&scene.client, &scene.server_a)?;
    goes_on(&held, "enrolled")?;
    scene.agent1.unenrol(&scene.workload(&scene.client)?.uid)?;
    let end = held.wait_for_event("end", SOON)?;
    assert!(
        ["ECONNRESET", "ECONNABORTED"].contains(&text(&end, "how")),
        "{end}"
    );
    assert!(
        !answered(&echo(&scene.client, &scene.server_a)?),
        "a pod without an identity"
    );
    Ok(())
}

/// At once, or by what the agent tries again each second.
#[test]
fn the_flows_of_a_released_client_do_not_wait_for_what_is_on_its_way() -> Result<()> {
    let scene = Scene::new()?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(&scene.intruder, "echo")?,
    );
    for server in [&scene.server_a, &scene.intruder] {
        scene.warm(&scene.client, server)?;
    }
    let held = hold(&scene.client, &scene.server_a)?;
    goes_on(&held, "enrolled")?;
    unplug(&scene.intruder)?;
    let _on_its_way = scene
        .client
        .probe()?
        .args(["connect", "--to", &scene.intruder.at(PORT)])
        .spawn()?;
    let own = scene.client.netns().cookie()?;
    let is_on_its_way = || -> Result<bool> {
        let mut claims = claims(&scene.node1)?.into_iter();
        Ok(claims.any(|(_, claim)| claim.client_netns == own))
    };
    wait_until(SOON, "a claim", || Ok(is_on_its_way()?.then_some(())))?;
    let uid = &scene.workload(&scene.client)?.uid;
    std::thread::scope(|scope| -> Result<()> {
        let released = scope.spawn(|| scene.agent1.unenrol(uid));
        held.wait_for_event("end", SOON)?;
        assert!(is_on_its_way()?, "it was cut after that");
        released.join().map_err(|_| anyhow!("panicked"))?
    })
}

#[test]
fn unloading_one_node_leaves_the_other_alone() -> Result<()> {
    let scene = Scene::new()?;
    let (_near, _far) = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    scene.agent1.stop(Signal::SIGKILL)?;
    let pins = scene.node1.pin_directory();
    assert!(pinned(&scene.node1, "PODS").exists());
    let pin_dir = pins.to_string_lossy();
    scene
        .node1
        .command(culvert_binary()?)
        .args(["unload", "--pin-dir", pin_dir.as_ref()])
        .run(SOON)?
        .success()?;
    assert!(!pins.exists());
    // The first node is without a mesh now, the second is not.
    assert!(answered(&echo(&scene.intruder, &scene.server_a)?));
    assert!(!answered(&echo(&scene.intruder, scene.server_b()?)?));
    // The mesh still says that this pod has a tunnel's end: its peers do not fall back to plaintext.
    assert!(!answered(&echo(scene.server_b()?, &scene.server_a)?));
    assert!(pinned(&scene.node2, "PODS").exists());
    Ok(())
}
