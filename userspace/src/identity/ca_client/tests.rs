//! Against the development control plane's CA.

use std::path::Path;

use super::*;
use crate::control_channel::{Address, Headers, RootSource, TokenSource};
use crate::dev_control_plane::{ca::pem, fixture::ControlPlane};

const MESH: &str = "workloads: []\n";
const HOUR: Duration = Duration::from_secs(3600);

struct NoToken;

impl TokenSource for NoToken {
    fn token(&self) -> Result<Option<String>, String> {
        Ok(None)
    }
}

fn client(address: &str, root: &Path) -> CaClient {
    let channel = ControlChannel {
        address: Address::parse(address).unwrap(),
        server_name: Some("localhost".to_owned()),
        roots: RootSource::File(root.to_owned()),
        token: std::sync::Arc::new(NoToken),
        cluster_id: "Kubernetes".to_owned(),
        headers: Headers::default(),
    };
    CaClient::new(channel, HOUR, TestKnobs::default())
}

fn cart() -> Identity {
    Identity::parse("spiffe://cluster.local/ns/shop/sa/cart").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_for_the_identity_and_its_root_is_trusted() {
    let control_plane = ControlPlane::start(MESH, None).await;
    let client = client(&control_plane.address(), control_plane.root());
    assert!(client.roots().certificates().is_empty());
    let certificate = client.issue(&cart(), SystemTime::now()).await.unwrap();
    assert_eq!(certificate.identity(), &cart());
    assert_eq!(certificate.chain().len(), 1);
    let root = CertificateDer::from_pem_file(control_plane.root()).unwrap();
    let trusted = std::slice::from_ref(&root);
    assert_eq!(&*client.roots().certificates(), trusted);
    // Certificates see what is learnt later.
    assert_eq!(&*certificate.roots().certificates(), trusted);
    control_plane.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_went_and_came_back_is_asked_again() {
    let control_plane = ControlPlane::start(MESH, None).await;
    let client = client(&control_plane.address(), control_plane.root());
    client.issue(&cart(), SystemTime::now()).await.unwrap();
    let stopped = control_plane.stop().await;
    let error = client.issue(&cart(), SystemTime::now()).await.unwrap_err();
    assert!(matches!(error, IssueError::Unavailable { .. }), "{error}");
    let control_plane = stopped.start(MESH).await;
    client.issue(&cart(), SystemTime::now()).await.unwrap();
    control_plane.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_authority_refuses_is_said() {
    let control_plane = ControlPlane::start(MESH, None).await;
    let client = client(&control_plane.address(), control_plane.root());
    let foreign = Identity::parse("spiffe://elsewhere/ns/shop/sa/cart").unwrap();
    let error = client.issue(&foreign, SystemTime::now()).await.unwrap_err();
    assert!(matches!(error, IssueError::Refused { .. }), "{error}");
    control_plane.end().await;
}

/// A root of its own, and a leaf under it.
fn chain() -> (CertificateDer<'static>, CertificateDer<'static>) {
    let directory = tempfile::tempdir().unwrap();
    let ca = super::super::DevCa::open(directory.path(), "cluster.local").unwrap();
    let leaf = ca.issue(&cart(), HOUR, SystemTime::now()).unwrap();
    (
        leaf.chain().first().unwrap().clone(),
        ca.roots().certificates().first().unwrap().clone(),
    )
}

#[test]
fn answers_that_prove_nothing_are_refused() {
    let ((leaf, root), (_, other)) = (chain(), chain());
    let read = |entries: &[&CertificateDer<'_>]| {
        let entries: Vec<_> = entries.iter().map(|one| pem(one)).collect();
        let answer = Answer::read(&entries)?;
        answer.verify(SystemTime::now()).map(|()| answer)
    };
    let good = read(&[&leaf, &root]).unwrap();
    assert_eq!((good.chain.len(), good.roots.len()), (1, 1));
    assert_eq!(read(&[&leaf, &other, &root]).unwrap().roots.len(), 2);
    for (entries, words) in [
        (vec![], "no certificate"),
        (vec![&leaf], "no root"),
        (vec![&leaf, &other], "chain does not hold"),
        (vec![&root, &root], "chain does not hold"),
    ] {
        let error = read(&entries).map(drop).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
    assert!(
        Answer::read(&["-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----".to_owned()])
            .is_err()
    );
    let many = vec![pem(&leaf); MOST_CERTIFICATES + 1];
    assert!(Answer::read(&many).is_err());
    let late = SystemTime::now() + 2 * HOUR;
    assert!(
        good.verify(late)
            .unwrap_err()
            .contains("chain does not hold")
    );
}

#[test]
fn an_old_root_is_trusted_as_long_as_its_certificates_may_be_in_use() {
    let client = client("127.0.0.1:1", Path::new("/nowhere"));
    let ((_, old), (_, new)) = (chain(), chain());
    let now = SystemTime::now();
    client.trust(vec![old.clone()], now + HOUR, now).unwrap();
    client
        .trust(vec![new.clone()], now + 2 * HOUR, now + HOUR / 2)
        .unwrap();
    assert_eq!(*client.roots().certificates(), [new.clone(), old]);
    client
        .trust(vec![new.clone()], now + 3 * HOUR, now + HOUR + HOUR / 2)
        .unwrap();
    assert_eq!(*client.roots().certificates(), [new]);
}
