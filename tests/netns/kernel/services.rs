//! Services: `connect` chooses the endpoint, by weight, and only among those that the agent would choose from.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use culvert_abi::{ServiceKey, Slot, SlotKey};
use culvert_harness::{
    AccessLine, AgentOptions, Mesh, Namespace, Pod, PodOptions, Proc, Service, Workload, wait_until,
};
use culvert_tests::scene::{
    NAMESPACE, PORT, SOON, Scene, Setting, answered, connect_to, only, serve, text,
};
use serde_json::Value;

use crate::kernel_tables::{decisions, table};

const VIP: &str = "10.96.0.1";
const AT: &str = "10.96.0.1:80";

/// A server that says the pod's name.
fn greet(pod: &Pod) -> Result<Proc> {
    let server = pod
        .probe()?
        .args(["greet", "--port", &PORT.to_string(), "--name", pod.name()])
        .spawn()?;
    server.wait_for_line("listening", SOON)?;
    Ok(server)
}

/// Whom how many connections met.
type Met = BTreeMap<String, u64>;

fn met(report: &Value) -> Result<Met> {
    let met = report.get("met").context("what the probe reports")?;
    Ok(serde_json::from_value(met.clone())?)
}

fn meet(from: &Pod, to: &str, count: u32) -> Result<Met> {
    let report = from
        .probe()?
        .args(["meet", "--to", to, "--count", &count.to_string()])
        .run(SOON * 10)?
        .json()?;
    let met = met(&report)?;
    ensure!(
        met.values().sum::<u64>() == u64::from(count),
        "some failed: {report}"
    );
    Ok(met)
}

fn share(met: &Met, name: &str) -> f64 {
    let all: u64 = met.values().sum();
    met.get(name).copied().unwrap_or_default() as f64 / all as f64
}

fn service(vip: &str) -> Service {
    Service::new(NAMESPACE, "servers", vip).port(80, PORT)
}

/// Makes `name` an endpoint of the service, with a capacity.
fn serves(mesh: &mut Mesh, name: &str, service: &Service, capacity: u32) {
    if let Some(workload) = mesh.workload(name) {
        *workload = workload.clone().serves(service, 80, PORT);
        workload
            .extra
            .insert("capacity".to_owned(), capacity.into());
    }
}

fn does_not_serve(mesh: &mut Mesh, name: &str) {
    if let Some(workload) = mesh.workload(name) {
        workload.services.clear();
    }
}

/// The scene with one more pod on the first node, `server-c`, and a service in front of some of the servers.
struct Stage {
    scene: Scene,
    server_c: Pod,
}

impl Stage {
    fn new(endpoints: &[(&str, u32)]) -> Result<Self> {
        Self::with(Setting::default(), endpoints)
    }

    fn with(setting: Setting, endpoints: &[(&str, u32)]) -> Result<Self> {
        let mut scene = Scene::with(setting)?;
        let server_c = scene.node1.pod("server-c")?;
        scene.change_mesh(|mesh| {
            mesh.workloads
                .push(Workload::of_pod(&server_c, NAMESPACE, "server-c"));
            mesh.services.push(service(VIP));
            for (name, capacity) in endpoints {
                serves(mesh, name, &service(VIP), *capacity);
            }
        })?;
        scene
            .agent1
            .enrol_as(&server_c, scene.workload(&server_c)?)?;
        Ok(Self { scene, server_c })
    }

    /// Until every connection of the client to the service is resolved by the kernel part and, if `direct`, direct.
    fn settle(&self, direct: bool) -> Result<()> {
        let agent = &self.scene.agent1;
        let wanted = if direct { "direct" } else { "service_resolved" };
        wait_until(SOON, "the kernel part to choose", || {
            let before = decisions(agent, wanted)?;
            meet(&self.scene.client, AT, 20)?;
            Ok((decisions(agent, wanted)? >= before + 20).then_some(()))
        })
    }
}

/// The access line of the first connection of the client that ends after `act`.
fn line_of(
    scene: &Scene,
    fields: &[(&str, &str)],
    act: impl FnOnce() -> Result<()>,
) -> Result<AccessLine> {
    let mark = scene.agent1.log().mark();
    act()?;
    let mut wanted = vec![("direction", "outbound"), ("src.workload", "client")];
    wanted.extend(fields);
    scene.agent1.wait_for_access(mark, &wanted, SOON)
}

#[test]
fn a_connection_to_a_service_is_direct_and_shows_the_address_it_was_opened_to() -> Result<()> {
    let stage = Stage::new(&[("server-a", 1)])?;
    let scene = &stage.scene;
    {
        let _server = greet(&scene.server_a)?;
        stage.settle(true)?;
    }
    let server = serve(&scene.server_a, "echo")?;
    let mut report = Value::Null;
    let line = line_of(scene, &[("path", "direct"), ("bytes_sent", "5")], || {
        report = connect_to(&scene.client, AT, &["--send", "hello", "--read", "5"])?;
        Ok(())
    })?;
    assert!(answered(&report), "{report}");
    assert_eq!(text(&report, "peer"), AT, "{report}");
    let host = service(VIP).hostname;
    assert_eq!(line.field("dst.service"), Some(host), "{line:?}");
    assert_eq!(line.field("dst.workload"), Some("server-a".into()));
    assert_eq!(line.field("not_direct"), None, "{line:?}");
    let accepted = server.wait_for_event("accepted", SOON)?;
    assert_eq!(text(&accepted, "peer"), text(&report, "local"));
    assert_eq!(text(&accepted, "local"), scene.server_a.at(PORT));
    Ok(())
}

#[test]
fn a_connection_to_an_ipv6_service_is_direct_too() -> Result<()> {
    let vip = "fd96::1";
    let setting = Setting {
        ipv6: true,
        ..Setting::default()
    };
    let mut stage = Stage::with(setting, &[])?;
    stage.scene.change_mesh(|mesh| {
        mesh.services[0].vips.push(format!("/{vip}"));
        serves(mesh, "server-a", &service(VIP), 1);
    })?;
    let scene = &stage.scene;
    let server = scene.server_a.probe()?.args([
        "greet", "--port", "7000", "--bind", "::", "--name", "server-a",
    ]);
    let server = server.spawn()?;
    server.wait_for_line("listening", SOON)?;
    stage.settle(true)?;
    let to = format!("[{vip}]:80");
    let mut report = Value::Null;
    wait_until(SOON, "a direct connection", || {
        let before = decisions(&scene.agent1, "direct")?;
        report = connect_to(&scene.client, &to, &["--read", "9"])?;
        Ok((decisions(&scene.agent1, "direct")? > before).then_some(()))
    })?;
    assert_eq!(text(&report, "data"), "server-a\n", "{report}");
    assert_eq!(text(&report, "peer"), to, "{report}");
    Ok(())
}

#[test]
fn shares_are_the_weights_over_100000_connections() -> Result<()> {
    let stage = Stage::new(&[("server-a", 1), ("server-c", 3)])?;
    let scene = &stage.scene;
    let _servers = (greet(&scene.server_a)?, greet(&stage.server_c)?);
    stage.settle(true)?;
    let before = decisions(&scene.agent1, "service_resolved")?;
    let met = meet(&scene.client, AT, 100_000)?;
    let resolved = decisions(&scene.agent1, "service_resolved")? - before;
    println!("{met:?}");
    assert_eq!(resolved, 100_000, "every one was chosen in the kernel");
    let share = share(&met, "server-c");
    // 11 standard deviations.
    assert!((share - 0.75).abs() <= 0.75 * 0.02, "{share}");
    Ok(())
}

#[test]
fn endpoints_of_two_nodes_keep_their_shares() -> Result<()> {
    let stage = Stage::new(&[("server-a", 1), ("server-b", 3)])?;
    let scene = &stage.scene;
    let _servers = (greet(&scene.server_a)?, greet(scene.server_b()?)?);
    stage.settle(false)?;
    let before = decisions(&scene.agent1, "service_resolved")?;
    let met = meet(&scene.client, AT, 4000)?;
    assert_eq!(
        decisions(&scene.agent1, "service_resolved")? - before,
        4000,
        "the agent continues what the kernel part has chosen"
    );
    let share = share(&met, "server-b");
    // Eight standard deviations.
    assert!((share - 0.75).abs() < 0.055, "{met:?}");
    let fields = [("path", "hbone"), ("dst.workload", "server-b")];
    let line = line_of(scene, &fields, || meet(&scene.client, AT, 50).map(drop))?;
    assert_eq!(
        line.field("not_direct"),
        Some("steered_remote".into()),
        "{line:?}"
    );
    assert_eq!(line.field("dst.service"), Some(service(VIP).hostname));
    Ok(())
}

#[test]
fn an_unhealthy_endpoint_gets_nothing() -> Result<()> {
    let mut stage = Stage::new(&[("server-a", 1), ("server-c", 1)])?;
    let _servers = (greet(&stage.scene.server_a)?, greet(&stage.server_c)?);
    stage.settle(true)?;
    let set = |stage: &mut Stage, status: &str| {
        stage.scene.change_mesh(|mesh| {
            let server = mesh.workload("server-c").unwrap();
            server.extra.insert("status".to_owned(), status.into());
        })
    };
    set(&mut stage, "Unhealthy")?;
    let client = stage.scene.client.clone();
    wait_until(SOON, "the change to be in force", || {
        Ok((!meet(&client, AT, 50)?.contains_key("server-c")).then_some(()))
    })?;
    let met = meet(&client, AT, 2000)?;
    assert!(!met.contains_key("server-c"), "{met:?}");
    set(&mut stage, "Healthy")?;
    wait_until(SOON, "the change to be in force", || {
        Ok(meet(&client, AT, 50)?
            .contains_key("server-c")
            .then_some(()))
    })
}

#[test]
fn what_the_kernel_part_cannot_express_is_the_agents() -> Result<()> {
    let mut stage = Stage::new(&[])?;
    stage.scene.change_mesh(|mesh| {
        let named = |name: &str, vip: &str| Service::new(NAMESPACE, name, vip).port(80, PORT);
        let mut waypoint = named("behind", "10.96.0.2");
        let destination = format!("{NAMESPACE}/none");
        waypoint.extra.insert(
            "waypoint".to_owned(),
            serde_json::json!({"destination": destination}),
        );
        let mut as_it_is = named("as-it-is", "10.96.0.3");
        as_it_is.extra.insert(
            "loadBalancer".to_owned(),
            serde_json::json!({"mode": "Passthrough"}),
        );
        let shared = named("shared", "10.96.0.4");
        let sharing = Service::new("another", "shared", "10.96.0.4").port(80, PORT);
        let mut range = named("range", "10.96.0.5");
        range.vips = vec!["/10.97.0.0/16".to_owned()];
        let all = [waypoint, as_it_is, shared, sharing, range];
        for service in &all {
            serves(mesh, "server-a", service, 1);
        }
        // What is in the kernel shows that the change has reached it.
        serves(mesh, "server-a", &service(VIP), 1);
        mesh.services.extend(all);
    })?;
    let scene = &stage.scene;
    let _server = greet(&scene.server_a)?;
    stage.settle(true)?;
    let before = decisions(&scene.agent1, "service_resolved")?;
    for (vip, reached) in [
        ("10.96.0.2", false),
        ("10.96.0.3", false),
        ("10.96.0.4", true),
        ("10.97.1.2", true),
    ] {
        let report = connect_to(&scene.client, &format!("{vip}:80"), &["--read", "9"])?;
        assert_eq!(
            text(&report, "data") == "server-a\n",
            reached,
            "{vip}: {report}"
        );
    }
    // A port that the service does not have.
    connect_to(&scene.client, &format!("{VIP}:81"), &["--read", "9"])?;
    assert_eq!(decisions(&scene.agent1, "service_resolved")?, before);
    Ok(())
}

#[test]
fn a_service_is_no_way_around_policy() -> Result<()> {
    let stage = Stage::new(&[("server-a", 1)])?;
    let scene = &stage.scene;
    let server = serve(&scene.server_a, "echo")?;
    let hello = ["--send", "hello", "--read", "5"];
    let mark = scene.agent1.log().mark();
    for _ in 0..5 {
        let report = connect_to(&scene.intruder, AT, &hello)?;
        assert!(!answered(&report), "{report}");
    }
    let report = connect_to(&scene.intruder, AT, &hello)?;
    assert_eq!(
        text(&report, "connect"),
        "ECONNREFUSED",
        "refused by the kernel part: {report}"
    );
    let line = scene.agent1.wait_for_access(
        mark,
        &[
            ("src.workload", "intruder"),
            ("dst.service", &service(VIP).hostname),
            ("error", "policy denies (known verdict)"),
        ],
        SOON,
    )?;
    assert_eq!(line.field("dst.workload"), Some("server-a".into()));
    assert!(server.events("accepted").is_empty());
    Ok(())
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() -> Result<()> {
    let policies = Some(vec![only("server-a")]);
    let setting = Setting {
        policies,
        ..Setting::default()
    };
    let stage = Stage::with(setting, &[("server-a", 1)])?;
    let pod = &stage.scene.server_a;
    let _server = greet(pod)?;
    for _ in 0..3 {
        assert_eq!(share(&meet(pod, AT, 20)?, "server-a"), 1.0);
    }
    Ok(())
}

/// Connections to a service while one of its endpoints goes, a stranger gets its address, and it comes back.
#[test]
fn endpoints_come_and_go_under_load_without_a_wrong_destination() -> Result<()> {
    let mut stage = Stage::new(&[("server-a", 1), ("server-c", 1)])?;
    let _server = greet(&stage.scene.server_a)?;
    let mut server = greet(&stage.server_c)?;
    stage.settle(true)?;
    let load = load(&stage.scene.client, AT)?;
    for round in 0..6 {
        // Gone from the mesh first, or dead first.
        if round % 2 == 0 {
            stage
                .scene
                .change_mesh(|mesh| does_not_serve(mesh, "server-c"))?;
        }
        drop(server);
        let stranger = replace(&mut stage.scene, &stage.server_c, "stranger", None)?;
        let _stranger = greet(&stranger)?;
        meet(&stage.scene.client, &stranger.at(PORT), 20)?;
        stage.server_c = replace(&mut stage.scene, &stranger, "server-c", Some(1))?;
        server = greet(&stage.server_c)?;
        meet(&stage.scene.client, &stage.server_c.at(PORT), 20)?;
    }
    stage.settle(true)?;
    let met = end(&load)?;
    let names: Vec<_> = met.keys().map(String::as_str).collect();
    assert_eq!(names, ["server-a", "server-c"]);
    Ok(())
}

#[test]
fn services_come_and_go_under_load_without_a_wrong_destination() -> Result<()> {
    let mut stage = Stage::new(&[("server-a", 1)])?;
    let _servers = (greet(&stage.scene.server_a)?, greet(&stage.server_c)?);
    stage.settle(true)?;
    let change = |stage: &mut Stage, round: u32| {
        stage.scene.change_mesh(|mesh| {
            // Another capacity is another table, and each time the other address is another service's.
            serves(mesh, "server-a", &service(VIP), round);
            mesh.services.truncate(1);
            does_not_serve(mesh, "server-c");
            let name = format!("others-{round}");
            let other = Service::new(NAMESPACE, &name, "10.96.0.2").port(80, PORT);
            serves(mesh, "server-c", &other, round);
            mesh.services.push(other);
        })
    };
    change(&mut stage, 1)?;
    let loads = [
        load(&stage.scene.client, AT)?,
        load(&stage.scene.client, "10.96.0.2:80")?,
    ];
    for round in 2..=40 {
        change(&mut stage, round)?;
    }
    let met = [end(&loads[0])?, end(&loads[1])?];
    assert_eq!(met[0].keys().collect::<Vec<_>>(), ["server-a"]);
    assert_eq!(met[1].keys().collect::<Vec<_>>(), ["server-c"]);
    Ok(())
}

/// Connections one after the other, until [`end`].
fn load(from: &Pod, to: &str) -> Result<Proc> {
    let load = from.probe()?.args(["meet", "--to", to, "--threads", "2"]);
    load.stdin().spawn()
}

fn end(load: &Proc) -> Result<Met> {
    load.close_stdin();
    load.wait(SOON * 4)?;
    let report = load
        .log()
        .lines()
        .into_iter()
        .find_map(|line| serde_json::from_str::<Value>(&line.text).ok())
        .context("the report of the load")?;
    println!("{report}");
    met(&report)
}

/// Another pod gets the address of one that leaves; with a capacity it is an endpoint of the service.
fn replace(scene: &mut Scene, old: &Pod, name: &str, capacity: Option<u32>) -> Result<Pod> {
    let uid = Workload::uid_of(old);
    scene.agent1.unenrol(&uid)?;
    let std::net::IpAddr::V4(address) = old.address() else {
        anyhow::bail!("an IPv4 address")
    };
    old.remove()?;
    let options = PodOptions {
        address: Some(address),
        ..PodOptions::default()
    };
    let new = scene.node1.pod_with(name, options)?;
    let old = old.name().to_owned();
    scene.change_mesh(|mesh| {
        mesh.workloads.retain(|workload| workload.name != old);
        mesh.workloads.push(Workload::of_pod(&new, NAMESPACE, name));
        if let Some(capacity) = capacity {
            serves(mesh, name, &service(VIP), capacity);
        }
    })?;
    scene.agent1.enrol_as(&new, scene.workload(&new)?)?;
    Ok(new)
}

/// The kernel part's table of services lags behind for good, and the only endpoint's address is a stranger's by now.
fn reach_a_replaced_endpoint(knobs: &'static str) -> Result<Met> {
    let setting = Setting {
        knobs,
        ..Setting::default()
    };
    let mut stage = Stage::with(setting, &[("server-a", 1)])?;
    {
        let _server = greet(&stage.scene.server_a)?;
        stage.settle(true)?;
    }
    let old = stage.scene.server_a.clone();
    let stranger = replace(&mut stage.scene, &old, "stranger", None)?;
    stage
        .scene
        .change_mesh(|mesh| serves(mesh, "server-c", &service(VIP), 1))?;
    let _servers = (greet(&stranger)?, greet(&stage.server_c)?);
    meet(&stage.scene.client, &stranger.at(PORT), 20)?;
    meet(&stage.scene.client, AT, 100)
}

#[test]
fn an_endpoint_whose_address_is_a_strangers_is_not_reached() -> Result<()> {
    let met = reach_a_replaced_endpoint("skip-service-sync")?;
    assert_eq!(share(&met, "server-c"), 1.0, "{met:?}");
    Ok(())
}

#[test]
fn twin_without_the_slot_check_the_stranger_is_reached() -> Result<()> {
    let met = reach_a_replaced_endpoint("skip-service-sync,skip-slot-check")?;
    assert!(share(&met, "stranger") > 0.5, "{met:?}");
    Ok(())
}

#[test]
fn a_new_agent_tells_the_kernel_part_anew() -> Result<()> {
    let mut stage = Stage::new(&[("server-a", 1), ("server-c", 1)])?;
    let _servers = (greet(&stage.scene.server_a)?, greet(&stage.server_c)?);
    stage.settle(true)?;
    stage.scene.agent1.kill()?;
    // Meanwhile the kernel part goes on with what it knows.
    let met = meet(&stage.scene.client, AT, 100)?;
    assert_eq!(met.len(), 2, "{met:?}");
    stage
        .scene
        .mesh
        .workload("server-c")
        .unwrap()
        .services
        .clear();
    let file = stage.scene.mesh_file();
    stage.scene.mesh.write(&file)?;
    stage.scene.agent1 = stage.scene.node1.start_agent(AgentOptions::default())?;
    stage.scene.agent1.ready()?;
    stage.settle(true)?;
    let met = meet(&stage.scene.client, AT, 500)?;
    assert_eq!(share(&met, "server-a"), 1.0, "{met:?}");
    Ok(())
}

/// A service comes while a table of the kernel part is full, and changes when there is room again.
fn find_a_table_full<K: aya::Pod, V: aya::Pod>(
    name: &str,
    key: impl Fn(u32) -> K,
    value: V,
) -> Result<()> {
    let mut stage = Stage::new(&[])?;
    let _servers = (greet(&stage.scene.server_a)?, greet(&stage.server_c)?);
    let mut map = table::<K, V>(&stage.scene.node1, name)?;
    let filled = (0..)
        .take_while(|number| map.insert(key(*number), value, 0).is_ok())
        .count();
    assert!(filled > 1000, "{filled}");
    let serve = |stage: &mut Stage, capacity| {
        stage.scene.change_mesh(|mesh| {
            serves(mesh, "server-a", &service(VIP), capacity);
            serves(mesh, "server-c", &service(VIP), 1);
        })
    };
    serve(&mut stage, 1)?;
    stage
        .scene
        .agent1
        .process()
        .wait_for_line("has no room for the endpoints", SOON)?;
    let before = decisions(&stage.scene.agent1, "service_resolved")?;
    let met = meet(&stage.scene.client, AT, 100)?;
    assert_eq!(met.len(), 2, "the agent chooses: {met:?}");
    assert_eq!(
        decisions(&stage.scene.agent1, "service_resolved")?,
        before,
        "nothing is half-written"
    );
    for number in 0..10 {
        map.remove(&key(number))?;
    }
    serve(&mut stage, 2)?;
    stage.settle(true)
}

#[test]
fn a_service_that_finds_no_room_for_its_slots_is_the_agents() -> Result<()> {
    let slot = Slot {
        address: [0; 16],
        workload: 0,
        threshold: 0,
        alias: 0,
        port: 0,
        padding: 0,
    };
    let key = |slot| SlotKey {
        table: 0,
        slot,
        padding: 0,
    };
    find_a_table_full("SLOTS", key, slot)
}

#[test]
fn a_service_that_finds_no_room_for_itself_is_the_agents() -> Result<()> {
    let service = culvert_abi::Service {
        table: 0,
        slots: 0,
        number: 0,
    };
    let key = |view| ServiceKey {
        address: [0; 16],
        view,
        port: 0,
        padding: 0,
    };
    find_a_table_full("SERVICES", key, service)
}

const DIRECT: &str = "culvert.dev/direct";

/// How the client's connections to `server-a` go: path, and why not direct.
fn way(scene: &Scene) -> Result<(String, Option<String>)> {
    let to = scene.server_a.at(PORT);
    let line = line_of(scene, &[("dst.workload", "server-a")], || {
        connect_to(&scene.client, &to, &["--read", "9"]).map(drop)
    })?;
    Ok((
        line.field("path").unwrap_or_default(),
        line.field("not_direct"),
    ))
}

fn wait_for_way(scene: &Scene, path: &str, reason: Option<&str>) -> Result<()> {
    wait_until(
        SOON,
        &format!("connections to go {path}, {reason:?}"),
        || {
            let (found, why) = way(scene)?;
            Ok((found == path && why.as_deref() == reason).then_some(()))
        },
    )?;
    // And to stay so.
    for _ in 0..3 {
        let (found, why) = way(scene)?;
        assert_eq!((found.as_str(), why.as_deref()), (path, reason));
    }
    Ok(())
}

#[test]
fn direct_off_for_a_pod_or_a_namespace_sends_its_traffic_through_a_tunnel() -> Result<()> {
    let mut scene = Scene::new()?;
    let _server = greet(&scene.server_a)?;
    let not_eligible = Some("steered_not_eligible");
    wait_for_way(&scene, "direct", None)?;
    let annotate = |scene: &mut Scene, name: &str, value: Option<&str>| {
        scene.change_mesh(|mesh| {
            let annotations = &mut mesh.workload(name).unwrap().annotations;
            annotations.clear();
            annotations.extend(value.map(|value| (DIRECT.to_owned(), value.to_owned())));
        })
    };
    for pod in ["client", "server-a"] {
        annotate(&mut scene, pod, Some("off"))?;
        wait_for_way(&scene, "hbone", not_eligible)?;
        annotate(&mut scene, pod, None)?;
        wait_for_way(&scene, "direct", None)?;
    }
    scene.change_mesh(|mesh| {
        mesh.namespaces = vec![Namespace::annotated(NAMESPACE, DIRECT, "off")];
    })?;
    wait_for_way(&scene, "hbone", not_eligible)?;
    // The pods' own word counts first.
    annotate(&mut scene, "client", Some("on"))?;
    wait_for_way(&scene, "hbone", not_eligible)?;
    annotate(&mut scene, "server-a", Some("on"))?;
    wait_for_way(&scene, "direct", None)
}

#[test]
fn an_annotation_of_ours_that_is_misspelt_leaves_the_mesh_as_it_was() -> Result<()> {
    let mut scene = Scene::of_a_file()?;
    scene.change_mesh(|mesh| {
        let client = mesh.workload("client").unwrap();
        client.annotations = [("culvert.dev/dirct".to_owned(), "off".to_owned())].into();
    })?;
    let status = culvert_tests::scene::mesh_status(&scene.agent1)?;
    assert!(status.contains("culvert.dev/dirct"), "{status}");
    Ok(())
}
