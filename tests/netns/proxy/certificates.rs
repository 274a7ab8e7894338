//! Who may open a tunnel, and to whom the agent opens one.

use anyhow::Result;
use culvert::identity::DevCa;
use culvert_harness::{Policy, Workload};
use culvert_tests::scene::{
    NAMESPACE, PORT, Scene, Setting, answered, connect, echo, lenient, only, serve, text,
};

use super::{
    access::{accepted_from, wait_for_failure},
    peer::{
        Outcome, Proof, attempt, expired, foreign_ca, genuine, identity, mesh_ca, not_yet_valid,
        proof, spiffe, valid_now,
    },
    server::Impostor,
};

/// A stranger on the first node opens a tunnel to `server-b` with a proof of the test's choice. Tells whether its bytes
/// came to the application.
fn stranger_reaches(
    knobs: &'static str,
    policies: Vec<Policy>,
    make: impl Fn(&Scene) -> Result<Proof>,
) -> Result<bool> {
    let setting = Setting {
        knobs,
        policies: Some(policies),
        ..Setting::default()
    };
    stranger_reaches_in(setting, make)
}

fn stranger_reaches_in(setting: Setting, make: impl Fn(&Scene) -> Result<Proof>) -> Result<bool> {
    let scene = Scene::with(setting)?;
    let server = serve(scene.server_b()?, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    let mark = scene.agent2()?.log().mark();
    let outcome = attempt(
        &stranger,
        scene.server_b()?,
        make(&scene)?,
        &scene.server_b()?.at(PORT),
    )?;
    if let Outcome::Failed(error) = &outcome {
        let line = wait_for_failure(scene.agent2()?, mark, "the peer", &[("path", "hbone")]);
        assert!(line.is_ok(), "{error}: {line:?}");
    }
    // Whoever is entitled still gets through, and what else the application saw was the stranger's.
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    let strangers = format!("{}:", stranger.address());
    let accepted = accepted_from(&server, scene.server_b()?)?;
    assert_eq!(
        accepted.iter().any(|peer| peer.starts_with(&strangers)),
        outcome.reached(),
        "{outcome:?}: {accepted:?}"
    );
    assert!(
        !matches!(outcome, Outcome::Status(_)),
        "the handshake decides: {outcome:?}"
    );
    Ok(outcome.reached())
}

fn no_policy() -> Vec<Policy> {
    Vec::new()
}

fn client_only() -> Vec<Policy> {
    vec![only("client")]
}

#[test]
fn the_peer_of_these_tests_is_able_to_reach_the_application() -> Result<()> {
    assert!(stranger_reaches("", client_only(), |scene| genuine(
        scene, "client"
    ))?);
    Ok(())
}

#[test]
fn without_a_certificate_no_tunnel() -> Result<()> {
    assert!(!stranger_reaches("", no_policy(), |_| Ok(None))?);
    Ok(())
}

#[test]
fn twin_without_asking_for_a_certificate_a_tunnel() -> Result<()> {
    assert!(stranger_reaches(
        "skip-client-certificate",
        no_policy(),
        |_| Ok(None)
    )?);
    Ok(())
}

fn of_foreign_root(scene: &Scene) -> Result<Proof> {
    proof(&foreign_ca(scene)?, &[&spiffe("client")], valid_now())
}

fn of_the_past(scene: &Scene) -> Result<Proof> {
    proof(&mesh_ca(scene)?, &[&spiffe("client")], expired())
}

fn of_the_future(scene: &Scene) -> Result<Proof> {
    proof(&mesh_ca(scene)?, &[&spiffe("client")], not_yet_valid())
}

#[test]
fn a_certificate_of_another_root_opens_no_tunnel() -> Result<()> {
    assert!(!stranger_reaches("", client_only(), of_foreign_root)?);
    Ok(())
}

#[test]
fn twin_a_certificate_of_another_root_opens_a_tunnel_when_chains_are_not_verified() -> Result<()> {
    assert!(stranger_reaches(
        "skip-chain",
        client_only(),
        of_foreign_root
    )?);
    Ok(())
}

#[test]
fn an_expired_certificate_opens_no_tunnel() -> Result<()> {
    assert!(!stranger_reaches("", client_only(), of_the_past)?);
    Ok(())
}

#[test]
fn twin_an_expired_certificate_opens_a_tunnel_when_chains_are_not_verified() -> Result<()> {
    assert!(stranger_reaches("skip-chain", client_only(), of_the_past)?);
    Ok(())
}

#[test]
fn a_certificate_that_is_not_valid_yet_opens_no_tunnel() -> Result<()> {
    assert!(!stranger_reaches("", client_only(), of_the_future)?);
    Ok(())
}

#[test]
fn twin_a_certificate_that_is_not_valid_yet_opens_a_tunnel_when_chains_are_not_verified()
-> Result<()> {
    assert!(stranger_reaches(
        "skip-chain",
        client_only(),
        of_the_future
    )?);
    Ok(())
}

fn of_two_pods(scene: &Scene) -> Result<Proof> {
    proof(
        &mesh_ca(scene)?,
        &[&spiffe("client"), &spiffe("intruder")],
        valid_now(),
    )
}

#[test]
fn a_certificate_with_two_identities_opens_no_tunnel() -> Result<()> {
    assert!(!stranger_reaches("", client_only(), of_two_pods)?);
    Ok(())
}

#[test]
fn twin_a_certificate_with_two_identities_opens_a_tunnel_when_the_first_counts() -> Result<()> {
    let setting = Setting {
        env: lenient("certificate-names"),
        policies: Some(client_only()),
        ..Setting::default()
    };
    assert!(stranger_reaches_in(setting, of_two_pods)?);
    Ok(())
}

fn of_another_trust_domain(scene: &Scene) -> Result<Proof> {
    proof(
        &mesh_ca(scene)?,
        &[&format!(
            "spiffe://elsewhere.local/ns/{NAMESPACE}/sa/client"
        )],
        valid_now(),
    )
}

#[test]
fn a_certificate_of_another_trust_domain_opens_no_tunnel() -> Result<()> {
    assert!(!stranger_reaches("", no_policy(), of_another_trust_domain)?);
    Ok(())
}

#[test]
fn twin_a_certificate_of_another_trust_domain_opens_a_tunnel_when_domains_are_not_compared()
-> Result<()> {
    assert!(stranger_reaches(
        "skip-trust-domain",
        no_policy(),
        of_another_trust_domain
    )?);
    Ok(())
}

/// `client` connects to a workload whose tunnel port is served by somebody with a certificate of the test's choice.
fn client_trusts(
    knobs: &'static str,
    account: &str,
    ca: impl Fn(&Scene) -> Result<DevCa>,
) -> Result<bool> {
    let mut scene = Scene::without(knobs)?;
    let pod = scene.node2.pod("bait")?;
    scene.change_mesh(|mesh| {
        mesh.workloads
            .push(Workload::of_pod(&pod, NAMESPACE, "bait"))
    })?;
    let _server = Impostor::start(&pod, &ca(&scene)?, &identity(account)?)?;
    let mark = scene.agent1.log().mark();
    let report = connect(&scene.client, &pod, &["--send", "hello", "--read", "5"])?;
    if !answered(&report) {
        assert_eq!(text(&report, "read_bytes"), "", "{report}");
        assert_ne!(text(&report, "read"), "EOF", "refused, not ended: {report}");
        wait_for_failure(
            &scene.agent1,
            mark,
            "expected was",
            &[("dst.workload", "bait")],
        )?;
    }
    Ok(answered(&report))
}

#[test]
fn the_agent_sends_to_the_server_it_expects() -> Result<()> {
    assert!(client_trusts("", "bait", mesh_ca)?);
    Ok(())
}

#[test]
fn the_agent_sends_nothing_to_a_server_with_another_pods_certificate() -> Result<()> {
    assert!(!client_trusts("", "server-b", mesh_ca)?);
    Ok(())
}

#[test]
fn twin_the_agent_sends_to_a_server_with_another_pods_certificate_when_it_does_not_look()
-> Result<()> {
    assert!(client_trusts("skip-server-identity", "server-b", mesh_ca)?);
    Ok(())
}

#[test]
fn a_pods_tunnels_present_its_own_certificate() -> Result<()> {
    let scene = Scene::new()?;
    let stranger = scene.node1.pod("stranger")?;
    let leaf = super::peer::server_leaf(&stranger, scene.server_b()?, genuine(&scene, "client")?)?;
    assert_eq!(
        culvert::identity::spiffe::identity_of(&leaf)?,
        identity("server-b")?
    );
    Ok(())
}
