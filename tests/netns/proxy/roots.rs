//! A mesh that goes over to another root, node by node: nobody is refused on the way.

use std::cell::Cell;

use anyhow::{Context as _, Result};
use culvert_harness::{Agent, wait_until};
use culvert_tests::scene::{SOON, Scene, Setting, answered, echo, serve};

use super::peer::spiffe;

/// Such certificates are renewed every few seconds, since they are back-dated by as much; what was trusted with one is for as long.
const LIFE: &str = "60s";
/// The identities of the first node.
const FIRST: &str = "client, server-a, intruder";

struct Rotation {
    scene: Scene,
    made: Cell<u32>,
    failed: Cell<u32>,
}

impl Rotation {
    /// Connects both ways for as long as `done` is false. What is renewed is used by the next connection.
    fn connect_until(&self, what: &str, done: impl Fn() -> bool) -> Result<()> {
        let (client, server_b) = (&self.scene.client, self.scene.server_b()?);
        wait_until(SOON * 2, what, || {
            for (from, to) in [(client, server_b), (server_b, client)] {
                let failed = !answered(&echo(from, to)?);
                self.made.update(|made| made + 1);
                self.failed.update(|all| all + u32::from(failed));
            }
            Ok(done().then_some(()))
        })
    }

    /// Connects until the authority has behaved like this for so long that the certificates of these are of the next root, or still of
    /// the first.
    fn until_issued(&self, behaviour: &str, accounts: &[&str], by_next: bool) -> Result<()> {
        let plane = self.scene.control_plane.as_ref();
        let plane = plane.context("a control plane")?;
        let issued = |account: &&str| {
            let words = format!("identity={} by_next={by_next}", spiffe(account));
            let lines = plane.log().lines();
            lines
                .iter()
                .filter(|line| line.text.contains(&words))
                .count()
        };
        let before: Vec<_> = accounts.iter().map(issued).collect();
        plane.misbehave_now(behaviour)?;
        self.connect_until(behaviour, || {
            // The one before the last is in use: its renewal was asked for.
            let mut now = accounts.iter().map(issued).zip(&before);
            now.all(|(now, before)| now >= before + 3)
        })
    }
}

/// Tells how many of the connections failed that were made meanwhile.
fn failures_of_a_rotation(knobs: &'static str) -> Result<u32> {
    let scene = Scene::with(Setting {
        knobs,
        env: vec![("SECRET_TTL", LIFE.to_owned())],
        policies: Some(Vec::new()),
        control_plane: true,
        ..Setting::default()
    })?;
    let _servers = (
        serve(&scene.client, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    let rotation = Rotation {
        scene,
        made: Cell::new(0),
        failed: Cell::new(0),
    };
    // First everybody hears of the next root. Then the first node's certificates are of it, then all; what comes with those says
    // nothing of the root before, under which others' still are.
    rotation.until_issued("ca: [both-roots]", &["client", "server-b"], false)?;
    let knows_both = |agent: &Agent| agent.log().contains("trusted by have changed\troots=2");
    assert!(knows_both(&rotation.scene.agent1) && knows_both(rotation.scene.agent2()?));
    assert_eq!(rotation.failed.get(), 0);
    let first = format!("ca: [both-roots, {{next-root: [{FIRST}]}}]");
    rotation.until_issued(&first, &["client"], true)?;
    rotation.until_issued("ca: [{next-root: []}]", &["server-b"], true)?;
    assert!(rotation.made.get() > 20);
    Ok(rotation.failed.get())
}

#[test]
fn while_a_mesh_goes_over_to_another_root_no_connection_fails() -> Result<()> {
    assert_eq!(failures_of_a_rotation("")?, 0);
    Ok(())
}

#[test]
fn twin_connections_fail_on_the_way_when_a_new_root_takes_the_place_of_the_others() -> Result<()> {
    assert_ne!(failures_of_a_rotation("replace-roots")?, 0);
    Ok(())
}
