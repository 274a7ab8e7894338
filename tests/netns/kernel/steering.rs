//! Steering holds whatever device a socket is bound to, before it connects or after.

use anyhow::Result;
use culvert_harness::{Launch, Pod, probe_binary};
use culvert_tests::scene::{PORT, SOON, Scene, answered, connect, connect_to, serve, text};
use serde_json::Value;

use crate::kernel_tables::decisions;

const MARKER: &str = "culvert-device-marker";

/// Says the marker to the pod of the other node; tells whether it passed between the nodes in clear.
fn say(scene: &Scene, probe: Launch, more: [&str; 2]) -> Result<(Value, bool)> {
    let capture = scene.fabric.capture()?;
    let (to, length) = (scene.server_b()?.at(PORT), MARKER.len().to_string());
    let words = ["connect", "--to", &to, "--send", MARKER, "--read", &length];
    let probe = probe.args(words).args(["--timeout-ms", "1500"]).args(more);
    let report = probe.run(SOON)?.json()?;
    Ok((report, capture.contains(MARKER.as_bytes())?))
}

fn bound_to(scene: &Scene, device: &str) -> Result<(Value, bool)> {
    let _server = serve(scene.server_b()?, "echo")?;
    say(scene, scene.client.probe()?, ["--device", device])
}

#[test]
fn a_socket_bound_to_the_pod_s_device_goes_through_the_tunnel() -> Result<()> {
    let scene = Scene::new()?;
    let mark = scene.agent1.log().mark();
    let (report, leaked) = bound_to(&scene, "eth0")?;
    assert!(!leaked, "{report}");
    assert_eq!(text(&report, "data"), MARKER, "{report}");
    let fields = [("path", "hbone"), ("dst.workload", "server-b")];
    scene.agent1.wait_for_access(mark, &fields, SOON)?;
    // The device is not in the way of the direct path either.
    let _server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    let bound = ["--device", "eth0", "--send", "hello", "--read", "5"];
    let report = connect(&scene.client, &scene.server_a, &bound)?;
    assert!(answered(&report), "{report}");
    assert_eq!(decisions(&scene.agent1, "direct")?, 1);
    assert_eq!(decisions(&scene.agent1, "refused_bound_device")?, 0);
    Ok(())
}

#[test]
fn twin_without_steering_a_socket_bound_to_a_device_leaves_in_plaintext() -> Result<()> {
    let scene = Scene::without("skip-steering,skip-policy")?;
    let (report, leaked) = bound_to(&scene, "eth0")?;
    assert!(leaked, "{report}");
    Ok(())
}

/// A second way out of the pod: a device of its own on the node's bridge.
fn second_device(pod: &Pod) -> Result<()> {
    pod.add_device("eth1", "10.77.1.200".parse()?)
}

#[test]
fn a_socket_bound_to_another_device_is_refused() -> Result<()> {
    let scene = Scene::without("skip-policy")?;
    second_device(&scene.client)?;
    let (report, leaked) = bound_to(&scene, "eth1")?;
    assert_eq!(text(&report, "connect"), "ECONNREFUSED", "{report}");
    assert!(!leaked, "{report}");
    assert_eq!(decisions(&scene.agent1, "refused_bound_device")?, 1);
    Ok(())
}

#[test]
fn twin_without_steering_another_device_leads_out_in_plaintext() -> Result<()> {
    let scene = Scene::without("skip-steering,skip-policy")?;
    second_device(&scene.client)?;
    let (report, leaked) = bound_to(&scene, "eth1")?;
    assert!(leaked, "{report}");
    Ok(())
}

/// A client that had a second device when it was enrolled.
fn with_two_devices() -> Result<Scene> {
    let scene = Scene::without("skip-policy")?;
    second_device(&scene.client)?;
    let workload = scene.workload(&scene.client)?;
    scene.agent1.unenrol(&workload.uid)?;
    scene.agent1.enrol_as(&scene.client, workload)?;
    Ok(scene)
}

/// A process without any privilege binds its steered, established connection to a device, and then sends.
fn rebound_to(scene: &Scene, device: &str) -> Result<(Value, bool)> {
    let _server = serve(scene.server_b()?, "echo")?;
    let nobody = [
        "--reuid=65534",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
        "--no-new-privs",
    ];
    let probe = scene.client.command("setpriv").args(nobody);
    let (report, leaked) = say(scene, probe.arg(probe_binary()?), ["--rebind", device])?;
    assert_eq!(text(&report, "rebind"), "ok", "{report}");
    Ok((report, leaked))
}

#[test]
fn an_open_connection_that_is_bound_to_a_device_stays_in_the_tunnel() -> Result<()> {
    let scene = with_two_devices()?;
    for device in ["eth0", "eth1", "lo"] {
        let (report, leaked) = rebound_to(&scene, device)?;
        assert!(!leaked, "{device}: {report}");
        let said = text(&report, "data");
        assert!(
            said == MARKER || text(&report, "read") != "ok",
            "{device}: {report}"
        );
    }
    Ok(())
}

#[test]
fn twin_without_the_device_s_route_an_open_connection_leaves_in_plaintext() -> Result<()> {
    let scene = with_two_devices()?;
    let route = "route del local default dev eth1 table 15001";
    let ip = scene.client.command("ip").args(route.split(' '));
    ip.run(SOON)?.success()?;
    let (report, leaked) = rebound_to(&scene, "eth1")?;
    assert!(leaked, "{report}");
    Ok(())
}

#[test]
fn steering_survives_that_the_device_goes_down_and_up() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(scene.server_b()?, "echo")?;
    for state in ["down", "up"] {
        let ip = scene.client.command("ip");
        ip.args(["link", "set", "eth0", state])
            .run(SOON)?
            .success()?;
    }
    let capture = scene.fabric.capture()?;
    let send = ["--send", MARKER, "--read", "5"];
    // The way to the other node may need a moment; the way to the agent does not.
    let report = connect_to(&scene.client, &scene.server_b()?.at(PORT), &send)?;
    assert!(!capture.contains(MARKER.as_bytes())?, "{report}");
    assert_eq!(text(&report, "connect"), "ok", "{report}");
    Ok(())
}
