//! What `CULVERT_LENIENT` switches, each in both positions: strict unless it is named.

use std::time::Duration;

use anyhow::Result;
use culvert_harness::{Match, Policy, Proc, Service, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, echo, hold, lenient, only, principal, serve,
    status, text,
};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::TcpStream,
};

use super::peer::{Outcome, TUNNEL_PORT, attempt, genuine, handshake, in_pod};

const VIP: &str = "10.96.0.9";

/// Longer than any handshake may take, shorter than [`SOON`].
const TOO_LONG: Duration = Duration::from_secs(12);

fn scene(names: &str, policies: Vec<Policy>) -> Result<Scene> {
    Scene::with(Setting {
        env: lenient(names),
        policies: Some(policies),
        ..Setting::default()
    })
}

fn not_the_client(name: &str) -> Policy {
    Policy::deny(NAMESPACE, name).when(Match::principal(&principal("client")))
}

/// Has the policy select both servers.
fn attach(scene: &mut Scene, policy: &Policy, known: bool) -> Result<()> {
    scene.change_mesh(|mesh| {
        for name in ["server-a", "server-b"] {
            if let Some(workload) = mesh.workload(name) {
                *workload = workload.clone().selected_by(policy);
            }
        }
        mesh.policies.extend(known.then(|| policy.clone()));
    })
}

/// Both servers, of which the first is reached directly, list a policy that nobody has. Tells whether they are reached.
fn reached_under_an_unknown_policy(names: &str) -> Result<[bool; 2]> {
    let mut scene = scene(names, Vec::new())?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    attach(&mut scene, &not_the_client("unknown").selector(), false)?;
    let near = answered(&echo(&scene.client, &scene.server_a)?);
    Ok([near, answered(&echo(&scene.client, scene.server_b()?)?)])
}

#[test]
fn an_unknown_policy_refuses_unless_that_is_lenient() -> Result<()> {
    assert_eq!(reached_under_an_unknown_policy("")?, [false, false]);
    let lenient = reached_under_an_unknown_policy("unknown-policies")?;
    assert_eq!(lenient, [true, true]);
    Ok(())
}

/// A policy comes with a range and a port that are none, and lets others in than before. Tells whether it came into force.
fn takes_what_cannot_be_read(names: &str) -> Result<bool> {
    let mut scene = scene(names, vec![only("client")])?;
    let _server = serve(scene.server_b()?, "echo")?;
    let name = &scene.mesh.policies[0].name;
    let behaviour = format!("xds: [{{absurd-values: {NAMESPACE}/{name}}}]");
    scene.control_plane()?.misbehave_now(&behaviour)?;
    scene.mesh.policies = vec![only("intruder")];
    scene.mesh.write(&scene.mesh_file())?;
    if names.is_empty() {
        wait_until(SOON, "the policy to be refused", || {
            let warnings = status(scene.agent2()?)?["warnings"].to_string();
            Ok(warnings.contains("were refused").then_some(()))
        })?;
        assert!(answered(&echo(&scene.client, scene.server_b()?)?));
        return Ok(false);
    }
    wait_until(SOON, "the policy to be in force", || {
        Ok(answered(&echo(&scene.intruder, scene.server_b()?)?).then_some(()))
    })?;
    assert!(!answered(&echo(&scene.client, scene.server_b()?)?));
    Ok(true)
}

#[test]
fn a_policy_that_cannot_be_read_changes_nothing_unless_that_is_lenient() -> Result<()> {
    assert!(!takes_what_cannot_be_read("")?);
    assert!(takes_what_cannot_be_read("unreadable-resources")?);
    Ok(())
}

fn says(held: &Proc, word: &str) -> Result<()> {
    let mark = held.log().mark();
    held.send_line(word)?;
    let answer = held.wait_for_event_after(mark, "data", SOON)?;
    assert!(text(&answer, "data").contains(word), "{answer}");
    Ok(())
}

/// Connections of the client's to both servers, of which the first is direct, and which have carried something: a connect is over before the
/// other node's agent has been asked.
fn open_to_both(scene: &Scene) -> Result<[Proc; 2]> {
    scene.warm(&scene.client, &scene.server_a)?;
    let open = [
        hold(&scene.client, &scene.server_a)?,
        hold(&scene.client, scene.server_b()?)?,
    ];
    open.iter().try_for_each(|held| says(held, "open"))?;
    Ok(open)
}

fn is_cut(held: &Proc) -> Result<()> {
    let end = held.wait_for_event("end", SOON)?;
    // The agent resets what goes through it; of a direct flow it has the kernel destroy both sockets.
    let how = text(&end, "how");
    assert!(["ECONNRESET", "ECONNABORTED"].contains(&how), "{end}");
    Ok(())
}

#[test]
fn a_later_policy_cuts_open_connections_unless_that_is_lenient() -> Result<()> {
    for names in ["", "later-policies"] {
        let mut scene = scene(names, Vec::new())?;
        let _servers = (
            serve(&scene.server_a, "echo")?,
            serve(scene.server_b()?, "echo")?,
        );
        let open = open_to_both(&scene)?;
        let later = not_the_client("later").selector();
        attach(&mut scene, &later, true)?;
        for server in [&scene.server_a, scene.server_b()?] {
            assert!(!answered(&echo(&scene.client, server)?), "{names}");
        }
        if names.is_empty() {
            open.iter().try_for_each(is_cut)?;
            continue;
        }
        open.iter().try_for_each(|held| says(held, "spared"))?;
        // A policy of the whole namespace spares nobody.
        scene.change_mesh(|mesh| mesh.policies.push(not_the_client("of-all")))?;
        open.iter().try_for_each(is_cut)?;
    }
    Ok(())
}

#[test]
fn a_policy_that_was_attached_before_cuts_when_it_changes_however_lenient() -> Result<()> {
    let mut scene = scene("later-policies", Vec::new())?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    let mut before = not_the_client("before").selector();
    before.rules.clear();
    attach(&mut scene, &before, true)?;
    let open = open_to_both(&scene)?;
    scene.change_mesh(|mesh| mesh.policies = vec![not_the_client("before").selector()])?;
    open.iter().try_for_each(is_cut)
}

/// `server-b` is the waypoint of a service. What comes of requests to it that name the service's address, and other things.
fn asked_of_a_waypoint(names: &str) -> Result<[Outcome; 4]> {
    let mut scene = scene(names, Vec::new())?;
    let _server = serve(scene.server_b()?, "echo")?;
    let gateway = json!({"destination": format!("/{}", scene.server_b()?.address())});
    scene.change_mesh(|mesh| {
        let mut service = Service::new(NAMESPACE, "behind", VIP).port(PORT, PORT);
        service.extra.insert("waypoint".to_owned(), gateway);
        let other = Service::new(NAMESPACE, "elsewhere", "10.96.0.10").port(PORT, PORT);
        mesh.services.extend([service, other]);
    })?;
    let ask = |authority: String| {
        let proof = genuine(&scene, "client")?;
        attempt(&scene.client, scene.server_b()?, proof, &authority)
    };
    Ok([
        ask(format!("{VIP}:{PORT}"))?,
        ask(format!("{VIP}:{TUNNEL_PORT}"))?,
        ask(format!("10.96.0.10:{PORT}"))?,
        ask(scene.server_a.at(PORT))?,
    ])
}

#[test]
fn a_request_names_the_pods_own_address_unless_that_is_lenient_and_what_it_names_is_behind_the_pod()
-> Result<()> {
    let refused = Outcome::Status(400);
    assert_eq!(
        asked_of_a_waypoint("")?,
        [const { Outcome::Status(400) }; 4]
    );
    let [behind, others @ ..] = asked_of_a_waypoint("authority")?;
    assert_eq!(behind, Outcome::Data("hello".to_owned()));
    assert_eq!(others, [refused.clone(), refused.clone(), refused]);
    Ok(())
}

/// Whether the other end has neither ended the connection nor reset it. What it sends meanwhile is passed over.
async fn is_open(mut stream: impl AsyncRead + Unpin) -> bool {
    let mut rest = [0; 1024];
    loop {
        match tokio::time::timeout(Duration::from_secs(1), stream.read(&mut rest)).await {
            Err(_) => return true,
            Ok(Ok(0) | Err(_)) => return false,
            Ok(Ok(_)) => {}
        }
    }
}

/// Two peers connect to `server-b`'s tunnel port: one that says nothing, and one that says nothing after TLS. Whether they are still
/// connected after a while.
fn slow_peers_stay(names: &str) -> Result<[bool; 2]> {
    let scene = scene(names, Vec::new())?;
    let stranger = scene.node1.pod("stranger")?;
    let tunnel = (scene.server_b()?.address(), TUNNEL_PORT).into();
    let proof = genuine(&scene, "client")?;
    in_pod(&stranger, async move {
        let silent = TcpStream::connect(tunnel).await?;
        let after_tls = handshake(tunnel, proof).await?;
        tokio::time::sleep(TOO_LONG).await;
        Ok([is_open(silent).await, is_open(after_tls).await])
    })?
}

#[test]
fn handshakes_have_a_deadline_unless_that_is_lenient() -> Result<()> {
    assert_eq!(slow_peers_stay("")?, [false, false]);
    assert_eq!(slow_peers_stay("handshake-deadlines")?, [true, true]);
    Ok(())
}

#[test]
fn what_is_lenient_is_told_by_status_and_log() -> Result<()> {
    let warned = |scene: &Scene| {
        let warnings = status(&scene.agent1)?["warnings"].to_string();
        let told = warnings.contains("CULVERT_LENIENT (authority)");
        let shown = scene.agent1.cli(["status"])?.success()?;
        assert_eq!(shown.contains("CULVERT_LENIENT (authority)"), told);
        Ok::<_, anyhow::Error>(told)
    };
    assert!(!warned(&Scene::new()?)?);
    let scene = scene("authority", Vec::new())?;
    assert!(warned(&scene)?);
    assert!(scene.agent1.log().contains("CULVERT_LENIENT (authority)"));
    Ok(())
}
