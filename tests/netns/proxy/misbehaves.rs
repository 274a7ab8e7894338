//! A control plane that misbehaves: the mesh stays as it was, what is good is taken, and what is wrong is told.

use anyhow::{Result, ensure};
use culvert_harness::{AgentOptions, Policy, Proc, wait_until};
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, Setting, answered, echo, mesh_status, serve, status,
};

/// A stage on which the control plane misbehaves.
struct Misbehaving {
    scene: Scene,
    _server: Proc,
}

impl Misbehaving {
    fn new() -> Result<Self> {
        let scene = Scene::with(Setting {
            control_plane: true,
            ..Setting::default()
        })?;
        let server = serve(scene.server_b()?, "echo")?;
        Ok(Self {
            scene,
            _server: server,
        })
    }

    fn begin(&mut self, behaviour: &str) -> Result<()> {
        self.scene.control_plane()?.misbehave_now(behaviour)
    }

    /// Something is to be told, and not waited for.
    fn push(&mut self) -> Result<()> {
        let policies = &mut self.scene.mesh.policies;
        policies.push(Policy::deny(NAMESPACE, &format!("p{}", policies.len())));
        self.scene.mesh.write(&self.scene.mesh_file())
    }

    /// Waits until the first agent has heard of all that was pushed.
    fn is_told_all(&self) -> Result<()> {
        let count = self.scene.mesh.policies.len() as u64;
        wait_until(SOON * 2, "all policies", || {
            let known = status(&self.scene.agent1)?["policies"].as_u64();
            Ok((known == Some(count)).then_some(()))
        })
    }

    fn warnings(&self) -> Result<String> {
        Ok(status(&self.scene.agent1)?["warnings"].to_string())
    }

    fn reaches(&self) -> Result<bool> {
        Ok(answered(&echo(&self.scene.client, self.scene.server_b()?)?))
    }

    /// The agent is as it was.
    fn changes_nothing(&self, behaviour: &str) -> Result<()> {
        assert!(self.reaches()?, "{behaviour}");
        let agents = [&self.scene.agent1, self.scene.agent2()?];
        let ended = agents.map(|agent| agent.process().status());
        ensure!(ended == [None, None], "{behaviour}: {ended:?}");
        Ok(())
    }

    /// The control plane behaves again, and what it meant to say is known.
    fn is_over(&mut self) -> Result<()> {
        self.begin("")?;
        // Attempts to connect may be a quarter of a minute apart by now.
        wait_until(SOON * 2, "the agent to be connected", || {
            let connected = mesh_status(&self.scene.agent1)?.contains("connected");
            Ok(connected.then_some(()))
        })?;
        self.is_told_all()?;
        assert!(self.reaches()?);
        Ok(())
    }
}

#[test]
fn a_resource_that_cannot_be_meant_is_refused_by_name_and_changes_nothing() -> Result<()> {
    let mut stage = Misbehaving::new()?;
    let uid = stage.scene.workload(&stage.scene.client)?.uid.clone();
    for fault in [
        "garbage",
        "absurd-length",
        "absurd-values",
        "unknown-enum",
        "wrong-type",
    ] {
        let mark = stage.scene.control_plane()?.log().mark();
        stage.begin(&format!("xds: [{{{fault}: {uid}}}]"))?;
        let refused = format!("1 resources were refused, such as {uid}: it ");
        wait_until(SOON, &refused, || {
            Ok(stage.warnings()?.contains(&refused).then_some(()))
        })?;
        let plane = stage.scene.control_plane()?;
        plane.log().wait_for(mark, SOON, "the refusal", |line| {
            let refusal = line.text.contains("a client refuses what it was sent");
            (refusal && line.text.contains(&uid)).then_some(())
        })?;
        stage.changes_nothing(fault)?;
        // What is good is taken, and what is not is not forgotten over it.
        stage.push()?;
        stage.is_told_all()?;
        assert!(stage.warnings()?.contains(&refused), "{fault}");
        stage.changes_nothing(fault)?;
    }
    stage.is_over()?;
    wait_until(SOON, "no refusal", || {
        Ok((!stage.warnings()?.contains("were refused")).then_some(()))
    })
}

#[test]
fn a_control_plane_that_breaks_off_or_talks_of_something_else_changes_nothing() -> Result<()> {
    let mut stage = Misbehaving::new()?;
    for behaviour in ["xds: [{reset-after: 1}]", "xds: [wrong-response-type]"] {
        let terminated = |stage: &Misbehaving| {
            let name = "istio_xds_connection_terminations_total";
            stage.scene.agent1.metric(name, &[])
        };
        let before = terminated(&stage)?;
        stage.begin(behaviour)?;
        stage.push()?;
        // And again, once it has come back.
        wait_until(SOON * 2, behaviour, || {
            Ok((terminated(&stage)? >= before + 2.0).then_some(()))
        })?;
        stage.changes_nothing(behaviour)?;
        stage.is_over()?;
    }
    Ok(())
}

#[test]
fn versions_that_are_all_the_same_hide_no_change() -> Result<()> {
    let mut stage = Misbehaving::new()?;
    stage.begin("xds: [wrong-version]")?;
    for _ in 0..3 {
        stage.push()?;
        stage.is_told_all()?;
        stage.changes_nothing("wrong-version")?;
    }
    stage.is_over()
}

#[test]
fn under_a_control_plane_that_stalls_agents_go_on_and_a_new_one_says_that_it_waits() -> Result<()> {
    let mut stage = Misbehaving::new()?;
    stage.begin("xds: [stall]")?;
    let known = status(&stage.scene.agent1)?["policies"].as_u64();
    stage.push()?;
    let node = stage.scene.fabric.node()?;
    let newcomer = node.start_agent(AgentOptions::default())?;
    let unready = wait_until(SOON, "the new agent to answer", || {
        Ok(newcomer.get(15021, "/healthz/ready").ok())
    })?;
    assert_eq!(unready.status, 500, "{}", unready.body);
    for words in [
        "istio.workload.Address",
        "istio.security.Authorization",
        "no answer yet",
    ] {
        assert!(unready.body.contains(words), "{}", unready.body);
    }
    let waits = status(&newcomer)?;
    assert!(
        waits["pending"].to_string().contains("no answer yet"),
        "{waits}"
    );
    stage.changes_nothing("stall")?;
    assert_eq!(status(&stage.scene.agent1)?["policies"].as_u64(), known);
    stage.is_over()?;
    newcomer.ready()
}
