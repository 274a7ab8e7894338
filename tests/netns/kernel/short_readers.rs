//! Readers that redirected bytes do not go with: they are recognised, their flow is reset before it hangs, and their pod left alone.

use anyhow::{Context as _, Result, bail};
use culvert_abi::config_flag;
use culvert_harness::{AgentOptions, Proc, culvert_binary, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, text};

use crate::{
    kernel_tables::{config, decisions},
    short_circuit::{outcomes, stage},
};

/// A connection that has been used until the agent has decided about it.
pub fn used(scene: &Scene, options: &[&str], outcome: &str) -> Result<Proc> {
    const TRIES: usize = 5;
    for _ in 0..TRIES {
        let before = scene.proposed(outcome)?;
        let direct = decisions(&scene.agent1, "admitted_direct")?;
        let late = scene
            .client
            .probe()?
            .args(["late", "--to", &scene.server_a.at(PORT), "--netns"])
            .arg(scene.server_a.netns().path())
            .args(options)
            .stdin()
            .spawn()?;
        late.wait_for_event("used", SOON)?;
        if decisions(&scene.agent1, "admitted_direct")? == direct {
            // The agent had no processor for longer than its verdicts are good for.
            continue;
        }
        let decided = wait_until(SOON, &format!("the flow to be {outcome}"), || {
            Ok((scene.proposed(outcome)? > before).then_some(()))
        });
        decided.with_context(|| outcomes(scene))?;
        return Ok(late);
    }
    bail!("none of {TRIES} flows was direct");
}

/// Has something sent, which nobody reads.
pub fn send(late: &Proc) -> Result<()> {
    late.send_line("")?;
    late.wait_for_event("sent", SOON).map(drop)
}

/// Has the reader act; what came of it.
pub fn act(late: &Proc) -> Result<String> {
    late.send_line("")?;
    let done = late.wait_for_event("done", SOON)?;
    Ok(text(&done, "outcome").to_owned())
}

#[test]
fn a_reader_that_splices_is_reset_and_its_pod_remembered() -> Result<()> {
    let scene = stage("")?;
    let log = scene.agent1.log();
    let mark = log.mark();
    let late = used(&scene, &["--act", "splice"], "entered")?;
    send(&late)?;
    let outcome = act(&late)?;
    assert!(
        ["ECONNRESET", "ECONNABORTED"].contains(&outcome.as_str()),
        "{outcome}\n{}",
        outcomes(&scene)
    );
    wait_until(SOON, "it to be counted", || {
        Ok((scene.proposed("stuck")? == 1.0).then_some(()))
    })?;
    log.wait_for(mark, SOON, "the warning", |line| {
        line.text.contains("flow was reset").then_some(())
    })?;
    let fields = [("path", "direct"), ("end", "stuck")];
    scene.agent1.wait_for_access(mark, &fields, SOON)?;
    // From now on its flows are plain TCP, over which it gets what was sent.
    let late = used(&scene, &["--act", "splice"], "reader")?;
    send(&late)?;
    assert_eq!(act(&late)?, "1 bytes");
    assert_eq!(scene.proposed("stuck")?, 1.0);
    assert_eq!(scene.proposed("entered")?, 1.0);
    Ok(())
}

#[test]
fn what_is_known_of_a_pod_outlives_the_agent() -> Result<()> {
    let mut scene = stage("")?;
    let late = used(&scene, &["--act", "splice"], "entered")?;
    send(&late)?;
    act(&late)?;
    scene.agent1.kill()?;
    scene.agent1 = scene.node1.start_agent(AgentOptions::default())?;
    scene.agent1.ready()?;
    let late = used(&scene, &["--act", "splice"], "reader")?;
    send(&late)?;
    assert_eq!(act(&late)?, "1 bytes");
    Ok(())
}

#[test]
fn twin_with_nobody_watching_a_reader_that_splices_hangs() -> Result<()> {
    let scene = stage("skip-readers")?;
    let late = used(&scene, &["--act", "splice"], "entered")?;
    send(&late)?;
    assert_eq!(act(&late)?, "TIMEOUT");
    assert_eq!(scene.proposed("stuck")?, 0.0);
    Ok(())
}

/// What comes by TCP beside redirected bytes would find no room, and be sent again ever later.
#[test]
fn a_reader_with_a_receive_buffer_of_its_own_is_left_alone() -> Result<()> {
    let scene = stage("")?;
    let options = ["--act", "receive", "--receive-buffer", "65536"];
    let late = used(&scene, &options, "receive_buffer")?;
    send(&late)?;
    assert_eq!(act(&late)?, "1 bytes");
    assert_eq!(scene.proposed("entered")?, 0.0);
    Ok(())
}

fn unload(scene: &Scene, more: &[&str]) -> Result<Proc> {
    let node = &scene.node1;
    node.command(culvert_binary()?)
        .args(["unload", "--json", "--pin-dir"])
        .arg(node.pin_directory())
        .arg("--admin-socket")
        .arg(node.directory().join("admin.sock"))
        .args(more)
        .spawn()
}

/// Flows go on over a node that is unloaded, also those that were short-circuited.
#[test]
fn flows_that_were_short_circuited_go_on_after_an_unload() -> Result<()> {
    let scene = stage("")?;
    let late = used(&scene, &["--act", "receive"], "entered")?;
    scene.agent1.kill()?;
    let unload = unload(&scene, &[])?;
    assert!(unload.wait(SOON)?.success(), "{}", unload.log().tail());
    send(&late)?;
    assert_eq!(act(&late)?, "1 bytes");
    Ok(())
}

/// With the map goes what is in it.
#[test]
fn unloading_waits_for_what_is_unread() -> Result<()> {
    let scene = stage("")?;
    let late = used(&scene, &["--act", "receive"], "entered")?;
    send(&late)?;
    scene.agent1.kill()?;
    let unload = unload(&scene, &[])?;
    wait_until(SOON, "the hooks to leave", || {
        let flags = config(&scene.node1)?.flags;
        Ok((flags & config_flag::LEAVING != 0).then_some(()))
    })?;
    assert_eq!(act(&late)?, "1 bytes");
    assert!(unload.wait(SOON)?.success(), "{}", unload.log().tail());
    let said = unload.log().tail();
    assert!(said.contains("\"unread\":0"), "{said}");
    Ok(())
}

#[test]
fn what_is_not_read_in_time_is_not_lost_in_silence() -> Result<()> {
    let scene = stage("")?;
    let late = used(&scene, &["--act", "receive"], "entered")?;
    send(&late)?;
    scene.agent1.kill()?;
    let unload = unload(&scene, &["--timeout", "2"])?;
    assert!(unload.wait(SOON)?.success(), "{}", unload.log().tail());
    let said = unload.log().tail();
    assert!(said.contains("\"unread\":1"), "{said}");
    let outcome = act(&late)?;
    assert!(
        ["ECONNRESET", "ECONNABORTED"].contains(&outcome.as_str()),
        "{outcome}"
    );
    Ok(())
}
