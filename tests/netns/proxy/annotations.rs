//! The annotations file beside a control plane: what it says holds at once and later, and what it does not say right changes nothing.

use anyhow::Result;
use culvert_harness::{
    Agent, ControlPlane, Fabric, Mesh, Namespace, Workload, culvert_binary, mesh::replace_file,
    wait_until,
};
use culvert_tests::scene::{NAMESPACE, SOON, Scene, answered, echo, serve, status, text};

const DIRECT: &str = "culvert.dev/direct";
const READINESS: u16 = 15021;
/// What is misspelt is the key, the annotation, the value; the last says the same thing twice.
const WRONG: [(&str, &str); 4] = [
    (
        "namespaces:\n- name: demo\n  annotation: {}\n",
        "annotation",
    ),
    (
        "namespaces:\n- name: demo\n  annotations: {culvert.dev/dirct: \"off\"}\n",
        "there is no annotation culvert.dev/dirct",
    ),
    (
        "namespaces:\n- name: demo\n  annotations: {culvert.dev/direct: none}\n",
        "neither on nor off",
    ),
    (
        "namespaces:\n- {name: demo, annotations: {}}\n- {name: demo, annotations: {}}\n",
        "the namespace demo occurs twice",
    ),
];

/// By which way the next connection goes, once the pair is known.
fn path(scene: &Scene) -> Result<String> {
    let mark = scene.agent1.log().mark();
    assert!(answered(&echo(&scene.client, &scene.server_a)?));
    let fields = [("src.workload", "client"), ("dst.workload", "server-a")];
    let line = scene.agent1.wait_for_access(mark, &fields, SOON)?;
    Ok(line.field("path").unwrap_or_default())
}

fn wait_for_path(scene: &Scene, wanted: &str) -> Result<()> {
    wait_until(SOON, &format!("connections to go {wanted}"), || {
        Ok((path(scene)? == wanted).then_some(()))
    })
}

fn annotations_file(scene: &Scene) -> std::path::PathBuf {
    Mesh::annotations_file(&scene.mesh_file())
}

#[test]
fn they_hold_for_pods_deployments_and_namespaces_without_a_push() -> Result<()> {
    let mut scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.change_mesh(|mesh| {
        let server = mesh.workload("server-a").unwrap();
        server
            .extra
            .insert("workloadName".to_owned(), "server".into());
    })?;
    wait_for_path(&scene, "direct")?;
    let file = annotations_file(&scene);
    let entry =
        |whom: &str, value: &str| format!("- {{{whom}, annotations: {{{DIRECT}: \"{value}\"}}}}\n");
    // The control plane is not asked: it is not even there.
    scene
        .control_plane()?
        .stop(nix::sys::signal::Signal::SIGKILL)?;
    let namespace = format!("namespaces:\n{}", entry("name: demo", "off"));
    let deployment = entry("namespace: demo, workloadName: server", "off");
    let pods =
        ["client", "server-a"].map(|name| entry(&format!("namespace: demo, name: {name}"), "on"));
    let deployment_on = entry("namespace: demo, workloadName: server", "on");
    for (text, path) in [
        (namespace.clone(), "hbone"),
        ("namespaces: []\n".to_owned(), "direct"),
        (format!("workloads:\n{deployment}"), "hbone"),
        // The pod's name counts before its deployment's, and that before its namespace's.
        (format!("workloads:\n{deployment}{}", pods[1]), "direct"),
        (format!("{namespace}workloads:\n{}", pods[0]), "hbone"),
        (
            format!("{namespace}workloads:\n{}{deployment_on}", pods[0]),
            "direct",
        ),
    ] {
        replace_file(&file, &text)?;
        wait_for_path(&scene, path)?;
    }
    Ok(())
}

#[test]
fn what_is_wrong_is_named_and_what_was_in_force_stays() -> Result<()> {
    let mut scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    scene.change_mesh(|mesh| {
        mesh.namespaces = vec![Namespace::annotated(NAMESPACE, DIRECT, "off")];
    })?;
    wait_for_path(&scene, "hbone")?;
    let agent = &scene.agent1;
    let said =
        |agent: &Agent| -> Result<String> { Ok(text(&status(agent)?, "annotations").into()) };
    let before = said(agent)?;
    assert!(
        before.starts_with("file, revision 2, of 1 namespaces and 0 workloads"),
        "{before}"
    );
    for (wrong, words) in WRONG {
        replace_file(&annotations_file(&scene), wrong)?;
        wait_until(SOON, words, || {
            Ok(said(agent)?.contains(words).then_some(()))
        })?;
        let now = said(agent)?;
        assert!(
            now.contains("revision 2") && now.contains("still in force"),
            "{now}"
        );
        assert!(
            status(agent)?["warnings"]
                .to_string()
                .contains("annotations file")
        );
        assert_eq!(agent.get(READINESS, "/healthz/ready")?.status, 200);
        assert_eq!(path(&scene)?, "hbone");
    }
    // Deployments and pods that come later have what was said of them before.
    scene.change_mesh(|mesh| mesh.namespaces.clear())?;
    wait_for_path(&scene, "direct")?;
    assert_eq!(
        status(&scene.agent1)?["warnings"]
            .to_string()
            .find("annotations"),
        None
    );
    Ok(())
}

/// An agent that starts with such an annotations file, or none, has no mesh, and says why; with a good one it is ready.
#[test]
fn an_agent_is_not_ready_before_its_annotations_are() -> Result<()> {
    let fabric = Fabric::new()?;
    let node = fabric.node()?;
    let pod = node.pod("pod")?;
    let mesh = Mesh {
        workloads: vec![Workload::of_pod(&pod, NAMESPACE, "pod")],
        ..Mesh::default()
    };
    let file = Agent::default_mesh_file(&node);
    mesh.write(&file)?;
    let annotations = Mesh::annotations_file(&file);
    std::fs::remove_file(&annotations)?;
    let _control_plane = ControlPlane::of_fabric(&node, &culvert_binary()?)?;
    let agent = node.start_agent(culvert_harness::AgentOptions::default())?;
    let not_ready = |words: &str| {
        wait_until(SOON, words, || {
            let Ok(answer) = agent.get(READINESS, "/healthz/ready") else {
                return Ok(None);
            };
            Ok((answer.status == 500 && answer.body.contains(words)).then_some(()))
        })
    };
    not_ready("cannot read the annotations file")?;
    for (wrong, words) in WRONG {
        replace_file(&annotations, wrong)?;
        not_ready(words)?;
        assert_eq!(status(&agent)?["workloads"], 0);
    }
    replace_file(&annotations, "workloads: []\n")?;
    agent.ready()?;
    wait_until(SOON, "the mesh", || {
        Ok((status(&agent)?["workloads"] == 1).then_some(()))
    })
}
