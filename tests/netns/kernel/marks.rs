//! A pod that may set packet marks or send what it likes: no mark is a way around the mesh, and crafted packets are judged as
//! somebody's without an identity.

use anyhow::Result;
use culvert_tests::scene::{PORT, SOON, Scene, answered, connect, connect_to, echo, serve, text};
use serde_json::Value;

use crate::kernel_tables::decisions;

const MARKER: &str = "culvert-mark-marker";
/// Steering's, that of the agent's transparent sockets, both in other bits, and any.
const MARKS: [&str; 5] = ["0x53b", "0x539", "0x1053b", "0xfff", "7"];

fn number(mark: &str) -> String {
    let hex = mark.strip_prefix("0x");
    hex.map_or_else(
        || mark.to_owned(),
        |hex| u32::from_str_radix(hex, 16).unwrap().to_string(),
    )
}

#[test]
fn no_mark_leads_to_a_server_that_policy_denies() -> Result<()> {
    let scene = Scene::new()?;
    let servers = [
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    ];
    for server in [&scene.server_a, scene.server_b()?] {
        for mark in MARKS.map(number) {
            for when in ["--mark", "--remark"] {
                let words = [when, &mark, "--send", "hello", "--read", "5"];
                let more = ["--timeout-ms", "700"];
                let report = connect(&scene.intruder, server, &[&words[..], &more].concat())?;
                assert!(!answered(&report), "{when} {mark}: {report}");
            }
        }
    }
    for server in servers {
        assert!(server.events("accepted").is_empty());
    }
    Ok(())
}

/// The client says the marker to the other node; tells whether it passed between the nodes in clear.
fn say(scene: &Scene, when: &str, mark: &str) -> Result<(Value, bool)> {
    let capture = scene.fabric.capture()?;
    let length = MARKER.len().to_string();
    let words = [when, mark, "--send", MARKER, "--read", &length];
    let words = [&words[..], &["--timeout-ms", "1500"]].concat();
    let report = connect_to(&scene.client, &scene.server_b()?.at(PORT), &words)?;
    Ok((report, capture.contains(MARKER.as_bytes())?))
}

#[test]
fn a_marked_socket_is_carried_like_any_other() -> Result<()> {
    let scene = Scene::new()?;
    let _servers = [
        serve(&scene.server_a, "echo")?,
        serve(scene.server_b()?, "echo")?,
    ];
    scene.warm(&scene.client, &scene.server_a)?;
    for mark in MARKS.map(number) {
        let (report, leaked) = say(&scene, "--mark", &mark)?;
        assert!(!leaked, "{mark}: {report}");
        assert_eq!(text(&report, "data"), MARKER, "{mark}: {report}");
    }
    // Direct ones keep the mark, which is their application's business.
    let direct = decisions(&scene.agent1, "direct")?;
    let words = ["--mark", "7", "--send", "hello", "--read", "5"];
    let report = connect(&scene.client, &scene.server_a, &words)?;
    assert!(answered(&report), "{report}");
    assert_eq!(decisions(&scene.agent1, "direct")?, direct + 1);
    Ok(())
}

#[test]
fn twin_without_steering_a_marked_socket_leaves_in_plaintext() -> Result<()> {
    let scene = Scene::without("skip-steering,skip-policy")?;
    let _server = serve(scene.server_b()?, "echo")?;
    let (report, leaked) = say(&scene, "--mark", "7")?;
    assert!(leaked, "{report}");
    Ok(())
}

/// Who may set marks may take an open connection off its way, as he may send packets by hand: that is his own loss.
#[test]
fn a_mark_that_is_changed_later_leads_to_no_application() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(scene.server_b()?, "echo")?;
    // Other bits of the mark, and the agent's own, do not matter.
    for mark in ["0x1053b", "0x539"].map(number) {
        let (report, leaked) = say(&scene, "--remark", &mark)?;
        assert!(!leaked, "{mark}: {report}");
        assert_eq!(text(&report, "data"), MARKER, "{mark}: {report}");
    }
    // Last, since what leaves in clear is sent again and again.
    for mark in ["0xfff", "7"].map(number) {
        let (report, _) = say(&scene, "--remark", &mark)?;
        assert_eq!(text(&report, "data"), "", "{mark}: {report}");
        // It was accepted when its way was the agent's, and hears no more.
        let peer = text(&report, "local");
        for closed in server.events("closed") {
            assert!(text(&closed, "peer") != peer || closed["bytes_read"] == 0);
        }
    }
    Ok(())
}

/// A connection made by hand, from a pod's own address.
fn crafted(scene: &Scene) -> Result<Value> {
    let (src, dst) = (scene.client.at(40_001), scene.server_a.at(PORT));
    let words = ["raw-handshake", "--src", &src, "--dst", &dst, "--seq", "7"];
    let probe = scene.client.probe()?.args(words).args(["--data", "hello"]);
    probe.args(["--wait-ms", "700"]).run(SOON)?.json()
}

#[test]
fn what_a_pod_sends_by_hand_has_no_identity() -> Result<()> {
    let scene = Scene::new()?;
    let server = serve(&scene.server_a, "echo")?;
    // Its kernel would let it: the verdict is there.
    for _ in 0..2 {
        assert!(answered(&echo(&scene.client, &scene.server_a)?));
    }
    let (log, plain) = (
        scene.agent1.log().mark(),
        decisions(&scene.agent1, "to_plaintext")?,
    );
    let wire = crafted(&scene)?;
    assert_eq!(text(&wire, "received"), "", "{wire}");
    assert_eq!(server.events("accepted").len(), 2, "only those before");
    assert!(decisions(&scene.agent1, "to_plaintext")? > plain);
    let source = scene.client.at(40_001);
    let line = scene
        .agent1
        .wait_for_access(log, &[("src.addr", &source)], SOON)?;
    assert_eq!(line.field("src.identity"), None, "{line:?}");
    Ok(())
}

#[test]
fn twin_without_policy_what_a_pod_sends_by_hand_is_answered() -> Result<()> {
    let scene = Scene::without("skip-policy")?;
    let _server = serve(&scene.server_a, "echo")?;
    let wire = crafted(&scene)?;
    assert_eq!(text(&wire, "received"), "hello", "{wire}");
    Ok(())
}
