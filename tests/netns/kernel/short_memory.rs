//! What a reader that does not read lets its peer park: bounded, also where the short-circuit is on, and none of it is lost.

use std::time::Duration;

use anyhow::{Context as _, Result};
use culvert_harness::wait_until;
use culvert_tests::scene::{PORT, SOON, Scene};

/// What a flow may hold more than it does without the short-circuit.
const MORE: u64 = 4 << 20;
const A_WHILE: Duration = Duration::from_secs(300);

/// What the writers could write, in bytes.
#[derive(Debug)]
struct Parked {
    all: u64,
    /// On the connection that took most.
    most: u64,
}

/// Fills so many flows, and has everything read and compared.
fn fill(mode: &str, count: u16) -> Result<Parked> {
    let mut scene = Scene::new()?;
    scene.short_circuit(mode)?;
    scene.warm(&scene.client, &scene.server_a)?;
    let filling = scene
        .client
        .probe()?
        .args(["fill", "--to", &scene.server_a.at(PORT), "--netns"])
        .arg(scene.server_a.netns().path())
        .args(["--count", &count.to_string()])
        .stdin()
        .spawn()?;
    filling.wait_for_event("used", A_WHILE)?;
    let wanted = if mode == "on" { f64::from(count) } else { 0.0 };
    wait_until(SOON, "all flows to be short-circuited", || {
        Ok((scene.short_circuited()? == wanted).then_some(()))
    })?;
    filling.send_line("")?;
    let full = filling.wait_for_event("full", A_WHILE)?;
    let read = filling.wait_for_event("read", A_WHILE)?;
    println!("{mode}: {full}, {read}");
    let bytes = |field: &str| full[field].as_u64().context("a number of bytes");
    Ok(Parked {
        all: bytes("bytes")?,
        most: bytes("most")?,
    })
}

fn parks_little_more(count: u16) -> Result<()> {
    let (plain, short) = (fill("off", count)?, fill("on", count)?);
    assert!(
        short.all <= plain.all + u64::from(count) * MORE,
        "{short:?}, {plain:?} without"
    );
    assert!(
        short.most <= plain.most + MORE,
        "{short:?}, {plain:?} without"
    );
    Ok(())
}

#[test]
fn a_sender_parks_little_more_at_one_who_does_not_read() -> Result<()> {
    parks_little_more(20)
}

#[test]
#[ignore = "long: takes the kernel's memory for TCP to its limit"]
fn five_hundred_senders_at_once_park_little_more() -> Result<()> {
    parks_little_more(500)
}
