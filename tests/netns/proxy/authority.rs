//! A certificate authority that does not do what it should: a pod without a certificate is not served in the open, all others are
//! served as before, and it is served once the authority behaves again.

use anyhow::Result;
use culvert_harness::{Agent, Match, Pod, Policy, Proc, Workload, wait_until};
use culvert_tests::scene::{
    NAMESPACE, SOON, Scene, Setting, answered, connect, echo, only, principal, serve, status,
};
use serde_json::Value;

use super::peer::{genuine, server_leaf};

const WORD: &str = "not-for-the-wire";

struct Stage {
    scene: Scene,
    server: Proc,
}

impl Stage {
    fn new() -> Result<Self> {
        Self::with(Setting::default())
    }

    fn with(setting: Setting) -> Result<Self> {
        let scene = Scene::with(Setting {
            policies: Some(vec![only("client"), newcomers()]),
            control_plane: true,
            ..setting
        })?;
        let server = serve(scene.server_b()?, "echo")?;
        assert!(answered(&echo(&scene.client, scene.server_b()?)?));
        Ok(Self { scene, server })
    }

    fn misbehave(&mut self, behaviour: &str) -> Result<()> {
        self.scene.control_plane()?.misbehave_now(behaviour)
    }

    /// A pod of an identity that nobody had before.
    fn newcomer(&mut self, name: &str) -> Result<(Pod, Workload)> {
        let pod = self.scene.node1.pod(name)?;
        let workload = Workload::of_pod(&pod, NAMESPACE, name);
        let told = workload.clone();
        self.scene.change_mesh(|mesh| {
            mesh.workloads.push(told);
            let matching = &mut mesh.policies[1].rules[0][0][0];
            matching.principals.push(principal(name).into());
        })?;
        self.scene.agent1.enrol_as(&pod, &workload)?;
        Ok((pod, workload))
    }

    fn say(&self, pod: &Pod, patience: &str) -> Result<Value> {
        let words = ["--send", WORD, "--read", "16", "--timeout-ms", patience];
        connect(pod, self.scene.server_b()?, &words)
    }

    /// Nothing of the pod's comes to the server or can be seen on the way, and others connect as ever.
    fn is_not_served(&self, pod: &Pod, fault: &str) -> Result<()> {
        let capture = self.scene.fabric.capture()?;
        let report = self.say(pod, "2000")?;
        assert_ne!(report["data"], WORD, "{fault}");
        assert!(!capture.contains(WORD.as_bytes())?, "{fault}");
        let own = format!("{}:", pod.address());
        let accepted = self.server.events("accepted");
        let peers = accepted.iter().filter_map(|event| event["peer"].as_str());
        assert!(
            !peers.into_iter().any(|peer| peer.starts_with(&own)),
            "{fault}"
        );
        assert!(answered(&echo(&self.scene.client, self.scene.server_b()?)?));
        self.scene.agent1.ready()
    }

    fn is_served(&self, pod: &Pod) -> Result<()> {
        wait_until(SOON * 2, "the pod to be served", || {
            Ok((self.say(pod, "2000")?["data"] == WORD).then_some(()))
        })
    }
}

/// Lets those in that are named later.
fn newcomers() -> Policy {
    Policy::allow(NAMESPACE, "newcomers").when(Match::principal(&principal("nobody")))
}

/// What `culvert status` of the first node says of a pod's certificate.
fn certificate(scene: &Scene, name: &str) -> Result<String> {
    certificate_of(&scene.agent1, name)
}

fn certificate_of(agent: &Agent, name: &str) -> Result<String> {
    let status = status(agent)?;
    let all = status["certificates"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let of_pod = all.iter().filter_map(Value::as_str);
    let found = of_pod
        .into_iter()
        .find(|text| text.contains(&format!("/sa/{name}:")));
    Ok(found.unwrap_or_default().to_owned())
}

#[test]
fn without_a_proper_answer_a_pod_is_not_served_until_there_is_one() -> Result<()> {
    let mut stage = Stage::new()?;
    for fault in [
        "refuse",
        "other-identity",
        "expired",
        "leaf-only",
        "unrelated-root",
    ] {
        stage.misbehave(&format!("ca: [{fault}]"))?;
        let (pod, _) = stage.newcomer(fault)?;
        stage.is_not_served(&pod, fault)?;
        let held = certificate(&stage.scene, fault)?;
        assert!(held.ends_with("not issued yet"), "{fault}: {held}");
        stage.misbehave("")?;
        stage.is_served(&pod)?;
    }
    Ok(())
}

#[test]
fn an_authority_that_nobody_else_knows_opens_no_tunnel() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.misbehave("ca: [other-root]")?;
    let (pod, workload) = stage.newcomer("other-root")?;
    stage.is_not_served(&pod, "other-root")?;
    stage.misbehave("")?;
    // It has a certificate that is good for a day, of which the agent cannot know what others think.
    stage.scene.agent1.unenrol(&workload.uid)?;
    stage.scene.agent1.enrol_as(&pod, &workload)?;
    stage.is_served(&pod)
}

#[test]
fn who_connects_before_a_late_certificate_waits_for_it() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.misbehave("ca: [{delay-ms: 3000}]")?;
    let (pod, _) = stage.newcomer("late")?;
    let capture = stage.scene.fabric.capture()?;
    assert_eq!(stage.say(&pod, "9000")?["data"], WORD);
    assert!(!capture.contains(WORD.as_bytes())?);
    assert_eq!(stage.server.events("accepted").len(), 2);
    Ok(())
}

#[test]
fn without_a_proper_answer_the_certificate_that_there_is_stays_in_use_and_the_reason_is_told()
-> Result<()> {
    // Back-dated by as much, such a certificate is renewed every few seconds.
    let mut stage = Stage::with(Setting {
        env: vec![("SECRET_TTL", "60s".to_owned())],
        ..Setting::default()
    })?;
    let warnings = |stage: &Stage| -> Result<String> {
        Ok(status(stage.scene.agent2()?)?["warnings"].to_string())
    };
    let shown =
        |scene: &Scene| server_leaf(&scene.client, scene.server_b()?, genuine(scene, "client")?);
    for (fault, reason) in [
        ("unrelated-root", "its chain does not hold"),
        ("other-identity", "with a certificate for"),
        ("refuse", "told to refuse"),
    ] {
        stage.misbehave(&format!("ca: [{fault}]"))?;
        wait_until(SOON, reason, || {
            Ok(warnings(&stage)?.contains(reason).then_some(()))
        })?;
        let kept = shown(&stage.scene)?;
        let agent = stage.scene.agent2()?;
        let again = agent.log().mark();
        agent
            .process()
            .wait_for_line_after(again, "no certificate; trying again", SOON)?;
        assert_eq!(shown(&stage.scene)?, kept, "{fault}");
        assert!(
            answered(&echo(&stage.scene.client, stage.scene.server_b()?)?),
            "{fault}"
        );
        let held = certificate_of(agent, "server-b")?;
        assert!(held.contains("valid for"), "{fault}: {held}");

        stage.misbehave("")?;
        wait_until(SOON * 2, "a renewed certificate, and no complaint", || {
            let renewed = shown(&stage.scene)? != kept;
            Ok((renewed && !warnings(&stage)?.contains(reason)).then_some(()))
        })?;
    }
    Ok(())
}
