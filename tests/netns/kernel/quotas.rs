//! What a pod has used up is counted right also when it leaves the mesh and comes back.

use anyhow::Result;
use culvert_harness::{Pod, wait_until};
use culvert_tests::scene::{PORT, SOON, Scene, Setting, hold, serve, unplug};

use crate::{
    agent_gone::goes_on,
    kernel_tables::{claims, quota_of, quotas},
};

fn open_flows(scene: &Scene, pod: &Pod) -> Result<i64> {
    let index = quota_of(&scene.node1, pod)?;
    Ok(quotas(&scene.node1)?.get(&index, 0)?.flows)
}

#[test]
fn flows_of_an_earlier_enrolment_count_until_they_end() -> Result<()> {
    let scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let held = [
        hold(&scene.client, &scene.server_a)?,
        hold(&scene.client, &scene.server_a)?,
    ];
    for held in &held {
        goes_on(held, "before")?;
    }
    let workload = scene.workload(&scene.client)?;
    scene.agent1.unenrol(&workload.uid)?;
    scene.agent1.enrol_as(&scene.client, workload)?;
    for held in &held {
        goes_on(held, "after")?;
    }
    assert_eq!(open_flows(&scene, &scene.client)?, 2);
    for held in &held {
        held.close_stdin();
        held.wait_for_event("end", SOON)?;
    }
    wait_until(SOON, "no flow to be counted", || {
        Ok((open_flows(&scene, &scene.client)? == 0).then_some(()))
    })
}

/// Connects that nobody answers, while their pod leaves and comes back.
#[test]
fn claims_of_an_earlier_enrolment_are_forgiven() -> Result<()> {
    let scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    drop(server);
    unplug(&scene.server_a)?;
    let to = scene.server_a.at(PORT);
    let burst = ["burst", "--to", &to, "--count", "5", "--wait-ms", "10000"];
    let _burst = scene.client.probe()?.args(burst).stdin().spawn()?;
    wait_until(SOON, "the claims", || {
        Ok((claims(&scene.node1)?.len() == 5).then_some(()))
    })?;
    let workload = scene.workload(&scene.client)?;
    scene.agent1.unenrol(&workload.uid)?;
    scene.agent1.enrol_as(&scene.client, workload)?;
    let index = quota_of(&scene.node1, &scene.client)?;
    assert_eq!(quotas(&scene.node1)?.get(&index, 0)?.claims, 0);
    Ok(())
}
