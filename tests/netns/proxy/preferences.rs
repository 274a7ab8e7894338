//! Which endpoint of a service is taken, and which service where several have one address: told by who answers.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use culvert_harness::{Mesh, Namespace, Pod, Proc, Service, Workload};
use culvert_tests::scene::{NAMESPACE, PORT, SOON, Scene, Setting, connect_to, text};
use serde_json::{Value, json};

use super::access::wait_for_failure;

const VIP: &str = "10.96.0.1";
const AT: &str = "10.96.0.1:80";
const COUNT: u64 = 12;
/// How the near endpoint is reached: what the kernel part chooses is direct, and the agent carries all if that is off.
const WAYS: [(&str, &str); 2] = [("on", "direct"), ("off", "hbone")];

/// A server that says the pod's name.
fn greet(pod: &Pod) -> Result<Proc> {
    let server = pod
        .probe()?
        .args(["greet", "--port", &PORT.to_string(), "--name", pod.name()])
        .spawn()?;
    server.wait_for_line("listening", SOON)?;
    Ok(server)
}

/// Who answers. One of them, whoever asks how often.
fn who_answers(from: &Pod) -> Result<String> {
    let report = from
        .probe()?
        .args(["meet", "--to", AT, "--count", &COUNT.to_string()])
        .run(SOON * 2)?
        .json()?;
    let met = report.get("met").context("what the probe reports")?;
    let met: BTreeMap<String, u64> = serde_json::from_value(met.clone())?;
    let mut names = met.into_iter();
    match (names.next(), names.next()) {
        (Some((name, COUNT)), None) => Ok(name),
        _ => anyhow::bail!("not one of them, each time: {report}"),
    }
}

/// `server-a`, `server-b` and `server-c`, on the client's node, the other and the other, behind one address with these rules.
struct Stage {
    scene: Scene,
    _server_c: Pod,
    _servers: [Proc; 3],
}

impl Stage {
    fn new(rules: &Value) -> Result<Self> {
        let (mut scene, server_c) = scene_of_three()?;
        scene.change_mesh(|mesh| {
            let mut service = Service::new(NAMESPACE, "servers", VIP).port(80, PORT);
            let rules = rules.clone();
            service.extra.insert("loadBalancer".to_owned(), rules);
            for name in ["server-a", "server-b", "server-c"] {
                serves(mesh, name, &service);
            }
            mesh.services.push(service);
        })?;
        let servers = [&scene.server_a, scene.server_b()?, &server_c].map(greet);
        let [a, b, c] = servers;
        Ok(Self {
            _servers: [a?, b?, c?],
            scene,
            _server_c: server_c,
        })
    }

    fn set_direct(&mut self, value: &str) -> Result<()> {
        self.scene.change_mesh(|mesh| {
            let annotated = Namespace::annotated(NAMESPACE, "culvert.dev/direct", value);
            mesh.namespaces = vec![annotated];
        })
    }

    /// Only these are healthy.
    fn healthy(&mut self, names: &[&str]) -> Result<()> {
        self.scene.change_mesh(|mesh| {
            for name in ["server-a", "server-b", "server-c"] {
                let status = match names.contains(&name) {
                    true => "Healthy",
                    false => "Unhealthy",
                };
                let workload = mesh.workload(name).expect("in the mesh");
                workload.extra.insert("status".to_owned(), status.into());
            }
        })
    }

    /// `name` answers each time, by this way at least once it is known which one that is.
    fn answers(&self, name: &str, path: &str) -> Result<()> {
        let agent = &self.scene.agent1;
        let mark = agent.log().mark();
        let answered = who_answers(&self.scene.client)?;
        ensure!(answered == name, "{answered} in place of {name}");
        let fields = [
            ("path", path),
            ("src.workload", "client"),
            ("dst.workload", name),
        ];
        agent.wait_for_access(mark, &fields, SOON).map(drop)
    }

    fn is_refused(&self) -> Result<()> {
        let agent = &self.scene.agent1;
        let mark = agent.log().mark();
        let report = connect_to(&self.scene.client, AT, &["--read-all"])?;
        ensure!(!text(&report, "data").starts_with("server"), "{report}");
        let fields = [("src.workload", "client")];
        wait_for_failure(agent, mark, "no healthy endpoint", &fields).map(drop)
    }
}

/// With `server-c` on the second node, and nobody forbidden anything.
fn scene_of_three() -> Result<(Scene, Pod)> {
    let mut scene = Scene::with(Setting {
        policies: Some(Vec::new()),
        ..Setting::default()
    })?;
    let server_c = scene.node2.pod("server-c")?;
    let workload = Workload::of_pod(&server_c, NAMESPACE, "server-c");
    scene.change_mesh(|mesh| mesh.workloads.push(workload.clone()))?;
    scene.agent2()?.enrol_as(&server_c, &workload)?;
    Ok((scene, server_c))
}

fn serves(mesh: &mut Mesh, name: &str, service: &Service) {
    let workload = mesh.workload(name).expect("in the mesh");
    *workload = workload.clone().serves(service, 80, PORT);
}

#[test]
fn with_failover_the_near_endpoint_is_used_and_a_far_one_when_that_is_not_healthy() -> Result<()> {
    let rules = json!({"mode": "Failover", "routingPreferences": ["NODE"]});
    let mut stage = Stage::new(&rules)?;
    for (direct, path) in WAYS {
        stage.set_direct(direct)?;
        stage.answers("server-a", path)?;
        stage.healthy(&["server-b"])?;
        stage.answers("server-b", "hbone")?;
        stage.healthy(&["server-a", "server-b", "server-c"])?;
        stage.answers("server-a", path)?;
    }
    Ok(())
}

#[test]
fn in_strict_mode_only_the_near_endpoint_is_used() -> Result<()> {
    let rules = json!({"mode": "Strict", "routingPreferences": ["NODE"]});
    let mut stage = Stage::new(&rules)?;
    for (direct, path) in WAYS {
        stage.set_direct(direct)?;
        stage.answers("server-a", path)?;
        stage.healthy(&["server-b", "server-c"])?;
        stage.is_refused()?;
        stage.healthy(&["server-a", "server-b", "server-c"])?;
        stage.answers("server-a", path)?;
    }
    Ok(())
}

#[test]
fn the_nearest_zone_comes_first_then_the_region_then_the_rest() -> Result<()> {
    let rules = json!({"mode": "Failover", "routingPreferences": ["REGION", "ZONE"]});
    let mut stage = Stage::new(&rules)?;
    stage.scene.change_mesh(|mesh| {
        for (name, region, zone) in [
            ("client", "north", "one"),
            // A zone of another region is another zone.
            ("server-a", "south", "one"),
            ("server-b", "north", "two"),
            ("server-c", "north", "one"),
        ] {
            let workload = mesh.workload(name).expect("in the mesh");
            let locality = json!({"region": region, "zone": zone});
            workload.extra.insert("locality".to_owned(), locality);
        }
    })?;
    for (direct, path) in WAYS {
        stage.set_direct(direct)?;
        for (healthy, name, path) in [
            (
                &["server-a", "server-b", "server-c"][..],
                "server-c",
                "hbone",
            ),
            (&["server-a", "server-b"], "server-b", "hbone"),
            (&["server-a"], "server-a", path),
        ] {
            stage.healthy(healthy)?;
            stage.answers(name, path)?;
        }
    }
    Ok(())
}

#[test]
fn of_services_with_one_address_each_client_reaches_its_namespaces_own_then_the_canonical_one()
-> Result<()> {
    let (mut scene, server_c) = scene_of_three()?;
    let _servers = [&scene.server_a, scene.server_b()?, &server_c]
        .map(greet)
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let of = |namespace: &str| Service::new(namespace, "servers", VIP).port(80, PORT);
    let canonical = |canonical: bool| {
        let mut service = of("middle");
        let said = Value::from(canonical);
        service.extra.insert("canonical".to_owned(), said);
        service
    };
    let guests = [("guest", "aside"), ("stranger", "nowhere")];
    let mut pods = Vec::new();
    for (name, namespace) in guests {
        let pod = scene.node1.pod(name)?;
        let workload = Workload::of_pod(&pod, namespace, name);
        scene.mesh.workloads.push(workload.clone());
        pods.push((pod, workload));
    }
    scene.change_mesh(|mesh| {
        for (name, service) in [
            ("server-a", of(NAMESPACE)),
            ("server-b", canonical(true)),
            ("server-c", of("aside")),
        ] {
            serves(mesh, name, &service);
            mesh.services.push(service);
        }
    })?;
    for (pod, workload) in &pods {
        scene.agent1.enrol_as(pod, workload)?;
    }
    let answers = |scene: &Scene| -> Result<[String; 3]> {
        let [(guest, _), (stranger, _)] = &pods[..] else {
            anyhow::bail!("two guests");
        };
        Ok([
            who_answers(&scene.client)?,
            who_answers(guest)?,
            who_answers(stranger)?,
        ])
    };
    assert_eq!(answers(&scene)?, ["server-a", "server-c", "server-b"]);
    // The first by name, where none is canonical.
    scene.change_mesh(|mesh| mesh.services[1] = canonical(false))?;
    assert_eq!(answers(&scene)?, ["server-a", "server-c", "server-c"]);
    scene.change_mesh(|mesh| {
        mesh.services[1] = canonical(true);
        mesh.services.remove(0);
    })?;
    assert_eq!(answers(&scene)?, ["server-b", "server-c", "server-b"]);
    // One that is left has the address alone.
    scene.change_mesh(|mesh| drop(mesh.services.pop()))?;
    assert_eq!(answers(&scene)?, ["server-b", "server-b", "server-b"]);
    Ok(())
}
