//! What a reader that does not read lets its peer park: bounded, also where the short-circuit is on, and none of it is lost.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use culvert_harness::{Proc, lacks, stretch, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene};

use crate::short_circuit::say;

/// What a flow may hold more than it does without the short-circuit.
const MORE: u64 = 4 << 20;
const A_WHILE: Duration = Duration::from_secs(300);
/// Far more than reading takes, on a busy machine too.
const NO_STALL: Duration = Duration::from_secs(30);
/// Who uses up the kernel's memory for TCP changes what others measure.
static ALONE: Mutex<()> = Mutex::new(());

/// What the writers could write, in bytes.
#[derive(Debug)]
struct Parked {
    all: u64,
    /// On the connection that took most.
    most: u64,
    /// Messages that went by TCP because the reader, or the node, had enough.
    full: f64,
    pressure: f64,
}

/// Flows that are in use, and short-circuited where the mode is `on`.
fn used(scene: &mut Scene, mode: &str, count: u16, options: &[&str]) -> Result<Proc> {
    say(scene, mode)?;
    scene.warm(&scene.client, &scene.server_a)?;
    let filling = scene
        .client
        .probe()?
        .args(["fill", "--to", &scene.server_a.at(PORT), "--netns"])
        .arg(scene.server_a.netns().path())
        .args(["--count", &count.to_string()])
        .args(options)
        .stdin()
        .spawn()?;
    filling.wait_for_event("used", A_WHILE)?;
    let wanted = if mode == "on" { f64::from(count) } else { 0.0 };
    wait_until(SOON, "all flows to be short-circuited", || {
        Ok((scene.short_circuited()? == wanted).then_some(()))
    })?;
    Ok(filling)
}

/// Fills so many flows, and has everything read and compared.
fn fill(knobs: &'static str, mode: &str, count: u16) -> Result<Parked> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut scene = Scene::without(knobs)?;
    let filling = used(&mut scene, mode, count, &[])?;
    filling.send_line("")?;
    let full = filling.wait_for_event("full", A_WHILE)?;
    let read = filling.wait_for_event("read", A_WHILE)?;
    println!("{mode}: {full}, {read}");
    let bytes = |field: &str| full[field].as_u64().context("a number of bytes");
    Ok(Parked {
        all: bytes("bytes")?,
        most: bytes("most")?,
        full: scene.by_tcp("full")?,
        pressure: scene.by_tcp("pressure")?,
    })
}

fn parks_little_more(count: u16) -> Result<Parked> {
    let (plain, short) = (fill("", "off", count)?, fill("", "on", count)?);
    println!("{short:?}, {plain:?} without");
    assert!(
        short.all <= plain.all + u64::from(count) * MORE,
        "{short:?}, {plain:?} without"
    );
    assert!(
        short.most <= plain.most + MORE,
        "{short:?}, {plain:?} without"
    );
    Ok(short)
}

#[test]
fn a_sender_parks_little_more_at_one_who_does_not_read() -> Result<()> {
    let parked = parks_little_more(20)?;
    assert!(parked.full > 0.0, "{parked:?}");
    Ok(())
}

#[test]
fn twin_without_the_limit_a_sender_parks_as_much_as_it_likes() -> Result<()> {
    let (plain, short) = (fill("", "off", 1)?, fill("skip-limit", "on", 1)?);
    assert!(
        short.all > plain.all + 4 * MORE,
        "{short:?}, {plain:?} without"
    );
    assert_eq!(short.full, 0.0);
    Ok(())
}

/// As if it had 16 MiB more than are in use when the flows are taken: others on this machine need theirs.
#[test]
fn a_node_that_is_short_of_memory_for_tcp_goes_on_by_tcp() -> Result<()> {
    let parked = fill("little-memory", "on", 20)?;
    assert!(parked.pressure > 0.0, "{parked:?}");
    Ok(())
}

/// Has readers of so many flows read nothing for some seconds, twice, and then everything, which is compared; how long reading took each
/// time. With this congestion control, or the machine's.
fn read_after_a_pause(mode: &str, count: u16, congestion: Option<&str>) -> Result<Vec<Duration>> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut scene = Scene::new()?;
    if let Some(name) = congestion {
        for pod in [&scene.client, &scene.server_a] {
            pod.in_netns(|| std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", name))?
                .context("setting the pod's congestion control")?;
        }
    }
    let options = ["--times", "2", "--pause-ms", "4000"];
    let filling = used(&mut scene, mode, count, &options)?;
    filling.send_line("")?;
    filling.wait_for_event("done", A_WHILE)?;
    let reads = filling.events("read");
    println!("{mode}: {reads:?}");
    assert_eq!(reads.len(), 2);
    let took = reads
        .iter()
        .map(|read| read["ms"].as_u64().map(Duration::from_millis));
    took.map(|time| time.context("a time")).collect()
}

/// What goes by TCP beside redirected bytes finds room: otherwise it would be sent again, after a time that doubles each time.
fn no_stall(count: u16, congestion: Option<&str>) -> Result<()> {
    for mode in ["off", "on"] {
        for took in read_after_a_pause(mode, count, congestion)? {
            assert!(took < stretch(NO_STALL), "{mode}: {took:?}");
        }
    }
    Ok(())
}

#[test]
fn readers_that_pause_get_the_rest_without_a_stall() -> Result<()> {
    no_stall(20, None)
}

#[test]
#[ignore = "long: takes the kernel's memory for TCP to its limit"]
fn five_hundred_readers_that_pause_get_the_rest_without_a_stall() -> Result<()> {
    no_stall(500, Some("cubic"))
}

/// However long that takes: see docs/SHORT-CIRCUIT.md.
#[test]
#[ignore = "long: takes the kernel's memory for TCP to its limit"]
fn five_hundred_readers_that_pause_lose_nothing_with_bbr() -> Result<()> {
    let there = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control")?;
    if !there.split_whitespace().any(|name| name == "bbr") {
        lacks("BBR", there.trim());
        return Ok(());
    }
    read_after_a_pause("on", 500, Some("bbr")).map(drop)
}

#[test]
#[ignore = "long: takes the kernel's memory for TCP to its limit"]
fn five_hundred_senders_at_once_park_little_more() -> Result<()> {
    parks_little_more(500).map(drop)
}
