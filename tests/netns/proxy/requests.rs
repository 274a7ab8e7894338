//! What a tunnel may be asked for: this pod's application, in plain CONNECTs.

use std::net::SocketAddr;

use anyhow::Result;
use culvert_harness::wait_until;
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, answered, connect_to, echo, serve, serve_on, text,
};
use http::{Method, Request, Version};

use super::access::wait_for_failure;
use super::peer::{Outcome, TUNNEL_PORT, attempt, connect_request, exchange, genuine};

/// Asks `server-b`'s tunnel for an address of the pod's namespace that is not the pod's: what listens there relies on nobody
/// from outside getting to it.
fn tunnel_leads_to(knobs: &'static str, address: &str) -> Result<bool> {
    let scene = Scene::without(knobs)?;
    let script = format!("ip address add {address}/32 dev lo || true");
    scene
        .server_b()?
        .command("/bin/sh")
        .args(["-c", &script])
        .run(SOON)?
        .success()?;
    let inner = scene
        .server_b()?
        .probe()?
        .args(["serve", "--port", "7000", "--bind", address])
        .spawn()?;
    inner.wait_for_line("listening", SOON)?;
    let mark = scene.agent2()?.log().mark();
    let outcome = attempt(
        &scene.client,
        scene.server_b()?,
        genuine(&scene, "client")?,
        &format!("{address}:7000"),
    )?;
    let target = format!("{address}:7000");
    let refused = outcome == Outcome::Status(400);
    if refused {
        wait_for_failure(
            scene.agent2()?,
            mark,
            "not this pod's application",
            &[("dst.hbone_addr", &target)],
        )?;
    } else {
        // The connection was made. The kernel part takes it, as it claims nothing but the pod's own address for the agent, and
        // gives it to the plaintext listener: the second wall, which this knob leaves standing.
        wait_for_failure(
            scene.agent2()?,
            mark,
            "not this pod's application",
            &[("path", "plaintext"), ("dst.addr", &target)],
        )?;
    }
    assert!(inner.events("accepted").is_empty());
    Ok(!refused)
}

const INNER: &str = "10.99.0.1";

#[test]
fn a_tunnel_leads_to_no_other_address_of_the_namespace() -> Result<()> {
    assert!(!tunnel_leads_to("", INNER)?);
    Ok(())
}

#[test]
fn twin_a_tunnel_leads_to_another_address_of_the_namespace_when_its_target_is_not_checked()
-> Result<()> {
    assert!(tunnel_leads_to("skip-authority", INNER)?);
    Ok(())
}

/// Asks `server-b`'s tunnel for the agent's own listeners in the pod: the connection would come back to where it came from.
fn tunnel_tries_the_agents_ports(knobs: &'static str) -> Result<bool> {
    let scene = Scene::without(knobs)?;
    let mut tried = Vec::new();
    for port in [15001, 15006, TUNNEL_PORT] {
        let authority = scene.server_b()?.at(port);
        let proof = genuine(&scene, "client")?;
        let mark = scene.agent2()?.log().mark();
        let outcome = attempt(&scene.client, scene.server_b()?, proof, &authority)?;
        let refused = outcome == Outcome::Status(400);
        let to = match refused || port != TUNNEL_PORT {
            true => ("dst.hbone_addr", authority.as_str()),
            // The listener that it came from takes it for one more client.
            false => ("dst.addr", authority.as_str()),
        };
        let reason = match port {
            _ if refused => "not this pod's application",
            TUNNEL_PORT => "TLS",
            // The kernel part lets nobody in there: the second wall, which this knob leaves standing.
            _ => "the application refused",
        };
        wait_for_failure(scene.agent2()?, mark, reason, &[("path", "hbone"), to])?;
        tried.push(!refused);
    }
    assert!(tried.iter().all(|one| *one == tried[0]), "{tried:?}");
    Ok(tried[0])
}

#[test]
fn a_tunnel_does_not_try_the_agents_own_ports() -> Result<()> {
    assert!(!tunnel_tries_the_agents_ports("")?);
    Ok(())
}

#[test]
fn twin_a_tunnel_tries_the_agents_own_ports_when_its_target_is_not_checked() -> Result<()> {
    assert!(tunnel_tries_the_agents_ports("skip-authority")?);
    Ok(())
}

#[test]
fn a_tunnel_does_not_lead_to_the_pods_loopback() -> Result<()> {
    assert!(!tunnel_leads_to("", "127.0.0.1")?);
    Ok(())
}

#[test]
fn targets_that_are_not_the_pods_application_are_bad_requests() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(scene.server_b()?, "echo")?;
    let _other = serve_on(scene.server_b()?, "echo", 7001)?;
    let ip = scene.server_b()?.address();
    for authority in [
        scene.server_a.at(PORT),
        scene.client.at(PORT),
        format!("127.0.0.1:{PORT}"),
        format!("0.0.0.0:{PORT}"),
        format!("[::1]:{PORT}"),
        format!("[::]:{PORT}"),
        format!("{}:{PORT}", scene.node2.address()),
        format!("{ip}:15001"),
        format!("{ip}:15006"),
        format!("{ip}:15008"),
        format!("{ip}:0"),
        format!("{ip}:07000"),
        format!("{ip}"),
        format!("localhost:{PORT}"),
        format!("server-b.{NAMESPACE}.svc.cluster.local:{PORT}"),
        format!("[::ffff:127.0.0.1]:{PORT}"),
        format!("user@{ip}:{PORT}"),
    ] {
        let outcome = attempt(
            &scene.client,
            scene.server_b()?,
            genuine(&scene, "client")?,
            &authority,
        )?;
        assert_eq!(outcome, Outcome::Status(400), "{authority}");
    }
    // IPv4 written as IPv6 means the same address, and is judged as such.
    let mapped = format!("[::ffff:{ip}]:{PORT}");
    let outcome = attempt(
        &scene.client,
        scene.server_b()?,
        genuine(&scene, "client")?,
        &mapped,
    )?;
    assert_eq!(outcome, Outcome::Data("hello".to_owned()));
    server.wait_for_event("closed", SOON)?;
    assert_eq!(
        server.events("accepted").len(),
        1,
        "only the last of them came to the application"
    );
    Ok(())
}

#[test]
fn the_readiness_and_metrics_ports_of_a_pod_are_its_own() -> Result<()> {
    let scene = Scene::new()?;
    // The agent's HTTP ports are in the node's namespace: in a pod they are the application's.
    for port in [15020, 15021] {
        for server in [&scene.server_a, scene.server_b()?] {
            let _server = serve_on(server, "echo", port)?;
            for _ in 0..2 {
                let hello = ["--send", "hello", "--read", "5"];
                let report = connect_to(&scene.client, &server.at(port), &hello)?;
                assert!(answered(&report), "{report}");
            }
        }
    }
    Ok(())
}

#[test]
fn other_methods_than_connect_are_bad_requests() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(scene.server_b()?, "echo")?;
    let tunnel = SocketAddr::new(scene.server_b()?.address(), TUNNEL_PORT);
    for method in [
        Method::GET,
        Method::POST,
        Method::OPTIONS,
        Method::from_bytes(b"BREW")?,
    ] {
        let uri = format!("https://{}/", scene.server_b()?.at(PORT));
        let request = Request::builder()
            .method(method.clone())
            .version(Version::HTTP_2)
            .uri(uri)
            .body(())?;
        let outcome = exchange(&scene.client, tunnel, genuine(&scene, "client")?, request)?;
        assert_eq!(outcome, Outcome::Status(400), "{method}");
    }
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    server.wait_for_event("closed", SOON)?;
    assert_eq!(
        server.events("accepted").len(),
        1,
        "only the agent's own came to the application"
    );
    Ok(())
}

/// Tells whether the application saw the address that the header names.
fn a_lie_is_believed(knobs: &'static str) -> Result<bool> {
    let scene = Scene::without(knobs)?;
    let server = serve(scene.server_b()?, "echo")?;
    let tunnel = SocketAddr::new(scene.server_b()?.address(), TUNNEL_PORT);
    let mut request = connect_request(&scene.server_b()?.at(PORT))?;
    request.headers_mut().insert(
        "forwarded",
        format!("for=\"{}\"", scene.intruder.at(4000)).parse()?,
    );
    assert!(exchange(&scene.client, tunnel, genuine(&scene, "client")?, request)?.reached());
    let accepted = server.wait_for_event("accepted", SOON)?;
    Ok(text(&accepted, "peer") == scene.intruder.at(4000))
}

#[test]
fn twin_a_forwarded_header_names_another_address_when_it_is_not_compared() -> Result<()> {
    assert!(!a_lie_is_believed("")?);
    assert!(a_lie_is_believed("skip-forwarded-check")?);
    Ok(())
}

#[test]
fn a_forwarded_header_cannot_name_another_address() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(scene.server_b()?, "echo")?;
    let tunnel = SocketAddr::new(scene.server_b()?.address(), TUNNEL_PORT);
    let own = scene.client.address();
    for (number, header) in [
        format!("for=\"{}\"", scene.intruder.at(4000)),
        format!("for=\"{own}:4000\";for=\"{}\"", scene.intruder.at(4001)),
        format!("for=\"{}\", for=\"{own}:4002\"", scene.intruder.at(4001)),
        "for=unknown".to_owned(),
        "for=\"127.0.0.1:80\"".to_owned(),
        ";;==\"\",".to_owned(),
    ]
    .into_iter()
    .enumerate()
    {
        let mut request = connect_request(&scene.server_b()?.at(PORT))?;
        request.headers_mut().insert("forwarded", header.parse()?);
        let outcome = exchange(&scene.client, tunnel, genuine(&scene, "client")?, request)?;
        assert_eq!(outcome, Outcome::Data("hello".to_owned()), "{header}");
        let accepted = wait_until(SOON, "the server to tell", || {
            let accepted = server.events("accepted");
            Ok((accepted.len() > number).then_some(accepted))
        })?;
        assert_eq!(accepted.len(), number + 1);
        assert!(
            text(&accepted[number], "peer").starts_with(&format!("{own}:")),
            "{header}: {accepted:?}"
        );
    }
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    Ok(())
}
