//! What a program does to its socket while that is short-circuited, or has done before: its reads are as over TCP. Each with what
//! comes of it where nobody looks.

use anyhow::{Result, bail, ensure};
use culvert_harness::{lacks, stretch, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, text};
use nix::sys::signal::Signal;

use crate::{
    short_circuit::stage,
    short_readers::{act, send, used},
};

/// What comes of a read on a flow that is short-circuited before the reader prepares for it, and a byte is sent.
fn read_late(scene: &Scene, how: &str) -> Result<String> {
    let late = used(scene, &["--act", how], "entered")?;
    send(&late)?;
    act(&late)
}

#[test]
fn a_call_that_waits_for_all_gets_all_on_a_socket_that_was_made_blocking() -> Result<()> {
    let scene = stage("")?;
    assert_eq!(read_late(&scene, "wait-all")?, "2 bytes");
    assert!(scene.by_tcp("reader")? >= 1.0);
    Ok(())
}

#[test]
fn twin_without_the_readers_flags_a_call_that_waits_for_all_returns_with_less() -> Result<()> {
    let scene = stage("skip-reader-flags")?;
    assert_eq!(read_late(&scene, "wait-all")?, "1 bytes");
    Ok(())
}

/// It began when everything went by TCP, and sees nothing else until it ends.
#[test]
fn a_call_that_waits_for_all_gets_all_when_its_socket_does_not_block_any_more() -> Result<()> {
    let scene = stage("")?;
    assert_eq!(read_late(&scene, "wait-all-meanwhile")?, "2 bytes");
    Ok(())
}

#[test]
fn twin_without_looking_for_threads_that_wait_it_does_not_see_what_is_redirected() -> Result<()> {
    let scene = stage("skip-waiters,skip-calls")?;
    assert_eq!(read_late(&scene, "wait-all-meanwhile")?, "1 bytes");
    Ok(())
}

#[test]
fn a_socket_with_a_low_water_mark_is_not_readable_below_it() -> Result<()> {
    let scene = stage("")?;
    assert_eq!(read_late(&scene, "low-water")?, "2 bytes");
    assert!(scene.by_tcp("reader")? >= 1.0);
    Ok(())
}

#[test]
fn twin_without_the_readers_flags_a_socket_is_readable_below_its_low_water_mark() -> Result<()> {
    let scene = stage("skip-reader-flags")?;
    assert_eq!(read_late(&scene, "low-water")?, "1 bytes");
    Ok(())
}

#[test]
fn a_receive_buffer_that_is_made_small_holds_little() -> Result<()> {
    let scene = stage("")?;
    assert_eq!(read_late(&scene, "small-buffer")?, "0 bytes");
    assert!(scene.by_tcp("reader")? >= 1.0);
    Ok(())
}

#[test]
fn twin_without_the_readers_flags_a_small_receive_buffer_holds_much_more() -> Result<()> {
    let scene = stage("skip-reader-flags")?;
    let outcome = read_late(&scene, "small-buffer")?;
    let beyond: u64 = outcome.trim_end_matches(" bytes").parse()?;
    assert!(beyond > 1 << 20, "{outcome}");
    Ok(())
}

/// Has a thread wait on a socket from before that does not block, until the agent has decided about the flow; what it then gets.
fn wait_early(scene: &Scene, outcome: &str) -> Result<String> {
    let early = scene
        .client
        .probe()?
        .args(["early", "--to", &scene.server_a.at(PORT), "--netns"])
        .arg(scene.server_a.netns().path())
        .stdin()
        .spawn()?;
    early.wait_for_event("used", SOON)?;
    wait_until(SOON, &format!("the flow to be {outcome}"), || {
        Ok((scene.proposed(outcome)? == 1.0).then_some(()))
    })?;
    act(&early)
}

#[test]
fn a_thread_that_waits_since_before_its_socket_did_not_block_gets_what_comes() -> Result<()> {
    let scene = stage("")?;
    assert_eq!(wait_early(&scene, "blocking")?, "1 bytes");
    assert_eq!(scene.short_circuited()?, 0.0);
    Ok(())
}

#[test]
fn twin_without_looking_for_threads_that_wait_one_waits_for_ever() -> Result<()> {
    let scene = stage("skip-waiters,skip-calls")?;
    assert_eq!(wait_early(&scene, "entered")?, "TIMEOUT");
    Ok(())
}

/// What a thread reads that has begun before the agent has decided about the flow, and gets no processor until a byte and the end of the
/// stream were sent. None under emulation, where an agent needs longer for that than anybody can be kept waiting.
fn read_starved(scene: &Scene, outcome: &str) -> Result<Option<String>> {
    const TRIES: usize = 10;
    if stretch(SOON) > SOON {
        return Ok(None);
    }
    let agent = scene.agent1.process();
    for _ in 0..TRIES {
        let decided =
            || Ok::<_, anyhow::Error>([scene.proposed("busy")?, scene.proposed("entered")?]);
        let before = decided()?;
        let as_expected = scene.proposed(outcome)?;
        agent.kill(Signal::SIGSTOP)?;
        let starved = scene
            .client
            .probe()?
            .args(["starved", "--to", &scene.server_a.at(PORT), "--netns"])
            .arg(scene.server_a.netns().path())
            .stdin()
            .spawn()?;
        starved.wait_for_event("starved", SOON)?;
        agent.kill(Signal::SIGCONT)?;
        let was_decided = wait_until(SOON, "the agent to decide about the flow", || {
            Ok((decided()? != before).then_some(()))
        });
        starved.send_line("")?;
        let done = starved.wait_for_event("done", SOON)?;
        // Otherwise it was one like any other, and shows nothing.
        if done["starved"] == true {
            was_decided?;
            ensure!(
                scene.proposed(outcome)? > as_expected,
                "{outcome}: {before:?}"
            );
            return Ok(Some(text(&done, "outcome").to_owned()));
        }
    }
    bail!("{TRIES} times the thread got a processor before the flow was {outcome}");
}

#[test]
fn a_thread_that_has_begun_to_read_before_and_goes_on_late_gets_what_was_sent() -> Result<()> {
    let scene = stage("")?;
    if let Some(read) = read_starved(&scene, "busy")? {
        assert_eq!(read, "1 bytes");
        assert_eq!(scene.short_circuited()?, 0.0);
    }
    Ok(())
}

#[test]
fn twin_without_looking_for_calls_from_before_a_byte_before_the_end_is_lost() -> Result<()> {
    let scene = stage("skip-calls")?;
    if let Some(read) = read_starved(&scene, "entered")? {
        assert_eq!(read, "EOF");
    }
    Ok(())
}

/// Says that this kernel has no TLS, if the probe said so.
fn is_without_tls(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    let is_without = text.contains("no tls");
    if is_without {
        lacks("TLS on top of TCP", "setsockopt(TCP_ULP) refuses it");
    }
    is_without
}

#[test]
fn a_socket_with_tls_in_the_kernel_is_left_alone() -> Result<()> {
    let scene = stage("")?;
    let late = match used(&scene, &["--act", "receive", "--tls"], "upper_layer") {
        Err(error) if is_without_tls(&error) => return Ok(()),
        late => late?,
    };
    send(&late)?;
    assert_eq!(act(&late)?, "1 bytes");
    assert_eq!(scene.short_circuited()?, 0.0);
    Ok(())
}

#[test]
fn a_socket_that_gets_tls_in_the_kernel_goes_on_by_tcp() -> Result<()> {
    let scene = stage("")?;
    let late = used(&scene, &["--act", "tls"], "entered")?;
    match send(&late) {
        Err(error) if is_without_tls(&error) => return Ok(()),
        sent => sent?,
    }
    assert_eq!(act(&late)?, "1 bytes");
    assert!(scene.by_tcp("changed")? >= 1.0);
    Ok(())
}
