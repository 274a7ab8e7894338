//! Who takes too much harms only itself, and an agent that ends lets go of connections in order.

use std::{
    io::Read as _,
    net::{SocketAddr, TcpStream},
};

use anyhow::Result;
use culvert_harness::{Pod, Workload, wait_until};
use culvert_tests::scene::{NAMESPACE, SOON, Scene, Setting, answered, echo, hold, serve, text};
use nix::sys::signal::Signal;

use super::peer::TUNNEL_PORT;

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
    let _server = serve(&scene.server_b, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    let silent = silent(&stranger, &scene.server_b, 200)?;
    assert!(answered(&echo(&scene.client, &scene.server_b)?));
    assert!(silent.iter().all(Result::is_ok));
    Ok(())
}

#[test]
fn a_pod_with_too_many_connections_leaves_the_others_alone() -> Result<()> {
    let mut scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let other = scene.node2.pod("other")?;
    scene.change_mesh(|mesh| {
        mesh.workloads
            .push(Workload::of_pod(&other, NAMESPACE, "other"))
    })?;
    scene.agent2.enrol_as(&other, scene.workload(&other)?)?;
    let _server = serve(&other, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    let most = 4096;
    let held = silent(&stranger, &scene.server_b, most + 200)?;
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
    assert!(answered(&echo(&scene.client, &other)?));
    Ok(())
}

fn ended(scene: &Scene) -> Result<()> {
    let status = scene.agent2.process().wait(SOON * 2)?;
    assert!(status.success(), "{status}");
    Ok(())
}

#[test]
fn an_agent_that_is_told_to_end_lets_open_connections_finish() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_b, "echo")?;
    let held = hold(&scene.client, &scene.server_b)?;
    held.send_line("before")?;
    held.wait_for_event("data", SOON)?;
    let mark = held.log().mark();
    scene.agent2.process().kill(Signal::SIGTERM)?;
    wait_until(SOON, "new connections to be refused", || {
        Ok((!answered(&echo(&scene.client, &scene.server_b)?)).then_some(()))
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
    let (server, outside) = (serve(&scene.server_b, "echo")?, serve(&outsider, "echo")?);
    let held = hold(&scene.client, &scene.server_b)?;
    let passing = hold(&scene.client, &outsider)?;
    for held in [&held, &passing] {
        held.send_line("before")?;
        held.wait_for_event("data", SOON)?;
    }
    scene.agent1.process().kill(Signal::SIGTERM)?;
    scene.agent2.process().kill(Signal::SIGTERM)?;
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
        scene.agent2.get(15000, "/quitquitquit")?.status,
        200,
        "a GET must not end it"
    );
    assert_eq!(
        scene.agent2.request("POST", 15000, "/quitquitquit")?.status,
        200
    );
    ended(&scene)
}
