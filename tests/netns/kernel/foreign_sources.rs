//! Connections from an address that is not known as their pod's. Where the socket is bound to it, the agent speaks for it, and
//! says whose it is; where the kernel chose it, after the decision, nobody is claimed to be anybody.

use anyhow::Result;
use culvert_harness::{Match, Pod, Policy, Proc};
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, Setting, answered, connect, echo, only, serve, text,
};
use serde_json::Value;

use crate::kernel_tables::{claims, decisions};

/// Connects from the address of another, which the pod has given itself.
fn as_another(scene: &Scene, pod: &Pod, other: &str) -> Result<Vec<Value>> {
    pod.add_address(other.parse()?)?;
    let words = ["--bind-ip", other, "--send", "hello", "--read", "5"];
    let words = [&words[..], &["--timeout-ms", "1500"]].concat();
    (0..3)
        .map(|_| connect(pod, &scene.server_a, &words))
        .collect()
}

#[test]
fn who_takes_an_allowed_pod_s_address_is_still_himself() -> Result<()> {
    let source = |scene: &Scene| scene.client.address().to_string();
    // By identity, and where policy looks at addresses too.
    for by_address in [false, true] {
        let mut scene = Scene::new()?;
        let address = source(&scene);
        if by_address {
            let from = Match {
                source_ips: vec![format!("{address}/32")],
                ..Match::principal(&culvert_tests::scene::principal("client"))
            };
            let policy = Policy::allow(NAMESPACE, "from-there").when(from);
            scene.change_mesh(|mesh| mesh.policies = vec![policy])?;
        }
        let server = serve(&scene.server_a, "echo")?;
        let reports = as_another(&scene, &scene.intruder, &address)?;
        assert!(!reports.iter().any(answered), "{reports:?}");
        assert!(server.events("accepted").is_empty());
        assert!(claims(&scene.node1)?.is_empty());
    }
    Ok(())
}

/// An address of its own that nobody has named, and a pod whom policy allows.
const UNNAMED: &str = "10.77.1.222";

#[test]
fn an_allowed_pod_speaks_through_the_agent_from_an_address_that_nobody_named() -> Result<()> {
    let scene = Scene::new()?;
    let _server = serve(&scene.server_a, "echo")?;
    let mark = scene.agent1.log().mark();
    scene.warm(&scene.client, &scene.server_a)?;
    let reports = as_another(&scene, &scene.client, UNNAMED)?;
    for report in &reports {
        assert!(answered(report), "{report}");
        assert!(text(report, "local").starts_with(UNNAMED), "{report}");
    }
    assert_eq!(decisions(&scene.agent1, "steered_foreign_source")?, 3);
    let fields = [("src.workload", "client"), ("path", "hbone")];
    scene.agent1.wait_for_access(mark, &fields, SOON)?;
    Ok(())
}

#[test]
fn twin_without_the_source_check_such_an_address_is_nobody_s() -> Result<()> {
    // Whoever comes from that address may pass, without any identity.
    let policies = vec![
        only("client"),
        Policy::allow(NAMESPACE, "from-there").when(Match::source(&format!("{UNNAMED}/32"))),
    ];
    for (knobs, named) in [("", true), ("skip-source-check", false)] {
        let scene = Scene::with(Setting {
            knobs,
            policies: Some(policies.clone()),
            ..Setting::default()
        })?;
        let _server = serve(&scene.server_a, "echo")?;
        scene.warm(&scene.client, &scene.server_a)?;
        as_another(&scene, &scene.client, UNNAMED)?;
        let unclaimed = decisions(&scene.agent1, "claim_foreign_source")?;
        assert_eq!(unclaimed == 0, named, "{knobs}: {unclaimed}");
    }
    Ok(())
}

/// The kernel chooses an address that nobody has named, for a socket that is bound to none and may connect directly.
fn from_a_route(scene: &Scene) -> Result<(Value, Proc)> {
    let server = serve(&scene.server_a, "echo")?;
    scene.warm(&scene.client, &scene.server_a)?;
    scene.client.add_address(UNNAMED.parse()?)?;
    let to = format!("{}/32", scene.server_a.address());
    let route = ["route", "add", &to, "dev", "eth0", "src", UNNAMED];
    let ip = scene.client.command("ip").args(route);
    ip.run(SOON)?.success()?;
    Ok((echo(&scene.client, &scene.server_a)?, server))
}

#[test]
fn who_speaks_from_an_unnamed_address_of_the_kernel_s_choice_is_not_taken_for_the_pod() -> Result<()>
{
    let scene = Scene::new()?;
    let (report, server) = from_a_route(&scene)?;
    assert!(!answered(&report), "{report}");
    assert!(decisions(&scene.agent1, "claim_foreign_source")? >= 1);
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 0);
    assert_eq!(server.events("accepted").len(), 1, "only the one before");
    assert!(claims(&scene.node1)?.is_empty());
    Ok(())
}

#[test]
fn twin_with_a_claim_for_any_source_such_an_address_is_taken_for_the_pod() -> Result<()> {
    let scene = Scene::without("skip-claim-source")?;
    let (report, _server) = from_a_route(&scene)?;
    assert!(answered(&report), "{report}");
    assert!(text(&report, "local").starts_with(UNNAMED), "{report}");
    assert_eq!(decisions(&scene.agent1, "admitted_direct")?, 1);
    Ok(())
}
