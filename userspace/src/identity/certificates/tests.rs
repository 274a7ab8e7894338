//! The store against issuers that succeed, fail, lie and hang.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::super::dev_ca::DevCa;
use super::super::issuer::{DevCaIssuer, Issuing};
use super::*;

fn identity(service_account: &str) -> Identity {
    Identity::parse(&format!(
        "spiffe://cluster.local/ns/shop/sa/{service_account}"
    ))
    .unwrap()
}

fn ca() -> (tempfile::TempDir, Arc<DevCa>) {
    let directory = tempfile::tempdir().unwrap();
    let ca = DevCa::open(directory.path(), "cluster.local").unwrap();
    (directory, Arc::new(ca))
}

fn quick() -> RenewalSettings {
    RenewalSettings {
        check_every: Duration::from_millis(20),
        backoff_first: Duration::from_millis(20),
        backoff_most: Duration::from_millis(40),
        request_deadline: Duration::from_millis(200),
        ..RenewalSettings::default()
    }
}

struct Running {
    store: Certificates,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(issuer: Arc<dyn Issuer>) -> Self {
        Self::with(issuer, quick())
    }

    fn with(issuer: Arc<dyn Issuer>, settings: RenewalSettings) -> Self {
        let knobs = TestKnobs::default();
        let store = Certificates::new(issuer, settings, Revocations::default(), knobs);
        let shutdown = CancellationToken::new();
        let task = tokio::spawn({
            let (store, shutdown) = (store.clone(), shutdown.clone());
            async move { store.run(shutdown).await }
        });
        Self {
            store,
            shutdown,
            task,
        }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap();
    }
}

/// Counts requests; the first `failing` fail, and `identity_override` is answered instead of what was asked.
struct Scripted {
    ca: Arc<DevCa>,
    asked: AtomicUsize,
    failing: usize,
    answer: Option<Identity>,
    hang: bool,
}

impl Scripted {
    fn new(ca: Arc<DevCa>) -> Self {
        Self {
            ca,
            asked: AtomicUsize::new(0),
            failing: 0,
            answer: None,
            hang: false,
        }
    }
}

impl Issuer for Scripted {
    fn issue<'a>(&'a self, identity: &'a Identity, now: SystemTime) -> Issuing<'a> {
        Box::pin(async move {
            let asked = self.asked.fetch_add(1, Ordering::SeqCst);
            if self.hang {
                std::future::pending::<()>().await;
            }
            if asked < self.failing {
                return Err(IssueError::Unavailable {
                    identity: identity.clone(),
                    reason: "scripted".into(),
                });
            }
            let identity = self.answer.as_ref().unwrap_or(identity);
            Ok(self.ca.issue(identity, Duration::from_secs(3600), now)?)
        })
    }

    fn roots(&self) -> Roots {
        self.ca.roots().clone()
    }
}

#[tokio::test]
async fn two_pods_of_one_identity_share_a_certificate_until_the_last_leaves() {
    let (_directory, ca) = ca();
    let issuer = Arc::new(Scripted::new(ca));
    let running = Running::start(issuer.clone());
    let store = &running.store;
    let who = identity("cart");
    store.acquire(&who);
    store.acquire(&who);
    let first = store.ready(&who).await.unwrap();
    assert_eq!(first.identity(), &who);
    assert!(!store.release(&who));
    assert!(Arc::ptr_eq(
        &first,
        &store.current(&who, SystemTime::now()).unwrap()
    ));
    assert!(store.release(&who));
    assert_eq!(
        store.current(&who, SystemTime::now()).unwrap_err(),
        CertificateError::NotHeld(who.clone())
    );
    assert!(store.held().is_empty());
    assert_eq!(issuer.asked.load(Ordering::SeqCst), 1);
    running.stop().await;
}

#[tokio::test]
async fn only_identities_of_pods_are_held() {
    let (_directory, ca) = ca();
    let running = Running::start(Arc::new(DevCaIssuer::new(ca, Duration::from_secs(60))));
    running.store.acquire(&identity("a"));
    running.store.acquire(&identity("b"));
    running.store.ready(&identity("a")).await.unwrap();
    running.store.ready(&identity("b")).await.unwrap();
    running.store.release(&identity("a"));
    let held: Vec<_> = running
        .store
        .held()
        .into_iter()
        .map(|(identity, _)| identity)
        .collect();
    assert_eq!(held, [identity("b")]);
    assert!(!running.store.release(&identity("stranger")));
    running.stop().await;
}

#[tokio::test]
async fn an_expired_certificate_is_never_handed_out() {
    let (_directory, ca) = ca();
    let running = Running::start(Arc::new(DevCaIssuer::new(ca, Duration::from_secs(60))));
    let who = identity("a");
    running.store.acquire(&who);
    let certificate = running.store.ready(&who).await.unwrap();
    let end = certificate.validity().not_after;
    assert!(
        running
            .store
            .current(&who, end - Duration::from_secs(1))
            .is_ok()
    );
    assert_eq!(
        running.store.current(&who, end).unwrap_err(),
        CertificateError::Expired(who.clone())
    );
    running.stop().await;
}

#[tokio::test]
async fn a_failing_issuer_is_asked_again_and_its_failure_named() {
    let (_directory, ca) = ca();
    let issuer = Arc::new(Scripted {
        failing: 3,
        ..Scripted::new(ca)
    });
    let running = Running::start(issuer.clone());
    let who = identity("a");
    running.store.acquire(&who);
    let error = running.store.ready(&who).await.unwrap_err();
    assert!(
        matches!(&error, CertificateError::Failed { reason, .. } if reason.contains("scripted")),
        "{error}"
    );
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while running.store.current(&who, SystemTime::now()).is_err() {
        assert!(std::time::Instant::now() < deadline, "never issued");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(issuer.asked.load(Ordering::SeqCst), 4);
    running.stop().await;
}

#[tokio::test]
async fn a_certificate_for_somebody_else_is_refused() {
    let (_directory, ca) = ca();
    let running = Running::start(Arc::new(Scripted {
        answer: Some(identity("other")),
        ..Scripted::new(ca)
    }));
    let who = identity("a");
    running.store.acquire(&who);
    let error = running.store.ready(&who).await.unwrap_err();
    assert!(error.to_string().contains("sa/other"), "{error}");
    running.stop().await;
}

#[tokio::test]
async fn an_issuer_that_hangs_runs_into_the_deadline_and_does_not_hold_up_shutdown() {
    let (_directory, ca) = ca();
    let running = Running::start(Arc::new(Scripted {
        hang: true,
        ..Scripted::new(ca)
    }));
    let who = identity("a");
    running.store.acquire(&who);
    assert_eq!(
        running.store.current(&who, SystemTime::now()).unwrap_err(),
        CertificateError::Pending(who.clone())
    );
    let error = running.store.ready(&who).await.unwrap_err();
    assert!(error.to_string().contains("did not answer"), "{error}");
    running.stop().await;
}

/// Issues for each identity once, certificates that are due at once; after that it says nothing.
struct Once {
    ca: Arc<DevCa>,
    asked: Mutex<Vec<Identity>>,
}

impl Issuer for Once {
    fn issue<'a>(&'a self, identity: &'a Identity, now: SystemTime) -> Issuing<'a> {
        Box::pin(async move {
            let again = {
                let mut asked = self.asked.lock().unwrap();
                let again = asked.contains(identity);
                asked.push(identity.clone());
                again
            };
            if again {
                std::future::pending::<()>().await;
            }
            // Back-dating puts it past half of its life.
            Ok(self.ca.issue(identity, Duration::from_secs(30), now)?)
        })
    }

    fn roots(&self) -> Roots {
        self.ca.roots().clone()
    }
}

/// Whether a new pod has its certificate while more renewals hang than there are places.
async fn is_served_beside_renewals(kept_for_new: usize) -> bool {
    let (_directory, ca) = ca();
    let issuer = Arc::new(Once {
        ca,
        asked: Mutex::default(),
    });
    let settings = RenewalSettings {
        request_deadline: Duration::from_secs(60),
        kept_for_new,
        ..quick()
    };
    let places = settings.concurrent_requests;
    let running = Running::with(issuer.clone(), settings);
    let old: Vec<_> = (0..2 * places)
        .map(|at| identity(&format!("old-{at}")))
        .collect();
    for who in &old {
        running.store.acquire(who);
    }
    for who in &old {
        running.store.ready(who).await.unwrap();
    }
    let all_hang = async {
        while issuer.asked.lock().unwrap().len() < old.len() + places - kept_for_new {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all_hang)
        .await
        .unwrap();
    let new = identity("new");
    running.store.acquire(&new);
    let ready = running.store.ready(&new);
    let served = tokio::time::timeout(Duration::from_secs(2), ready).await;
    running.stop().await;
    served.is_ok_and(|ready| ready.is_ok())
}

#[tokio::test]
async fn renewals_that_hang_do_not_hold_up_a_new_pod() {
    let kept = RenewalSettings::default().kept_for_new;
    assert!(is_served_beside_renewals(kept).await);
    assert!(!is_served_beside_renewals(0).await);
}

#[tokio::test]
async fn a_certificate_is_replaced_before_it_expires() {
    let (_directory, ca) = ca();
    // Back-dating puts a certificate of two seconds past half of its life at once.
    let running = Running::start(Arc::new(DevCaIssuer::new(ca, Duration::from_secs(2))));
    let who = identity("a");
    running.store.acquire(&who);
    let first = running.store.ready(&who).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let second = running.store.current(&who, SystemTime::now()).unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    running.stop().await;
}

#[tokio::test]
async fn waiting_for_an_identity_that_leaves_ends() {
    let (_directory, ca) = ca();
    let running = Running::start(Arc::new(Scripted {
        hang: true,
        ..Scripted::new(ca)
    }));
    let who = identity("a");
    running.store.acquire(&who);
    let waiting = tokio::spawn({
        let (store, who) = (running.store.clone(), who.clone());
        async move { store.ready(&who).await }
    });
    tokio::task::yield_now().await;
    running.store.release(&who);
    assert_eq!(
        waiting.await.unwrap().unwrap_err(),
        CertificateError::NotHeld(who)
    );
    running.stop().await;
}
