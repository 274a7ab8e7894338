//! A pod that is refused and tries again and again: it costs the agent and the other pods nothing.

use anyhow::{Result, bail};
use culvert_harness::{Proc, Workload};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, echo, hold, only, serve, status, text,
};

use crate::{admission::Impostor, agent_gone::goes_on, kernel_tables::decisions};

/// Milliseconds: far longer than the test takes; the attempts end with it.
const FLOOD: &str = "600000";

/// Fails unless the flood is still on: what was seen until now was seen during it.
fn still(flood: &Proc) -> Result<()> {
    match flood.status() {
        None => Ok(()),
        Some(status) => bail!("the flood ended early: {status}"),
    }
}

#[test]
fn a_pod_that_is_refused_without_end_holds_nobody_up() -> Result<()> {
    let both = Setting {
        policies: Some(vec![
            only("client"),
            culvert_harness::Policy {
                name: "the-intruder-too".into(),
                ..only("intruder")
            },
        ]),
        ..Setting::default()
    };
    let mut scene = Scene::with(both)?;
    let flooder = scene.node1.pod("flooder")?;
    let workload = Workload::of_pod(&flooder, NAMESPACE, "flooder");
    scene.agent1.enrol_as(&flooder, &workload)?;
    scene.change_mesh(|mesh| mesh.workloads.push(workload))?;
    let server = serve(&scene.server_a, "echo")?;
    for pod in [&flooder, &scene.client, &scene.intruder] {
        scene.warm(pod, &scene.server_a)?;
    }
    let doomed = hold(&scene.intruder, &scene.server_a)?;
    goes_on(&doomed, "before")?;
    let to = scene.server_a.at(PORT);
    let flood = ["conn", "--to", &to, "--millis", FLOOD, "--threads", "2"];
    let flood = flooder.probe()?.args(flood).spawn()?;

    let agent = &scene.agent1;
    culvert_harness::wait_until(SOON, "refusals that are not reported", || {
        Ok((decisions(agent, "refusal_not_reported")? >= 5000).then_some(()))
    })?;
    status(agent)?;
    let mark = agent.log().mark();
    let report = echo(&scene.client, &scene.server_a)?;
    assert!(answered(&report), "{report}");
    let local = [("path", "direct"), ("src.addr", text(&report, "local"))];
    agent.wait_for_access(mark, &local, SOON)?;

    let mark = agent.log().mark();
    scene.change_mesh(|mesh| mesh.policies = vec![only("client")])?;
    doomed.wait_for_event("end", SOON)?;
    let fields = [("src.workload", "intruder"), ("path", "direct")];
    scene.agent1.wait_for_access(mark, &fields, SOON)?;
    still(&flood)?;

    drop(server);
    let mark = scene.agent1.log().mark();
    let impostor = Impostor::meets_the_client(&scene, true)?;
    assert_eq!(impostor.read()?, 0, "{}", impostor.report);
    scene
        .agent1
        .process()
        .wait_for_line_after(mark, "isolated_not_admitted", SOON)?;
    status(&scene.agent1)?;
    still(&flood)?;
    let lost = scene.agent1.metric("culvert_flow_events_lost_total", &[])?;
    assert_eq!(lost, 0.0);
    Ok(())
}

#[test]
fn every_refusal_is_counted_and_a_hundred_in_a_second_are_reported() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.intruder, &scene.server_a)?;
    let mark = scene.agent1.log().mark();
    let to = scene.server_a.at(PORT);
    let load = ["conn", "--to", &to, "--count", "5000", "--threads", "4"];
    let load = scene.intruder.probe()?.args(load).run(SOON)?.json()?;
    assert_eq!(load["errors"], 5000, "{load}");
    assert_eq!(text(&load, "first_error"), "ECONNREFUSED", "{load}");
    let agent = &scene.agent1;
    assert_eq!(decisions(agent, "refused_by_policy")?, 5000);
    let silent = decisions(agent, "refusal_not_reported")?;
    assert!(silent > 0);
    let refused = [("src.workload", "intruder"), ("path", "direct")];
    agent.wait_for_access(mark, &refused, SOON)?;
    Ok(())
}
