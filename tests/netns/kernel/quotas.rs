//! What a pod has used up is counted right also when it leaves the mesh and comes back.

use anyhow::Result;
use culvert_harness::{Pod, wait_until};
use culvert_tests::scene::{SOON, Scene, Setting, hold, serve};

use crate::{
    agent_gone::goes_on,
    kernel_tables::{quota_of, quotas},
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
