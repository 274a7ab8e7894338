//! istio-cni's redirection inside a pod: taken over where the kernel part steers, given back when the pod leaves, and nothing else touched.

use anyhow::Result;
use culvert_harness::{
    AgentOptions, Pod,
    cni_rules::{Backend, program, redirection, shell, unprogram},
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

/// Whether there are rules in istio-cni's chains.
fn has_cni_s(found: &str) -> bool {
    found.contains("-A ISTIO_")
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

/// istio-cni takes its part away before it says that the pod leaves, and does not say so if something is missing.
#[test]
fn istio_cni_takes_its_part_away_first() -> Result<()> {
    let scene = scene()?;
    for backend in [Backend::Legacy, Backend::Nft] {
        let server = &scene.server_a;
        scene.agent1.unenrol(&scene.workload(server)?.uid)?;
        let clean = redirection(server, backend)?;
        program(server, backend)?;
        scene.agent1.enrol_as(server, scene.workload(server)?)?;
        unprogram(server, backend)?;
        scene.agent1.unenrol(&scene.workload(server)?.uid)?;
        let found = redirection(server, backend)?;
        let built_in = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| !line.starts_with([':', '*']));
            let lines = lines.filter(|line| *line != "COMMIT");
            lines.map(str::to_owned).collect()
        };
        assert_eq!(built_in(&found), built_in(&clean));
        assert!(!found.contains("ISTIO"), "{found}");
        scene.agent1.enrol_as(server, scene.workload(server)?)?;
    }
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
