//! Against the development control plane, over TLS on the loopback device.

mod sizes;

use std::path::Path;

use super::*;
use crate::control_channel::{Address, Headers, RootSource, TokenSource};
use crate::dev_control_plane::fixture::ControlPlane;
use crate::mesh::Mesh;

const SOON: Duration = Duration::from_secs(20);

struct NoToken;

impl TokenSource for NoToken {
    fn token(&self) -> Result<Option<String>, String> {
        Ok(None)
    }
}

fn channel(address: &str, root: &Path) -> ControlChannel {
    ControlChannel {
        address: Address::parse(address).unwrap(),
        server_name: Some("localhost".to_owned()),
        roots: RootSource::File(root.to_owned()),
        token: Arc::new(NoToken),
        cluster_id: "Kubernetes".to_owned(),
        headers: Headers::default(),
    }
}

struct Running {
    store: Arc<Store>,
    status: watch::Receiver<XdsStatus>,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(channel: ControlChannel) -> Self {
        Self::annotated(channel, None).0
    }

    fn annotated(
        channel: ControlChannel,
        annotations: Option<&Path>,
    ) -> (Self, Option<Told<InFeed>>) {
        let store = Arc::new(Store::new());
        let node = Node {
            id: "ztunnel~10.0.0.1~pod.ns~ns.svc.cluster.local".to_owned(),
            ..Node::default()
        };
        let defaults = MeshDefaults::default();
        let (client, status) = XdsClient::new(channel, node, defaults, Arc::clone(&store), None);
        let shutdown = CancellationToken::new();
        let file = annotations.map(|path| {
            let (watcher, status) = client.annotated_by(path).unwrap();
            tokio::spawn(watcher.run(shutdown.clone()));
            status
        });
        let task = tokio::spawn(client.run(shutdown.clone()));
        let running = Self {
            store,
            status,
            shutdown,
            task,
        };
        (running, file)
    }

    async fn mesh(&self, is_it: impl Fn(&Mesh) -> bool) -> Arc<Mesh> {
        let mut news = self.store.subscribe();
        let wait = async {
            loop {
                let mesh = self.store.load();
                if is_it(&mesh) {
                    return mesh;
                }
                news.changed().await.unwrap();
            }
        };
        tokio::time::timeout(SOON, wait).await.unwrap()
    }

    async fn status(&mut self, is_it: impl FnMut(&XdsStatus) -> bool) -> XdsStatus {
        let found = tokio::time::timeout(SOON, self.status.wait_for(is_it)).await;
        found.unwrap().unwrap().clone()
    }

    async fn end(self) {
        self.shutdown.cancel();
        tokio::time::timeout(SOON, self.task)
            .await
            .unwrap()
            .unwrap();
    }
}

const POLICY: &str =
    "policies:\n  - {name: p, namespace: shop, scope: Namespace, action: Deny, rules: []}\n";

fn workload(name: &str, ip: &str) -> String {
    format!("  - {{uid: {name}, name: {name}, namespace: shop, workloadIps: [{ip}]}}\n")
}

fn mesh_of(workloads: &[(&str, &str)]) -> String {
    let workloads: String = workloads
        .iter()
        .map(|(name, ip)| workload(name, ip))
        .collect();
    format!("workloads:\n{workloads}{POLICY}")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mesh_follows_the_control_plane() {
    let control_plane = ControlPlane::start(&mesh_of(&[("web", "10.0.0.1")]), None).await;
    let mut running = Running::start(channel(&control_plane.address(), control_plane.root()));
    let mesh = running.mesh(|mesh| mesh.workloads().len() == 1).await;
    // Never workloads without their policies.
    assert_eq!(mesh.policies().len(), 1);
    let status = running.status(|status| status.in_force.is_some()).await;
    assert!(
        status.lost_at.is_none() && status.unanswered.is_empty(),
        "{status:?}"
    );

    control_plane.write(&mesh_of(&[("web", "10.0.0.1"), ("db", "10.0.0.2")]));
    running
        .mesh(|mesh| mesh.workload_by_uid("db").is_some())
        .await;
    control_plane.write(&mesh_of(&[("db", "10.0.0.2")]));
    running
        .mesh(|mesh| mesh.workload_by_uid("web").is_none())
        .await;
    running.end().await;
    control_plane.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_control_plane_the_mesh_stays_and_what_changed_meanwhile_is_learnt_later() {
    let control_plane =
        ControlPlane::start(&mesh_of(&[("web", "10.0.0.1"), ("old", "10.0.0.9")]), None).await;
    let mut running = Running::start(channel(&control_plane.address(), control_plane.root()));
    running.mesh(|mesh| mesh.workloads().len() == 2).await;
    let stopped = control_plane.stop().await;
    let lost = running.status(|status| status.lost_at.is_some()).await;
    assert!(lost.error.is_some() && lost.in_force.is_some(), "{lost:?}");
    assert_eq!(running.store.load().workloads().len(), 2);

    let control_plane = stopped
        .start(&mesh_of(&[("web", "10.0.0.1"), ("new", "10.0.0.3")]))
        .await;
    let mesh = running
        .mesh(|mesh| mesh.workload_by_uid("new").is_some())
        .await;
    assert!(mesh.workload_by_uid("old").is_none() && mesh.workload_by_uid("web").is_some());
    running.status(|status| status.lost_at.is_none()).await;
    running.end().await;
    control_plane.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_others_vouch_for_is_not_believed() {
    let (real, other) = (
        ControlPlane::start(&mesh_of(&[]), None).await,
        ControlPlane::start(&mesh_of(&[]), None).await,
    );
    let mut running = Running::start(channel(&real.address(), other.root()));
    let status = running.status(|status| status.error.is_some()).await;
    assert!(status.in_force.is_none());
    assert!(status.counts.terminations[Termination::ConnectionError as usize] > 0);
    running.end().await;
    real.end().await;
    other.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_is_said_and_not_shown() {
    struct Wrong;
    impl TokenSource for Wrong {
        fn token(&self) -> Result<Option<String>, String> {
            Ok(Some("wrong-secret".to_owned()))
        }
    }
    let control_plane = ControlPlane::start(&mesh_of(&[]), Some("right")).await;
    let mut running = Running::start(ControlChannel {
        token: Arc::new(Wrong),
        ..channel(&control_plane.address(), control_plane.root())
    });
    let status = running.status(|status| status.error.is_some()).await;
    let error = status.error.unwrap();
    assert!(
        error.contains("Unauthenticated") && !error.contains("wrong-secret"),
        "{error}"
    );
    running.end().await;
    control_plane.end().await;
}

fn off(namespace: &str) -> String {
    format!("namespaces: [{{name: {namespace}, annotations: {{culvert.dev/direct: \"off\"}}}}]\n")
}

fn direct(mesh: &Mesh, uid: &str) -> Option<bool> {
    Some(mesh.workload_by_uid(uid)?.direct)
}

#[tokio::test(flavor = "multi_thread")]
async fn annotations_of_a_file_hold_with_and_without_a_push_and_without_the_control_plane() {
    let control_plane = ControlPlane::start(&mesh_of(&[("web", "10.0.0.1")]), None).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("annotations.yaml");
    let write = |text: &str| {
        let new = directory.path().join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(&new, &path).unwrap();
    };
    let channel = channel(&control_plane.address(), control_plane.root());
    let (mut running, file) = Running::annotated(channel, Some(&path));
    let mut file = file.unwrap();
    // Nothing is in force before the file is there.
    running.status(|status| status.unanswered.is_empty()).await;
    let missing = tokio::time::timeout(SOON, file.wait_for(|file| file.error.is_some())).await;
    let missing = missing.unwrap().unwrap().error.clone().unwrap().to_string();
    assert!(
        missing.contains("cannot read the annotations file"),
        "{missing}"
    );
    assert_eq!(running.store.revision(), Revision(0));
    write(&off("shop"));
    running
        .mesh(|mesh| direct(mesh, "web") == Some(false))
        .await;
    running.status(|status| status.in_force.is_some()).await;

    control_plane.write(&mesh_of(&[("web", "10.0.0.1"), ("db", "10.0.0.2")]));
    running.mesh(|mesh| direct(mesh, "db") == Some(false)).await;
    write(&off("bank"));
    let both = |mesh: &Mesh| [direct(mesh, "web"), direct(mesh, "db")];
    let mesh = running.mesh(|mesh| both(mesh) != [Some(false); 2]).await;
    assert_eq!(both(&mesh), [Some(true); 2], "seen in half");

    let stopped = control_plane.stop().await;
    running.status(|status| status.lost_at.is_some()).await;
    let before = running.store.revision();
    write("namespaces: [{name: shop, annotations: {culvert.dev/dirct: \"off\"}}]\n");
    let bad = tokio::time::timeout(SOON, file.wait_for(|file| file.error.is_some())).await;
    assert!(bad.unwrap().unwrap().in_effect.is_some());
    assert_eq!(running.store.revision(), before);
    write(&off("shop"));
    running.mesh(|mesh| both(mesh) == [Some(false); 2]).await;
    // Both are told after the mesh.
    let revision = running.store.revision();
    running
        .status(|status| status.in_force.is_some_and(|(known, _)| known == revision))
        .await;
    let mended = tokio::time::timeout(SOON, file.wait_for(|file| file.error.is_none())).await;
    assert!(mended.unwrap().unwrap().in_effect.is_some());
    running.end().await;
    drop(stopped);
}
