//! What an agent shows its control plane, and what it knows it by, are files that are replaced while it runs.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use culvert_harness::{AgentOptions, Workload, control_plane::TOKEN, wait_until};
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, Setting, answered, connect, echo, mesh_status, serve, status,
};

/// A file as kubelet projects it: behind two links, of which the second is replaced.
struct Projected {
    directory: PathBuf,
    name: &'static str,
    turn: u32,
}

impl Projected {
    fn new(directory: PathBuf, name: &'static str, text: &str) -> Result<Self> {
        std::fs::create_dir(&directory)?;
        let mut projected = Self {
            directory,
            name,
            turn: 0,
        };
        projected.replace(text)?;
        let behind = Path::new("..data").join(name);
        std::os::unix::fs::symlink(behind, projected.path())?;
        Ok(projected)
    }

    fn path(&self) -> PathBuf {
        self.directory.join(self.name)
    }

    fn replace(&mut self, text: &str) -> Result<()> {
        let of_turn = |turn: u32| format!("..{turn}");
        let before = of_turn(self.turn);
        self.turn += 1;
        let now = of_turn(self.turn);
        std::fs::create_dir(self.directory.join(&now))?;
        std::fs::write(self.directory.join(&now).join(self.name), text)?;
        let link = self.directory.join("..data_tmp");
        std::os::unix::fs::symlink(&now, &link)?;
        std::fs::rename(link, self.directory.join("..data"))?;
        match self.turn {
            1 => Ok(()),
            _ => Ok(std::fs::remove_dir_all(self.directory.join(before))?),
        }
    }
}

/// Starts the first agent anew, with this file in place of the usual one.
fn restart_with(scene: &mut Scene, file: &Projected, variables: &[&str]) -> Result<()> {
    let path = file.path().display().to_string();
    let env = variables
        .iter()
        .map(|name| ((*name).to_owned(), path.clone()));
    scene.agent1.kill()?;
    scene.agent1 = scene.node1.start_agent(AgentOptions {
        env: env.collect(),
        ..AgentOptions::default()
    })?;
    scene.agent1.ready()
}

/// Everybody may reach everybody.
fn scene() -> Result<Scene> {
    Scene::with(Setting {
        policies: Some(Vec::new()),
        control_plane: true,
        ..Setting::default()
    })
}

/// Waits until the first agent has lost its control plane for this reason; what it knew is in force.
fn wait_until_lost(scene: &Scene, reason: &str) -> Result<()> {
    wait_until(SOON * 2, reason, || {
        let status = status(&scene.agent1)?;
        let lost = status["mesh"].to_string().contains("lost for");
        let why = status["warnings"].to_string().contains(reason);
        Ok((lost && why).then_some(()))
    })?;
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    Ok(())
}

/// Waits until it has found it again by itself.
fn wait_until_connected(scene: &Scene) -> Result<()> {
    // Attempts are a quarter of a minute apart by then.
    wait_until(SOON * 3, "the agent to be connected", || {
        Ok(mesh_status(&scene.agent1)?
            .contains("connected")
            .then_some(()))
    })
}

#[test]
fn a_token_that_is_replaced_is_read_again() -> Result<()> {
    let mut scene = scene()?;
    let directory = scene.fabric.directory().join("tokens");
    let mut token = Projected::new(directory, "istio-token", TOKEN)?;
    restart_with(&mut scene, &token, &["AUTH_TOKEN"])?;
    let _server = serve(scene.server_b()?, "echo")?;

    scene.control_plane()?.expect_token("another-token")?;
    scene.control_plane()?.restart()?;
    wait_until_lost(&scene, "the bearer token is not the one expected here")?;
    token.replace("another-token\n")?;
    wait_until_connected(&scene)?;
    // The authority, too, is shown the new one: this pod's identity is new.
    let pod = scene.node1.pod("newcomer")?;
    let workload = Workload::of_pod(&pod, NAMESPACE, "newcomer");
    let told = workload.clone();
    scene.change_mesh(|mesh| mesh.workloads.push(told))?;
    scene.agent1.enrol_as(&pod, &workload)?;
    assert!(answered(&connect(
        &pod,
        scene.server_b()?,
        &["--send", "hello", "--read", "5", "--timeout-ms", "9000"]
    )?));
    Ok(())
}

#[test]
fn a_root_that_is_replaced_is_read_again() -> Result<()> {
    let mut scene = scene()?;
    let root = |scene: &mut Scene| -> Result<String> {
        let path = scene.control_plane()?.root().to_owned();
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    let first = root(&mut scene)?;
    let directory = scene.fabric.directory().join("roots");
    let mut file = Projected::new(directory, "root-cert.pem", &first)?;
    restart_with(&mut scene, &file, &["XDS_ROOT_CA", "CA_ROOT_CA"])?;
    let _server = serve(scene.server_b()?, "echo")?;

    scene.control_plane()?.forget_ca()?;
    scene.control_plane()?.restart()?;
    let second = root(&mut scene)?;
    assert_ne!(first, second);
    wait_until_lost(&scene, "invalid peer certificate")?;
    file.replace(&second)?;
    wait_until_connected(&scene)?;
    // The authority, too, is known by the new one.
    let pod = scene.node1.pod("newcomer")?;
    let workload = Workload::of_pod(&pod, NAMESPACE, "newcomer");
    scene.agent1.enrol_as(&pod, &workload)?;
    wait_until(SOON, "a certificate", || {
        let held = status(&scene.agent1)?["certificates"].to_string();
        Ok(held.contains("/sa/newcomer: valid").then_some(()))
    })
}
