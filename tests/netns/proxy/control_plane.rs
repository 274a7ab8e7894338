//! The development control plane as a process: what the harness relies on before an agent is asked.

use anyhow::Result;
use culvert_harness::{ControlPlane, Fabric, Mesh, TcpState, Workload, culvert_binary};
use culvert_tests::scene::SOON;
use nix::sys::signal::Signal;

fn mesh_of(name: &str) -> Mesh {
    Mesh {
        workloads: vec![Workload {
            uid: name.to_owned(),
            name: name.to_owned(),
            namespace: "demo".to_owned(),
            protocol: "HBONE".to_owned(),
            ..Workload::default()
        }],
        ..Mesh::default()
    }
}

#[test]
fn it_follows_its_files_and_comes_back_at_the_same_address() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let mesh_file = fabric.directory().join("mesh.yaml");
    mesh_of("first").write(&mesh_file)?;
    let dev_ca = fabric.directory().join("dev-ca");
    let mut plane = ControlPlane::start(&node, &culvert_binary()?, &mesh_file, &dev_ca)?;
    let listens = || -> Result<bool> {
        let mut sockets = node.sockets()?.into_iter();
        Ok(sockets.any(|one| one.state == TcpState::Listen && one.local == plane.address()))
    };
    assert!(listens()?);
    let told = |plane: &ControlPlane, line: &str| plane.process().wait_for_line(line, SOON);
    told(&plane, "the mesh file is in effect")?;
    mesh_of("second").write(&mesh_file)?;
    told(&plane, "revision=2")?;
    plane.misbehave("xds: [stall]")?;
    told(&plane, "another behaviour is in effect")?;
    plane.misbehave("xds: [unheard-of]")?;
    told(&plane, "the behaviour stays as it was")?;
    plane.misbehave("")?;

    let address = plane.address();
    plane.stop(Signal::SIGTERM)?;
    assert!(
        plane
            .process()
            .status()
            .is_some_and(|status| status.success())
    );
    plane.restart()?;
    assert_eq!(plane.address(), address);
    told(&plane, "the mesh file is in effect")?;
    assert!(dev_ca.join("root-cert.pem").is_file());
    Ok(())
}
