//! A change of policy cuts the open connections that it forbids, and no others.

use super::access::wait_for_failure;
use anyhow::Result;
use culvert_harness::{Match, Pod, Policy, Proc, wait_until};
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, Setting, answered, echo, hold, principal, serve, text,
};
use nix::sys::signal::Signal;

fn says(held: &Proc, word: &str) -> Result<()> {
    let mark = held.log().mark();
    held.send_line(word)?;
    let answer = held.wait_for_event_after(mark, "data", SOON)?;
    assert!(text(&answer, "data").contains(word), "{answer}");
    Ok(())
}

/// Two open connections to `server-b`, one of which a new policy forbids. Tells whether that one was cut.
fn change_cuts(
    knobs: &'static str,
    doomed: impl Fn(&Scene) -> Result<Pod>,
    deny: impl Fn(&Pod) -> Policy,
    path: &str,
) -> Result<bool> {
    let mut scene = Scene::with(Setting {
        knobs,
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let server = serve(scene.server_b()?, "echo")?;
    let doomed = doomed(&scene)?;
    let (cut, kept) = (
        hold(&doomed, scene.server_b()?)?,
        hold(&scene.client, scene.server_b()?)?,
    );
    says(&cut, "before")?;
    says(&kept, "before")?;
    let mark = scene.agent2()?.log().mark();
    scene.change_mesh(|mesh| mesh.policies = vec![deny(&doomed)])?;
    let was_cut = knobs.is_empty();
    if was_cut {
        let end = cut.wait_for_event("end", SOON)?;
        assert_eq!(text(&end, "how"), "ECONNRESET", "{end}");
        let line = wait_for_failure(scene.agent2()?, mark, "policy changed", &[("path", path)])?;
        assert_eq!(line.field("bytes_recv").as_deref(), Some("7"), "{line:?}");
        let closed = server.wait_for_event("closed", SOON)?;
        assert_eq!(text(&closed, "end"), "ECONNRESET", "{closed}");
    } else {
        // The change is in force for new connections; the old one is not looked at.
        let refused = echo(&doomed, scene.server_b()?)?;
        assert!(!answered(&refused), "{refused}");
        says(&cut, "after")?;
    }
    says(&kept, "after")?;
    Ok(was_cut)
}

fn intruder(scene: &Scene) -> Result<Pod> {
    Ok(scene.intruder.clone())
}

fn not_the_intruder(_: &Pod) -> Policy {
    Policy::deny(NAMESPACE, "not-the-intruder").when(Match::principal(&principal("intruder")))
}

fn outsider(scene: &Scene) -> Result<Pod> {
    scene.node1.pod("outsider")
}

fn not_the_address(pod: &Pod) -> Policy {
    Policy::deny(NAMESPACE, "not-the-address").when(Match::source(&format!("{}/32", pod.address())))
}

#[test]
fn a_tunnelled_connection_is_cut() -> Result<()> {
    assert!(change_cuts("", intruder, not_the_intruder, "hbone")?);
    Ok(())
}

#[test]
fn twin_a_tunnelled_connection_goes_on_when_open_ones_are_not_judged_again() -> Result<()> {
    assert!(!change_cuts(
        "skip-reauthorization",
        intruder,
        not_the_intruder,
        "hbone"
    )?);
    Ok(())
}

#[test]
fn a_plaintext_connection_is_cut() -> Result<()> {
    assert!(change_cuts("", outsider, not_the_address, "plaintext")?);
    Ok(())
}

#[test]
fn twin_a_plaintext_connection_goes_on_when_open_ones_are_not_judged_again() -> Result<()> {
    assert!(!change_cuts(
        "skip-reauthorization",
        outsider,
        not_the_address,
        "plaintext"
    )?);
    Ok(())
}

/// The agent of `server-b` is told to end, and while it lets an open connection finish, policy forbids it. Tells whether the
/// connection was cut.
fn change_cuts_while_ending(knobs: &'static str) -> Result<bool> {
    let mut scene = Scene::with(Setting {
        knobs,
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let _server = serve(scene.server_b()?, "echo")?;
    let held = hold(&scene.intruder, scene.server_b()?)?;
    says(&held, "before")?;
    scene.agent2()?.process().kill(Signal::SIGTERM)?;
    wait_until(SOON, "new connections to be refused", || {
        Ok((!answered(&echo(&scene.client, scene.server_b()?)?)).then_some(()))
    })?;
    let mark = scene.agent2()?.log().mark();
    let told = scene.control_plane()?.log().mark();
    scene.mesh.policies = vec![not_the_intruder(&scene.intruder)];
    scene.mesh.write(&scene.mesh_file())?;
    if knobs.is_empty() {
        let end = held.wait_for_event("end", SOON)?;
        assert_eq!(text(&end, "how"), "ECONNRESET", "{end}");
        let fields = [("path", "hbone"), ("src.workload", "intruder")];
        wait_for_failure(scene.agent2()?, mark, "policy changed", &fields)?;
        Ok(true)
    } else {
        let node2 = scene.node2.clone();
        scene.control_plane()?.wait_until_told(told, &[&node2])?;
        says(&held, "after")?;
        Ok(false)
    }
}

#[test]
fn a_connection_is_cut_while_its_agent_ends() -> Result<()> {
    assert!(change_cuts_while_ending("")?);
    Ok(())
}

#[test]
fn twin_a_connection_goes_on_while_its_agent_ends_when_open_ones_are_not_judged_again() -> Result<()>
{
    assert!(!change_cuts_while_ending("skip-reauthorization")?);
    Ok(())
}
