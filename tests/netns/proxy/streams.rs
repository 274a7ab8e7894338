//! A carried connection is as good as a direct one: addresses, half-closes, resets, truncation, volume.

use anyhow::Result;
use culvert_harness::{Pod, Proc};
use culvert_tests::scene::{
    PORT, SOON, Scene, Setting, connect, connect_to, hold, serve, serve_on, text,
};
use nix::sys::signal::Signal;

/// Where the client is, which decides how it gets to `server-b`.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Both agents, a tunnel between.
    Tunnel,
    /// From outside the mesh, through the server's agent.
    Plaintext,
    /// To a server outside the mesh, through the client's agent.
    Passthrough,
}

const WAYS: [Way; 3] = [Way::Tunnel, Way::Plaintext, Way::Passthrough];

struct Pair {
    scene: Scene,
    client: Pod,
    server: Pod,
}

fn pair(way: Way) -> Result<Pair> {
    let scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let (client, server) = match way {
        Way::Tunnel => (scene.client.clone(), scene.server_b()?.clone()),
        Way::Plaintext => (scene.node1.pod("outsider")?, scene.server_b()?.clone()),
        Way::Passthrough => (scene.client.clone(), scene.node2.pod("outsider")?),
    };
    Ok(Pair {
        scene,
        client,
        server,
    })
}

fn each_way(check: impl Fn(&Pair) -> Result<()>) -> Result<()> {
    WAYS.into_iter()
        .try_for_each(|way| check(&pair(way)?).map_err(|error| error.context(format!("{way:?}"))))
}

#[test]
fn both_ends_see_each_others_address() -> Result<()> {
    each_way(|pair| {
        let server = serve(&pair.server, "echo")?;
        let report = connect(
            &pair.client,
            &pair.server,
            &["--send", "hello", "--read", "5"],
        )?;
        assert_eq!(text(&report, "peer"), pair.server.at(PORT));
        let accepted = server.wait_for_event("accepted", SOON)?;
        assert_eq!(text(&accepted, "local"), pair.server.at(PORT));
        assert!(
            text(&accepted, "peer").starts_with(&format!("{}:", pair.client.address())),
            "{accepted}"
        );
        Ok(())
    })
}

#[test]
fn a_tunnelled_client_is_seen_with_its_own_port() -> Result<()> {
    let pair = pair(Way::Tunnel)?;
    let server = serve(&pair.server, "echo")?;
    for port in ["23456", "23457"] {
        let report = connect(
            &pair.client,
            &pair.server,
            &["--bind-port", port, "--send", "hello", "--read", "5"],
        )?;
        assert_eq!(
            text(&report, "local"),
            format!("{}:{port}", pair.client.address())
        );
    }
    let peers = super::access::accepted_from(&server, &pair.server)?;
    assert_eq!(peers, [pair.client.at(23456), pair.client.at(23457)]);
    Ok(())
}

#[test]
fn a_client_that_has_finished_still_gets_its_answer() -> Result<()> {
    each_way(|pair| {
        let _server = serve(&pair.server, "collect")?;
        let report = connect(
            &pair.client,
            &pair.server,
            &["--send", "hello", "--half-close", "--read-all"],
        )?;
        assert!(text(&report, "data").contains("\"bytes\":5"), "{report}");
        assert_eq!(text(&report, "read"), "EOF");
        Ok(())
    })
}

#[test]
fn a_server_that_has_finished_still_gets_the_rest() -> Result<()> {
    each_way(|pair| {
        let server = serve(&pair.server, "farewell")?;
        let held = hold(&pair.client, &pair.server)?;
        held.wait_for_event("eof", SOON)?;
        held.send_line("after the end")?;
        held.close_stdin();
        let closed = server.wait_for_event("closed", SOON)?;
        assert_eq!(
            (text(&closed, "end"), closed["bytes_read"].as_u64()),
            ("EOF", Some(14)),
            "{closed}"
        );
        Ok(())
    })
}

#[test]
fn a_server_may_speak_first() -> Result<()> {
    each_way(|pair| {
        let _server = serve(&pair.server, "banner")?;
        let report = connect(&pair.client, &pair.server, &["--read", "20"])?;
        assert_eq!(text(&report, "data"), "culvert-probe ready\n");
        Ok(())
    })
}

/// A held connection over which a line went there and back.
fn established(pair: &Pair) -> Result<(Proc, Proc)> {
    let server = serve(&pair.server, "echo")?;
    let held = hold(&pair.client, &pair.server)?;
    held.send_line("hello")?;
    held.wait_for_event("data", SOON)?;
    Ok((server, held))
}

/// Makes a program's connections end with a reset: the kernel does so for one that has unread bytes.
fn reset_by_death(program: &Proc) -> Result<()> {
    program.kill(Signal::SIGKILL)?;
    program.wait(SOON).map(drop)
}

#[test]
fn a_server_that_aborts_resets_its_client() -> Result<()> {
    each_way(|pair| {
        // Once reads one byte and closes: what else came is unread, and the kernel resets.
        let _server = serve(&pair.server, "once")?;
        let held = hold(&pair.client, &pair.server)?;
        held.send_line("more than one byte")?;
        let end = held.wait_for_event("end", SOON)?;
        assert!(
            ["ECONNRESET", "EPIPE"].contains(&text(&end, "how")),
            "{end}"
        );
        Ok(())
    })
}

#[test]
fn a_client_that_aborts_resets_its_server() -> Result<()> {
    each_way(|pair| {
        let server = serve(&pair.server, "source")?;
        let held = hold(&pair.client, &pair.server)?;
        held.wait_for_event("data", SOON)?;
        reset_by_death(&held)?;
        let closed = server.wait_for_event("closed", SOON)?;
        assert!(
            ["ECONNRESET", "EPIPE"].contains(&text(&closed, "end")),
            "{closed}"
        );
        Ok(())
    })
}

#[test]
fn a_stream_cut_by_the_death_of_the_other_agent_does_not_look_complete() -> Result<()> {
    let pair = pair(Way::Tunnel)?;
    let (server, held) = established(&pair)?;
    pair.scene.agent2()?.kill()?;
    let closed = server.wait_for_event("closed", SOON)?;
    assert_eq!(text(&closed, "end"), "ECONNRESET", "{closed}");
    let end = held.wait_for_event("end", SOON)?;
    assert_eq!(text(&end, "how"), "ECONNRESET", "{:?}", held.log().lines());
    assert!(held.events("eof").is_empty());
    Ok(())
}

#[test]
fn a_stream_cut_by_the_death_of_the_clients_agent_does_not_look_complete() -> Result<()> {
    let pair = pair(Way::Tunnel)?;
    let (server, held) = established(&pair)?;
    pair.scene.agent1.kill()?;
    let end = held.wait_for_event("end", SOON)?;
    assert_eq!(text(&end, "how"), "ECONNRESET", "{:?}", held.log().lines());
    let closed = server.wait_for_event("closed", SOON)?;
    assert_eq!(text(&closed, "end"), "ECONNRESET", "{closed}");
    Ok(())
}

#[test]
fn a_large_transfer_arrives_unchanged() -> Result<()> {
    each_way(|pair| {
        let _server = serve(&pair.server, "collect")?;
        let at = pair.server.at(PORT);
        let bytes = (64 << 20).to_string();
        let report = pair
            .client
            .probe()?
            .args(["stream", "--to", &at, "--bytes", &bytes, "--verify"])
            .run(SOON * 4)?
            .json()?;
        assert_eq!(report["ok"], true, "{report}");
        Ok(())
    })
}

#[test]
fn two_hundred_connections_at_once_are_carried() -> Result<()> {
    each_way(|pair| {
        let _server = pair
            .server
            .probe()?
            .args(["serve", "--port", "7000", "--quiet"])
            .spawn()?;
        _server.wait_for_line("listening", SOON)?;
        let at = pair.server.at(PORT);
        let load = [
            "rr",
            "--to",
            &at,
            "--count",
            "5",
            "--connections",
            "200",
            "--size",
            "1000",
        ];
        let report = pair.client.probe()?.args(load).run(SOON * 4)?.json()?;
        assert_eq!(
            (report["errors"].as_u64(), report["count"].as_u64()),
            (Some(0), Some(1000)),
            "{report}"
        );
        Ok(())
    })
}

#[test]
fn where_nobody_listens_the_client_is_reset_at_once() -> Result<()> {
    each_way(|pair| {
        let agent = if pair.client.name() == "client" {
            &pair.scene.agent1
        } else {
            pair.scene.agent2()?
        };
        let mark = agent.log().mark();
        let report = connect_to(
            &pair.client,
            &pair.server.at(7999),
            &["--send", "hello", "--read", "5"],
        )?;
        let outcome = [
            text(&report, "connect"),
            text(&report, "send"),
            text(&report, "read"),
        ];
        assert!(
            outcome.contains(&"ECONNRESET") || outcome.contains(&"EPIPE"),
            "{report}"
        );
        let refused = super::access::wait_for_failure(agent, mark, "", &[("bytes_sent", "0")])?;
        assert!(refused.text.contains("7999"), "{refused:?}");
        // The next port is served: it was that one's refusal.
        let _server = serve_on(&pair.server, "echo", 7998)?;
        let report = connect_to(
            &pair.client,
            &pair.server.at(7998),
            &["--send", "hello", "--read", "5"],
        )?;
        assert_eq!(text(&report, "data"), "hello", "{report}");
        Ok(())
    })
}
