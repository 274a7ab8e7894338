//! A wall clock that is stepped: no certificate is in use that has expired by it, and new ones come without anybody's doing.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use culvert_harness::wait_until;
use culvert_tests::scene::{SOON, Scene, Setting, answered, echo, hold, serve, status};
use rustls::pki_types::CertificateDer;

use super::{
    expiry::says,
    peer::{mesh_ca, proof, server_leaf, spiffe, valid_around, validity_of},
};

/// Beyond the life of every certificate.
const AHEAD: Duration = Duration::from_secs(48 * 3600);

fn stage(knobs: &'static str) -> Result<Scene> {
    Scene::with(Setting {
        knobs,
        clock: true,
        control_plane: true,
        ..Setting::default()
    })
}

/// What `server-b`'s agent presents to somebody whose own certificate is good at this moment.
fn shown(scene: &Scene, now: SystemTime) -> Result<CertificateDer<'static>> {
    let proof = proof(&mesh_ca(scene)?, &[&spiffe("client")], valid_around(now))?;
    server_leaf(&scene.client, scene.server_b()?, proof)
}

/// Waits until the agents have certificates that hold at this moment, and use them.
fn wait_for_new(scene: &Scene, now: SystemTime) -> Result<()> {
    wait_until(SOON * 2, "certificates that hold now", || {
        let Ok(leaf) = shown(scene, now) else {
            return Ok(None);
        };
        let validity = validity_of(&leaf)?;
        let holds = (validity.not_before..validity.not_after).contains(&now);
        let used = holds && answered(&echo(&scene.client, scene.server_b()?)?);
        Ok(used.then_some(()))
    })
}

#[test]
fn a_stepped_clock_is_followed_by_new_certificates() -> Result<()> {
    let scene = stage("")?;
    let _servers = (
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    );
    scene.warm(&scene.client, &scene.server_a)?;
    let direct = hold(&scene.client, &scene.server_a)?;
    let now = SystemTime::now();
    wait_for_new(&scene, now)?;
    for (by, moment) in [(AHEAD, now + AHEAD), (Duration::ZERO, now)] {
        let before = shown(&scene, SystemTime::now())?;
        scene.clock()?.set_ahead(by)?;
        wait_for_new(&scene, moment)?;
        assert_ne!(shown(&scene, moment)?, before);
        says(&direct, "still here")?;
    }
    Ok(())
}

/// The clock is stepped beyond the life of the certificates while there are no new ones. Tells whether one of the old is presented.
fn presents_the_old(knobs: &'static str) -> Result<bool> {
    let scene = stage(knobs)?;
    let _server = serve(scene.server_b()?, "echo")?;
    let now = SystemTime::now();
    wait_for_new(&scene, now)?;
    let plane = scene.control_plane.as_ref();
    plane.map_or(Ok(()), |plane| plane.misbehave_now("ca: [refuse]"))?;
    let then = now + AHEAD;
    scene.clock()?.set_ahead(AHEAD)?;
    if let Ok(leaf) = shown(&scene, then) {
        assert!(validity_of(&leaf)?.not_after < then);
        return Ok(true);
    }
    assert!(!answered(&echo(&scene.client, scene.server_b()?)?));
    let said = status(scene.agent2()?)?["certificates"].to_string();
    assert!(said.contains(": expired"), "{said}");
    plane.map_or(Ok(()), |plane| plane.misbehave_now(""))?;
    wait_for_new(&scene, then)?;
    Ok(false)
}

#[test]
fn a_stepped_clock_leaves_no_expired_certificate_in_use() -> Result<()> {
    assert!(!presents_the_old("")?);
    Ok(())
}

#[test]
fn twin_a_stepped_clock_leaves_an_expired_certificate_in_use_when_nobody_looks_at_it() -> Result<()>
{
    assert!(presents_the_old("present-expired")?);
    Ok(())
}
