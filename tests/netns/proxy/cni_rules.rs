//! istio-cni's redirection inside a pod: taken over where the kernel part steers, given back when the pod leaves, and nothing else touched.

use anyhow::Result;
use culvert_harness::{
    AgentOptions, Pod,
    cni_rules::{Backend, program, redirection, shell},
    culvert_binary,
};
use culvert_tests::scene::{SOON, Scene, Setting, answered, connect_to, echo, serve_on};
use nix::sys::signal::Signal;

const HELLO: [&str; 4] = ["--send", "hello", "--read", "5"];

fn scene() -> Result<Scene> {
    Scene::with(Setting {
        ipv6: true,
        ..Setting::default()
    })
}

/// Takes a pod out of the mesh and has istio-cni's rules made in it, beside some that are the pod's own; returns what it has then.
fn programmed(scene: &Scene, pod: &Pod, backend: Backend) -> Result<String> {
    scene.agent1.unenrol(&scene.workload(pod)?.uid)?;
    let own = "iptables-legacy -t nat -N MINE\niptables-legacy -t nat -A OUTPUT -p udp --dport 9 -j MINE\nip6tables-legacy -A INPUT -p udp --dport 9 -j DROP\nip rule add fwmark 0x222 pref 100 lookup 7";
    shell(pod, own)?;
    program(pod, backend)?;
    redirection(pod, backend)
}

fn has_cni_s(found: &str) -> bool {
    ["ISTIO", "0x111", "local default"]
        .iter()
        .any(|part| found.contains(part))
}

fn enrolled(scene: &Scene, pod: &Pod, backend: Backend) -> Result<()> {
    scene.agent1.enrol_as(pod, scene.workload(pod)?)?;
    let found = redirection(pod, backend)?;
    assert!(!has_cni_s(&found), "{found}");
    let own = redirection(pod, Backend::Legacy)?;
    for part in [
        "-A OUTPUT -p udp -m udp --dport 9 -j MINE",
        "-A INPUT -p udp -m udp --dport 9 -j DROP",
        "fwmark 0x222",
    ] {
        assert!(own.contains(part), "{part}: {own}");
    }
    Ok(())
}

fn works(scene: &Scene) -> Result<()> {
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    let address = scene.server_a.at_v6(culvert_tests::scene::PORT)?;
    assert!(answered(&connect_to(&scene.client, &address, &HELLO)?));
    assert!(!answered(&echo(&scene.intruder, &scene.server_a)?));
    Ok(())
}

fn taken_over_and_given_back(backend: Backend) -> Result<()> {
    let scene = scene()?;
    let _server = scene
        .server_a
        .probe()?
        .args(["serve", "--port", "7000", "--mode", "echo", "--bind", "::"])
        .spawn()?;
    for pod in [&scene.server_a, &scene.client] {
        let before = programmed(&scene, pod, backend)?;
        assert!(has_cni_s(&before), "{before}");
        enrolled(&scene, pod, backend)?;
        works(&scene)?;
        scene.agent1.unenrol(&scene.workload(pod)?.uid)?;
        assert_eq!(redirection(pod, backend)?, before);
        enrolled(&scene, pod, backend)?;
        works(&scene)?;
    }
    Ok(())
}

#[test]
fn istio_cni_s_rules_are_taken_over_and_given_back() -> Result<()> {
    taken_over_and_given_back(Backend::Legacy)
}

#[test]
fn those_of_nftables_are_taken_over_and_given_back_as_well() -> Result<()> {
    taken_over_and_given_back(Backend::Nft)
}

#[test]
fn a_later_agent_gives_back_what_an_earlier_one_took() -> Result<()> {
    let scene = scene()?;
    let before = programmed(&scene, &scene.server_a, Backend::Legacy)?;
    enrolled(&scene, &scene.server_a, Backend::Legacy)?;
    scene.agent1.kill()?;
    let agent = scene.node1.start_agent(AgentOptions::default())?;
    agent.ready()?;
    let found = redirection(&scene.server_a, Backend::Legacy)?;
    assert!(!has_cni_s(&found), "{found}");
    agent.unenrol(&scene.workload(&scene.server_a)?.uid)?;
    assert_eq!(redirection(&scene.server_a, Backend::Legacy)?, before);
    Ok(())
}

#[test]
fn unloading_gives_back_what_was_taken() -> Result<()> {
    let scene = scene()?;
    let before = programmed(&scene, &scene.server_a, Backend::Legacy)?;
    enrolled(&scene, &scene.server_a, Backend::Legacy)?;
    scene.agent1.stop(Signal::SIGKILL)?;
    let (pins, admin) = (scene.node1.pin_directory(), scene.agent1.admin_socket());
    let (pins, admin) = (pins.to_string_lossy(), admin.to_string_lossy());
    scene
        .node1
        .command(culvert_binary()?)
        .args(["unload", "--pin-dir", pins.as_ref()])
        .args(["--admin-socket", admin.as_ref()])
        .run(SOON)?
        .success()?;
    assert_eq!(redirection(&scene.server_a, Backend::Legacy)?, before);
    Ok(())
}

#[test]
fn a_rule_of_somebody_else_s_that_leads_there_keeps_the_pod_out() -> Result<()> {
    let scene = scene()?;
    programmed(&scene, &scene.server_a, Backend::Legacy)?;
    shell(
        &scene.server_a,
        "iptables-legacy -t nat -A MINE -p tcp -j ISTIO_OUTPUT",
    )?;
    let before = redirection(&scene.server_a, Backend::Legacy)?;
    let refused = scene
        .agent1
        .enrol_as(&scene.server_a, scene.workload(&scene.server_a)?);
    let refused = format!("{:#}", refused.unwrap_err());
    assert!(
        refused.contains("-A MINE -p tcp -j ISTIO_OUTPUT"),
        "{refused}"
    );
    assert_eq!(redirection(&scene.server_a, Backend::Legacy)?, before);
    Ok(())
}

#[test]
fn a_missing_program_is_named() -> Result<()> {
    let scene = Scene::with(Setting {
        env: vec![("PATH", "/nowhere".to_owned())],
        ..Setting::default()
    })?;
    let _server = serve_on(&scene.server_a, "echo", 7001)?;
    programmed(&scene, &scene.server_a, Backend::Legacy)?;
    let refused = scene
        .agent1
        .enrol_as(&scene.server_a, scene.workload(&scene.server_a)?);
    let refused = format!("{:#}", refused.unwrap_err());
    assert!(refused.contains("iptables-legacy-save"), "{refused}");
    Ok(())
}
