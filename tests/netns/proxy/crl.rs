//! Revocation lists: who is on one is refused, and cut off where a tunnel is open; nobody else notices.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use culvert::identity::DevCa;
use culvert_harness::{Agent, AgentOptions, Pod, Workload, log::Stream, wait_until};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect, echo, hold, serve, status, text,
};
use rustls::pki_types::CertificateDer;

use super::{
    access::{accepted_from, wait_for_failure},
    expiry::echoes,
    peer::{
        Outcome, Proof, TUNNEL_PORT, attempt, connect_request, genuine, handshake, identity,
        in_pod, mesh_ca, server_chain, server_leaf,
    },
    server::Impostor,
};

const HOUR: Duration = Duration::from_secs(3600);

/// A scene whose agents follow one file of revocation lists, which names nobody yet.
struct Listed {
    scene: Scene,
    file: PathBuf,
    _directory: tempfile::TempDir,
}

impl Listed {
    fn new(knobs: &'static str) -> Result<Self> {
        Self::with(Setting {
            knobs,
            ..Setting::default()
        })
    }

    fn with(mut setting: Setting) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("crl.pem");
        std::fs::write(&file, "")?;
        setting.env.push(("CRL_PATH", file.display().to_string()));
        let scene = Scene::with(setting)?;
        Ok(Self {
            scene,
            file,
            _directory: directory,
        })
    }

    /// Writes the file as an operator's tool does: another one is renamed over it.
    fn write(&self, content: &str) -> Result<()> {
        let new = self.file.with_extension("new");
        std::fs::write(&new, content)?;
        Ok(std::fs::rename(new, &self.file)?)
    }

    /// Puts a list that names these certificates, and no others, into force wherever an agent runs.
    fn revoke(&self, certificates: &[CertificateDer<'_>]) -> Result<()> {
        let next_update = SystemTime::now() + HOUR;
        self.write(&mesh_ca(&self.scene)?.revocation_list(certificates, next_update)?)?;
        let named = format!("naming {} certificates", certificates.len());
        for agent in self.scene.agents() {
            wait_until(SOON, "the list to be in force", || {
                Ok(lists(agent)?.contains(&named).then_some(()))
            })?;
        }
        Ok(())
    }

    /// A workload of the second node whose tunnel port somebody else serves, with a true certificate of the test's.
    fn bait(&mut self, name: &str) -> Result<(Pod, Impostor)> {
        self.bait_by(name, &mesh_ca(&self.scene)?)
    }

    fn bait_by(&mut self, name: &str, ca: &DevCa) -> Result<(Pod, Impostor)> {
        let pod = self.scene.node2.pod(name)?;
        self.scene.change_mesh(|mesh| {
            mesh.workloads.push(Workload::of_pod(&pod, NAMESPACE, name));
        })?;
        let server = Impostor::start(&pod, ca, &identity(name)?)?;
        Ok((pod, server))
    }
}

fn lists(agent: &Agent) -> Result<String> {
    Ok(text(&status(agent)?, "revocation_lists").to_owned())
}

fn warnings(agent: &Agent) -> Result<String> {
    Ok(status(agent)?["warnings"].to_string())
}

fn leaf_of(proof: &Proof) -> Result<CertificateDer<'static>> {
    let (leaf, _) = proof.as_ref().context("a proof")?;
    Ok(leaf.clone())
}

fn copy_of(proof: &Proof) -> Proof {
    let copied = proof.as_ref();
    copied.map(|(leaf, key)| (leaf.clone(), key.clone_key()))
}

/// A stranger presents the certificate of an entitled client that is on a list. Tells whether its bytes came to the application.
fn revoked_client_reaches(knobs: &'static str) -> Result<bool> {
    let listed = Listed::new(knobs)?;
    let scene = &listed.scene;
    let server = serve(scene.server_b()?, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    let to = scene.server_b()?.at(PORT);
    let (revoked, other) = (genuine(scene, "client")?, genuine(scene, "client")?);
    let reaches = |proof: &Proof| attempt(&stranger, scene.server_b()?, copy_of(proof), &to);
    assert!(reaches(&revoked)?.reached(), "before it is on the list");
    let before = strangers(&accepted_from(&server, scene.server_b()?)?, &stranger);
    listed.revoke(&[leaf_of(&revoked)?])?;
    let mark = scene.agent2()?.log().mark();
    let outcome = reaches(&revoked)?;
    if let Outcome::Failed(error) = &outcome {
        let line = wait_for_failure(scene.agent2()?, mark, "is revoked", &[("path", "hbone")]);
        assert!(line.is_ok(), "{error}: {line:?}");
        let refused = scene
            .agent2()?
            .metric("culvert_revoked_peers_total", &["at=\"handshake\""])?;
        assert_eq!(refused, 1.0);
    }
    // Who has another certificate of the same identity is not concerned.
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    let after = strangers(&accepted_from(&server, scene.server_b()?)?, &stranger);
    assert_eq!(after > before, outcome.reached(), "{outcome:?}");
    assert!(reaches(&other)?.reached());
    Ok(outcome.reached())
}

fn strangers(accepted: &[String], stranger: &Pod) -> usize {
    let from = format!("{}:", stranger.address());
    accepted
        .iter()
        .filter(|peer| peer.starts_with(&from))
        .count()
}

#[test]
fn a_client_on_a_list_opens_no_tunnel() -> Result<()> {
    assert!(!revoked_client_reaches("")?);
    Ok(())
}

#[test]
fn twin_a_client_on_a_list_opens_a_tunnel_when_lists_are_not_asked() -> Result<()> {
    assert!(revoked_client_reaches("skip-revocation-lists")?);
    Ok(())
}

/// Who of a server's chain is on a list.
#[derive(Clone, Copy)]
enum Who {
    Server,
    /// The CA below the root that has issued the server's certificate.
    Issuer,
}

impl Who {
    /// Whose certificate the server presents.
    fn ca(self, scene: &Scene) -> Result<DevCa> {
        let root = mesh_ca(scene)?;
        match self {
            Self::Server => Ok(root),
            Self::Issuer => Ok(root.intermediate(SystemTime::now())?),
        }
    }

    fn of(self, server: &Impostor) -> Result<&[CertificateDer<'static>]> {
        let position = match self {
            Self::Server => 0,
            Self::Issuer => 1,
        };
        server
            .chain
            .get(position..=position)
            .context("a certificate in the chain")
    }
}

/// `client` connects to a workload whose server, or its issuer, is on a list.
fn revoked_server_is_reached(knobs: &'static str, who: Who) -> Result<bool> {
    let mut listed = Listed::new(knobs)?;
    let ca = who.ca(&listed.scene)?;
    let (pod, server) = listed.bait_by("bait", &ca)?;
    let (other, _other) = listed.bait("other")?;
    listed.revoke(who.of(&server)?)?;
    let agent = &listed.scene.agent1;
    let mark = agent.log().mark();
    let report = connect(
        &listed.scene.client,
        &pod,
        &["--send", "hello", "--read", "5"],
    )?;
    if !answered(&report) {
        assert_eq!(text(&report, "read_bytes"), "", "{report}");
        assert_ne!(text(&report, "read"), "EOF", "refused, not ended: {report}");
        wait_for_failure(agent, mark, "is revoked", &[("dst.workload", "bait")])?;
    }
    assert!(answered(&echo(&listed.scene.client, &other)?));
    Ok(answered(&report))
}

#[test]
fn nothing_is_sent_to_a_server_on_a_list() -> Result<()> {
    assert!(!revoked_server_is_reached("", Who::Server)?);
    Ok(())
}

#[test]
fn twin_a_server_on_a_list_is_sent_to_when_lists_are_not_asked() -> Result<()> {
    assert!(revoked_server_is_reached(
        "skip-revocation-lists",
        Who::Server
    )?);
    Ok(())
}

#[test]
fn nothing_is_sent_to_a_server_whose_issuer_is_on_a_list() -> Result<()> {
    assert!(!revoked_server_is_reached("", Who::Issuer)?);
    Ok(())
}

#[test]
fn twin_a_server_whose_issuer_is_on_a_list_is_sent_to_when_lists_are_not_asked() -> Result<()> {
    assert!(revoked_server_is_reached(
        "skip-revocation-lists",
        Who::Issuer
    )?);
    Ok(())
}

/// Two clients have a tunnel with an open stream each when one of them comes onto a list. Tells whether that one's was cut.
fn open_tunnel_of_client_is_cut(knobs: &'static str) -> Result<bool> {
    let listed = Listed::new(knobs)?;
    let scene = &listed.scene;
    let server = serve(scene.server_b()?, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    let tunnel = SocketAddr::new(scene.server_b()?.address(), TUNNEL_PORT);
    let authority = scene.server_b()?.at(PORT);
    let (doomed, other) = (genuine(scene, "client")?, genuine(scene, "client")?);
    let leaf = leaf_of(&doomed)?;
    let again = copy_of(&doomed);
    let mark = scene.agent2()?.log().mark();
    let revoke = || listed.revoke(std::slice::from_ref(&leaf));
    let cut = in_pod(&stranger, async {
        let mut streams = Vec::new();
        for proof in [doomed, other] {
            let (send, connection) = h2::client::handshake(handshake(tunnel, proof).await?).await?;
            tokio::spawn(connection);
            let mut send = send.ready().await?;
            let (response, mut body) = send.send_request(connect_request(&authority)?, false)?;
            let mut answer = response.await?.into_body();
            echoes(&mut body, &mut answer).await?;
            streams.push((send, body, answer));
        }
        revoke()?;
        let (_, mut body, mut answer) = streams.remove(0);
        let cut = match knobs.is_empty() {
            true => !matches!(answer.data().await, Some(Ok(_))),
            false => echoes(&mut body, &mut answer).await.is_err(),
        };
        for (_, body, answer) in &mut streams {
            echoes(body, answer).await?;
        }
        anyhow::Ok(cut)
    })??;
    if cut {
        let line = wait_for_failure(scene.agent2()?, mark, "was revoked", &[("path", "hbone")])?;
        assert_eq!(line.field("bytes_recv").as_deref(), Some("5"), "{line:?}");
        let closed = server.wait_for_event("closed", SOON)?;
        assert_eq!(text(&closed, "end"), "ECONNRESET", "{closed}");
        let closed = ["at=\"tunnel\""];
        let closed = scene
            .agent2()?
            .metric("culvert_revoked_peers_total", &closed)?;
        assert_eq!(closed, 1.0);
        let flows = ["path=\"hbone\""];
        assert_eq!(
            scene
                .agent2()?
                .metric("culvert_revoked_flows_total", &flows)?,
            1.0
        );
    }
    let anew = attempt(&stranger, scene.server_b()?, again, &authority)?;
    assert!(!anew.reached(), "{anew:?}");
    Ok(cut)
}

#[test]
fn an_open_tunnel_is_cut_when_its_client_comes_onto_a_list() -> Result<()> {
    assert!(open_tunnel_of_client_is_cut("")?);
    Ok(())
}

#[test]
fn twin_an_open_tunnel_goes_on_when_its_client_is_not_looked_up_again() -> Result<()> {
    assert!(!open_tunnel_of_client_is_cut("keep-revoked-tunnels")?);
    Ok(())
}

/// A client holds connections to two servers when one of them comes onto a list. Tells whether that one was cut.
fn open_tunnel_to_server_is_cut(knobs: &'static str, who: Who) -> Result<bool> {
    let mut listed = Listed::new(knobs)?;
    let ca = who.ca(&listed.scene)?;
    let (doomed_pod, doomed) = listed.bait_by("doomed", &ca)?;
    let (other_pod, _other) = listed.bait("other")?;
    let scene = &listed.scene;
    let says = |held: &culvert_harness::Proc, word: &str| -> Result<()> {
        let mark = held.log().mark();
        held.send_line(word)?;
        let answer = held.wait_for_event_after(mark, "data", SOON)?;
        ensure!(text(&answer, "data").contains(word), "{answer}");
        Ok(())
    };
    let (cut, kept) = (
        hold(&scene.client, &doomed_pod)?,
        hold(&scene.client, &other_pod)?,
    );
    says(&cut, "before")?;
    says(&kept, "before")?;
    let mark = scene.agent1.log().mark();
    listed.revoke(who.of(&doomed)?)?;
    let was_cut = knobs.is_empty();
    if was_cut {
        let end = cut.wait_for_event("end", SOON)?;
        assert_eq!(text(&end, "how"), "ECONNRESET", "{end}");
        let fields = [("path", "hbone"), ("dst.workload", "doomed")];
        wait_for_failure(&scene.agent1, mark, "was revoked", &fields)?;
    } else {
        says(&cut, "after")?;
    }
    says(&kept, "after")?;
    let anew = connect(
        &scene.client,
        &doomed_pod,
        &["--send", "hello", "--read", "5"],
    )?;
    // The pooled tunnel of the twin still takes streams.
    assert_eq!(answered(&anew), !was_cut, "{anew}");
    Ok(was_cut)
}

#[test]
fn an_open_tunnel_is_cut_when_its_server_comes_onto_a_list() -> Result<()> {
    assert!(open_tunnel_to_server_is_cut("", Who::Server)?);
    Ok(())
}

#[test]
fn an_open_tunnel_is_cut_when_its_servers_issuer_comes_onto_a_list() -> Result<()> {
    assert!(open_tunnel_to_server_is_cut("", Who::Issuer)?);
    Ok(())
}

#[test]
fn twin_an_open_tunnel_goes_on_when_its_server_is_not_looked_up_again() -> Result<()> {
    assert!(!open_tunnel_to_server_is_cut(
        "keep-revoked-tunnels",
        Who::Server
    )?);
    Ok(())
}

#[test]
fn twin_an_open_tunnel_goes_on_when_its_servers_issuer_is_not_looked_up_again() -> Result<()> {
    assert!(!open_tunnel_to_server_is_cut(
        "keep-revoked-tunnels",
        Who::Issuer
    )?);
    Ok(())
}

/// As where istiod has a CA of its own below the operator's root, and that CA has to go: the authority signs otherwise first.
#[test]
fn certificates_of_an_intermediate_ca_are_replaced_when_it_comes_onto_a_list() -> Result<()> {
    let listed = Listed::with(Setting {
        control_plane: true,
        behaviour: "ca: [intermediate]",
        ..Setting::default()
    })?;
    let scene = &listed.scene;
    let _server = serve(scene.server_b()?, "echo")?;
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    let stranger = scene.node1.pod("stranger")?;
    let proof = genuine(scene, "client")?;
    let chain = || server_chain(&stranger, scene.pod_b(), copy_of(&proof));
    let before = chain()?;
    let [_, intermediate] = before.as_slice() else {
        anyhow::bail!("{} certificates for 2", before.len());
    };
    let plane = scene.control_plane.as_ref().context("a control plane")?;
    plane.misbehave_now("")?;
    listed.revoke(std::slice::from_ref(intermediate))?;
    wait_until(SOON, "certificates of the root", || {
        Ok((chain()?.len() == 1).then_some(()))
    })?;
    wait_until(SOON, "connections", || {
        Ok(answered(&echo(&scene.client, scene.server_b()?)?).then_some(()))
    })
}

#[test]
fn an_own_certificate_on_a_list_is_replaced_at_once() -> Result<()> {
    let listed = Listed::new("")?;
    let scene = &listed.scene;
    let _server = serve(scene.server_b()?, "echo")?;
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    let stranger = scene.node1.pod("stranger")?;
    let leaf = || server_leaf(&stranger, scene.server_b()?, genuine(scene, "client")?);
    let before = leaf()?;
    let mark = scene.agent2()?.log().mark();
    listed.revoke(std::slice::from_ref(&before))?;
    let agent = scene.agent2()?.process();
    agent.wait_for_line_after(mark, "the own certificate is revoked", SOON)?;
    wait_until(SOON, "another certificate", || {
        Ok((leaf()? != before).then_some(()))
    })?;
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    wait_until(SOON, "the warning to go", || {
        Ok((!warnings(scene.agent2()?)?.contains("is revoked")).then_some(()))
    })
}

#[test]
fn a_file_that_turns_bad_leaves_the_last_lists_in_force() -> Result<()> {
    let listed = Listed::new("")?;
    let scene = &listed.scene;
    let _server = serve(scene.server_b()?, "echo")?;
    let stranger = scene.node1.pod("stranger")?;
    let to = scene.server_b()?.at(PORT);
    let revoked = genuine(scene, "client")?;
    listed.revoke(&[leaf_of(&revoked)?])?;
    for bad in ["garbage", "", "-----BEGIN X509 CRL-----\nMIIB"] {
        let rejected = || {
            let labels = ["result=\"rejected\""];
            scene.agent2()?.metric("culvert_crl_updates_total", &labels)
        };
        let before = rejected()?;
        listed.write(bad)?;
        wait_until(SOON, "the file to be rejected", || {
            Ok((rejected()? > before).then_some(()))
        })?;
        let warnings = warnings(scene.agent2()?)?;
        assert!(warnings.contains("CRL_PATH"), "{bad}: {warnings}");
        let outcome = attempt(&stranger, scene.server_b()?, copy_of(&revoked), &to)?;
        assert!(!outcome.reached(), "{bad}: {outcome:?}");
    }
    listed.revoke(&[])?;
    assert!(attempt(&stranger, scene.server_b()?, revoked, &to)?.reached());
    assert!(!warnings(scene.agent2()?)?.contains("CRL_PATH"));
    Ok(())
}

#[test]
fn an_agent_does_not_start_with_a_bad_file() -> Result<()> {
    let fabric = culvert_harness::Fabric::new()?;
    let node = fabric.node()?;
    culvert_harness::Mesh::default().write(&Agent::default_mesh_file(&node))?;
    let file = fabric.directory().join("crl.pem");
    std::fs::write(&file, "garbage")?;
    let mut options = AgentOptions::default();
    let path = file.display().to_string();
    options.env.insert("CRL_PATH".to_owned(), path.clone());
    let agent = node.start_agent(options)?;
    assert!(!agent.process().wait(SOON)?.success());
    let said = agent.log().text(Stream::Err);
    for words in ["CRL_PATH", &path, "holds no revocation list"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    Ok(())
}
