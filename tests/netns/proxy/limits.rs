//! Who takes too much harms only itself, and an agent that ends lets go of connections in order.

use std::{
    io::Read as _,
    net::{SocketAddr, TcpStream},
};

use anyhow::Result;
use culvert_harness::{Pod, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, Setting, answered, echo, hold, serve, text};
use nix::sys::signal::Signal;

use super::peer::TUNNEL_PORT;

/// Connections to a pod's tunnel port that one address may have before it has proved an identity.
const SHARE: usize = 128;
/// What all ports of a pod have together where a knob makes them share.
const ALL: usize = 4096;

/// Connections to a tunnel port that never say a word, and what became of each.
fn silent(from: &Pod, to: &Pod, count: usize) -> Result<Vec<std::io::Result<TcpStream>>> {
    let tunnel = SocketAddr::new(to.address(), TUNNEL_PORT);
    from.in_netns(|| {
        (0..count)
            .map(|_| TcpStream::connect_timeout(&tunnel, SOON))
            .collect()
    })
}

#[test]
fn peers_that_do_not_speak_hold_nobody_up() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(scene.server_b()?, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    // As many as one address may have.
    let silent = silent(&stranger, scene.server_b()?, SHARE)?;
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    assert!(silent.iter().all(Result::is_ok));
    Ok(())
}

/// Somebody without a certificate takes every place it can get at `server-b`'s tunnel port. Tells whether others still reach
/// `server-b`, and whether it still reaches others.
fn one_takes_all(knobs: &'static str) -> Result<(bool, bool)> {
    let scene = Scene::with(Setting {
        knobs,
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let _servers = (
        serve(scene.server_b()?, "echo")?,
        serve(&scene.client, "echo")?,
    );
    let stranger = scene.node1.pod("stranger")?;
    let most = if knobs.is_empty() { SHARE } else { ALL };
    let held = silent(&stranger, scene.server_b()?, ALL + 100)?;
    let into = answered(&echo(&scene.client, scene.server_b()?)?);
    let out = answered(&echo(scene.server_b()?, &scene.client)?);
    // What is beyond the limit is reset, not kept waiting.
    for beyond in &held[most..] {
        let end = beyond
            .as_ref()
            .map_err(std::io::Error::kind)
            .and_then(|mut stream| {
                stream
                    .set_read_timeout(Some(SOON))
                    .and_then(|()| stream.read(&mut [0; 1]))
                    .map_err(|error| error.kind())
            });
        assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
    }
    Ok((into, out))
}

#[test]
fn a_stranger_with_too_many_connections_leaves_the_pod_and_others_alone() -> Result<()> {
    assert_eq!(one_takes_all("")?, (true, true));
    Ok(())
}

#[test]
fn twin_a_stranger_with_too_many_connections_shuts_the_pod_off_when_its_ports_share_a_budget()
-> Result<()> {
    assert_eq!(one_takes_all("share-budgets")?, (false, false));
    Ok(())
}

/// Lines of `ss` about established connections with this local address.
fn timers(pod: &Pod, local: &str) -> Result<Vec<String>> {
    let listed = pod.command("ss").args(["-Htno", "state", "established"]);
    let listed = listed.run(SOON)?.success()?;
    // A listener for both families holds IPv4 connections as IPv4-mapped ones.
    let plain = |address: &str| address.replace("[::ffff:", "").replace("]:", ":");
    let of_local = |line: &&str| {
        let found = line.split_whitespace().nth(2).map(plain);
        found.as_deref() == Some(local)
    };
    Ok(listed.lines().filter(of_local).map(str::to_owned).collect())
}

#[test]
fn a_client_that_vanishes_is_noticed_on_every_port() -> Result<()> {
    let scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let _server = serve(scene.server_b()?, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    let _tunnelled = hold(&scene.client, scene.server_b()?)?;
    let _plaintext = hold(&stranger, scene.server_b()?)?;
    let server = scene.server_b()?.at(PORT);
    for (pod, local) in [
        (&scene.client, server.clone()),
        (scene.server_b()?, scene.server_b()?.at(TUNNEL_PORT)),
        (scene.server_b()?, server),
    ] {
        wait_until(SOON, "a connection that is probed", || {
            let timers = timers(pod, &local)?;
            Ok(timers
                .iter()
                .any(|line| line.contains("timer:(keepalive,"))
                .then_some(()))
        })?;
    }
    Ok(())
}

fn ended(scene: &Scene) -> Result<()> {
    let status = scene.agent2()?.process().wait(SOON * 2)?;
    assert!(status.success(), "{status}");
    Ok(())
}

#[test]
fn an_agent_that_is_told_to_end_lets_open_connections_finish() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(scene.server_b()?, "echo")?;
    let held = hold(&scene.client, scene.server_b()?)?;
    held.send_line("before")?;
    held.wait_for_event("data", SOON)?;
    let mark = held.log().mark();
    scene.agent2()?.process().kill(Signal::SIGTERM)?;
    wait_until(SOON, "new connections to be refused", || {
        Ok((!answered(&echo(&scene.client, scene.server_b()?)?)).then_some(()))
    })?;
    held.send_line("after")?;
    held.wait_for_event_after(mark, "data", SOON)?;
    held.close_stdin();
    let end = held.wait_for_event("end", SOON)?;
    assert_eq!(text(&end, "how"), "EOF", "{end}");
    let closed = server.wait_for_event("closed", SOON)?;
    assert_eq!(text(&closed, "end"), "EOF");
    ended(&scene)
}

#[test]
fn what_is_still_open_after_the_grace_period_is_reset() -> Result<()> {
    let env = vec![("TERMINATION_GRACE_PERIOD_SECONDS", "6".to_owned())];
    let scene = Scene::with(Setting {
        env,
        ..Setting::default()
    })?;
    let outsider = scene.node1.pod("outside")?;
    let (server, outside) = (serve(scene.server_b()?, "echo")?, serve(&outsider, "echo")?);
    let held = hold(&scene.client, scene.server_b()?)?;
    let passing = hold(&scene.client, &outsider)?;
    for held in [&held, &passing] {
        held.send_line("before")?;
        held.wait_for_event("data", SOON)?;
    }
    scene.agent1.process().kill(Signal::SIGTERM)?;
    scene.agent2()?.process().kill(Signal::SIGTERM)?;
    for program in [&held, &passing] {
        assert_eq!(
            text(&program.wait_for_event("end", SOON)?, "how"),
            "ECONNRESET"
        );
    }
    for program in [&server, &outside] {
        assert_eq!(
            text(&program.wait_for_event("closed", SOON)?, "end"),
            "ECONNRESET"
        );
    }
    ended(&scene)
}

#[test]
fn quitquitquit_ends_the_agent_in_order() -> Result<()> {
    let scene = Scene::new()?;
    assert_ne!(
        scene.agent2()?.get(15000, "/quitquitquit")?.status,
        200,
        "a GET must not end it"
    );
    assert_eq!(
        scene
            .agent2()?
            .request("POST", 15000, "/quitquitquit")?
            .status,
        200
    );
    ended(&scene)
}
