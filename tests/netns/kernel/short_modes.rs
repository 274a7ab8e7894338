//! Who says which flows are short-circuited: the agent's setting, annotations, and these by port.

use anyhow::Result;
use culvert_harness::{AgentOptions, Namespace, Proc, wait_until};
use culvert_tests::scene::{NAMESPACE, PORT, SOON, Scene, Setting, mesh_status};

use crate::short_circuit::{COUNT, busy_pair_at, bytes, short_flows, wait_until_all_entered};

const VARIABLE: &str = "CULVERT_SHORT_CIRCUIT";
const ANNOTATION: &str = "culvert.dev/short-circuit";
const OTHER_PORT: u16 = 7001;

/// Agents that have this setting.
fn agents_with(mode: &str) -> Result<Scene> {
    Scene::with(Setting {
        env: vec![(VARIABLE, mode.to_owned())],
        ..Setting::default()
    })
}

/// What the namespace or a pod says, by its name.
fn say(scene: &mut Scene, words: &[(&str, &str)]) -> Result<()> {
    scene.change_mesh(|mesh| {
        for (name, value) in words {
            match mesh.workload(name) {
                Some(pod) => *pod = pod.clone().annotated(ANNOTATION, value),
                None => mesh.namespaces = vec![Namespace::annotated(name, ANNOTATION, value)],
            }
        }
    })
}

/// More than the flows carry before they are proposed.
fn wait_until_much_was_carried(client: &Proc) -> Result<()> {
    wait_until(SOON, "the flows to carry something", || {
        Ok((bytes(client)? > 100 * COUNT as u64).then_some(()))
    })
}

#[test]
fn agents_setting_is_enough_for_pods_that_say_nothing() -> Result<()> {
    let scene = agents_with("on")?;
    let (_client, _server) = busy_pair_at(&scene, PORT)?;
    wait_until_all_entered(&scene)
}

#[test]
fn the_next_agents_setting_counts_for_pods_that_it_takes_over() -> Result<()> {
    let mut scene = agents_with("off")?;
    scene.agent1.kill()?;
    let setting = (VARIABLE.to_owned(), "on".to_owned());
    scene.agent1 = scene.node1.start_agent(AgentOptions {
        env: [setting].into(),
        ..AgentOptions::default()
    })?;
    scene.agent1.ready()?;
    let (_client, _server) = busy_pair_at(&scene, PORT)?;
    wait_until_all_entered(&scene)
}

#[test]
fn a_pods_word_counts_before_the_agents_setting() -> Result<()> {
    for word in ["off", "auto", "on,7000=off"] {
        let mut scene = agents_with("on")?;
        say(&mut scene, &[("server-a", word)])?;
        let (client, _server) = busy_pair_at(&scene, PORT)?;
        wait_until_much_was_carried(&client)?;
        assert_eq!(scene.short_circuited()?, 0.0, "{word}");
        assert_eq!(short_flows(&scene)?, [], "{word}");
    }
    Ok(())
}

#[test]
fn a_port_may_be_short_circuited_where_others_are_not() -> Result<()> {
    for words in [
        [(NAMESPACE, "7000=on")].as_slice(),
        &[("client", "on"), ("server-a", "7000=on")],
        &[("client", "7000=on"), ("server-a", "on,7001=off")],
        &[(NAMESPACE, "on,7001=on"), ("client", "7001=off")],
    ] {
        let mut scene = agents_with("off")?;
        say(&mut scene, words)?;
        let (others, _other_server) = busy_pair_at(&scene, OTHER_PORT)?;
        wait_until_much_was_carried(&others)?;
        let (_client, _server) = busy_pair_at(&scene, PORT)?;
        wait_until_all_entered(&scene)?;
        let flows = short_flows(&scene)?;
        assert!(
            flows.iter().all(|(key, _)| key.server_port == PORT),
            "{words:?}"
        );
    }
    Ok(())
}

#[test]
fn an_annotation_that_is_not_understood_leaves_the_mesh_as_it_was() -> Result<()> {
    let mut scene = Scene::of_a_file()?;
    say(&mut scene, &[("server-a", "on,7000=maybe")])?;
    let status = mesh_status(&scene.agent1)?;
    for part in [ANNOTATION, "on,7000=maybe", "none of on, off and auto"] {
        assert!(status.contains(part), "{part} is not in {status}");
    }
    Ok(())
}

/// The flows go on, and nothing of them is redirected any more.
fn wait_until_nothing_is_redirected(scene: &Scene, client: &Proc) -> Result<()> {
    let redirected = || -> Result<u64> {
        let flows = short_flows(scene)?;
        assert_eq!(flows.len(), COUNT);
        let sides = flows.iter().flat_map(|(_, flow)| flow.sides);
        Ok(sides.map(|side| side.messages).sum())
    };
    wait_until(SOON, "the flows to be plain TCP", || {
        let (before, carried) = (redirected()?, bytes(client)?);
        wait_until(SOON, "the flows to go on", || {
            Ok((bytes(client)? > carried + 10 * COUNT as u64).then_some(()))
        })?;
        Ok((redirected()? == before).then_some(()))
    })
}

#[test]
fn flows_are_plain_tcp_again_when_their_mode_changes() -> Result<()> {
    let mut scene = agents_with("on")?;
    let (client, _server) = busy_pair_at(&scene, PORT)?;
    wait_until_all_entered(&scene)?;
    say(&mut scene, &[("server-a", "off")])?;
    wait_until_nothing_is_redirected(&scene, &client)
}

#[test]
fn an_agent_stops_what_the_one_before_has_entered_where_its_own_setting_says_so() -> Result<()> {
    let mut scene = agents_with("on")?;
    let (client, _server) = busy_pair_at(&scene, PORT)?;
    wait_until_all_entered(&scene)?;
    scene.agent1.kill()?;
    let setting = (VARIABLE.to_owned(), "off".to_owned());
    scene.agent1 = scene.node1.start_agent(AgentOptions {
        env: [setting].into(),
        ..AgentOptions::default()
    })?;
    scene.agent1.ready()?;
    wait_until_nothing_is_redirected(&scene, &client)
}
