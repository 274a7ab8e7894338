//! Each check of the verifiers over a real handshake, with a peer that breaks just that one; twins with the check switched off follow.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::SanType;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{AlertDescription, ClientConfig, NamedGroup, ProtocolVersion, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::identity::certificate::PROVIDER;
use crate::identity::{DevCa, Validity, WorkloadCertificate};
use crate::policy::Identity;

const DAY: Duration = Duration::from_secs(24 * 3600);
const DEADLINE: Duration = Duration::from_secs(5);

struct Ca {
    ca: DevCa,
    _directory: tempfile::TempDir,
}

impl Ca {
    fn new(trust_domain: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            ca: DevCa::open(directory.path(), trust_domain).unwrap(),
            _directory: directory,
        }
    }

    fn issue(&self, service_account: &str) -> Arc<WorkloadCertificate> {
        self.issue_at(service_account, SystemTime::now())
    }

    fn issue_at(&self, service_account: &str, now: SystemTime) -> Arc<WorkloadCertificate> {
        let who = Identity::parse(&format!(
            "spiffe://{}/ns/shop/sa/{service_account}",
            self.ca.trust_domain()
        ))
        .unwrap();
        Arc::new(self.ca.issue(&who, DAY, now).unwrap())
    }

    fn names(&self, names: &[SanType]) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let now = SystemTime::now();
        self.ca
            .issue_names(
                names.to_vec(),
                Validity {
                    not_before: now,
                    not_after: now + DAY,
                },
            )
            .unwrap()
    }
}

fn checks(knobs: TestKnobs) -> PeerChecks {
    PeerChecks {
        knobs,
        ..PeerChecks::default()
    }
}

fn identity(service_account: &str) -> Identity {
    Identity::parse(&format!(
        "spiffe://cluster.local/ns/shop/sa/{service_account}"
    ))
    .unwrap()
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// Believes everything; what a hostile peer would use.
#[derive(Debug)]
struct Gullible;

impl rustls::client::danger::ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        PROVIDER
            .signature_verification_algorithms
            .supported_schemes()
    }
}

type Pair = (CertificateDer<'static>, PrivateKeyDer<'static>);

fn hostile_client(own: Option<Pair>) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let mut config = match own {
        Some((leaf, key)) => builder.with_client_auth_cert(vec![leaf], key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

fn hostile_server((leaf, key): Pair) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(PROVIDER.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

type Outcome = (
    Result<Accepted<DuplexStream>, HandshakeError>,
    Result<Connected<DuplexStream>, HandshakeError>,
);

async fn handshake(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    checks: PeerChecks,
) -> Outcome {
    let (near, far) = tokio::io::duplex(64 * 1024);
    tokio::join!(
        accept(near, server, Some(DEADLINE), &checks),
        connect(
            far,
            client,
            Ipv4Addr::LOCALHOST.into(),
            Some(DEADLINE),
            &checks
        )
    )
}

/// What our server says to a client.
async fn judged_by_server(
    ca: &Ca,
    client: Arc<ClientConfig>,
    checks: PeerChecks,
) -> Result<Option<Identity>, HandshakeError> {
    let server = server_config(&ca.issue("server"), &checks).unwrap();
    handshake(server, client, checks)
        .await
        .0
        .map(|accepted| accepted.peer)
}

/// What our client, which expects `server`, says to a server.
async fn judged_by_client(
    ca: &Ca,
    server: Arc<ServerConfig>,
    checks: PeerChecks,
) -> Result<Identity, HandshakeError> {
    let client = client_config(
        &ca.issue("client"),
        &ExpectedServer::one(identity("server")),
        &checks,
    )
    .unwrap();
    handshake(server, client, checks)
        .await
        .1
        .map(|connected| connected.peer)
}

#[track_caller]
fn rejected<T: std::fmt::Debug>(result: Result<T, HandshakeError>) -> PeerRejection {
    match result.unwrap_err() {
        HandshakeError::Peer(rejection) => rejection,
        other => panic!("{other}"),
    }
}

fn client_of(certificate: &Arc<WorkloadCertificate>) -> Arc<ClientConfig> {
    client_config(
        certificate,
        &ExpectedServer::one(identity("server")),
        &PeerChecks::default(),
    )
    .unwrap()
}

/// The pair of a certificate whose key the hostile builders can use, valid around `now`.
fn dated(ca: &Ca, service_account: &str, not_before: SystemTime) -> Pair {
    let name = uri(&identity(service_account).to_string());
    ca.ca
        .issue_names(
            vec![name],
            Validity {
                not_before,
                not_after: not_before + DAY,
            },
        )
        .unwrap()
}

#[tokio::test]
async fn both_sides_learn_each_others_identity() {
    let ca = Ca::new("cluster.local");
    let server = server_config(&ca.issue("server"), &PeerChecks::default()).unwrap();
    let (accepted, connected) = handshake(
        server,
        client_of(&ca.issue("client")),
        PeerChecks::default(),
    )
    .await;
    let (mut accepted, mut connected) = (accepted.unwrap(), connected.unwrap());
    assert_eq!(accepted.peer, Some(identity("client")));
    assert_eq!(connected.peer, identity("server"));
    connected.stream.write_all(b"hello").await.unwrap();
    connected.stream.flush().await.unwrap();
    let mut got = [0; 5];
    accepted.stream.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"hello");
    let state = connected.stream.get_ref().1;
    assert_eq!(state.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(
        state
            .negotiated_key_exchange_group()
            .map(|group| group.name()),
        Some(NamedGroup::X25519MLKEM768)
    );
    assert_eq!(state.alpn_protocol(), Some(b"h2".as_slice()));
    // No tickets, so nothing that a later connection could resume.
    assert_eq!(state.tls13_tickets_received(), 0);
    assert_eq!(accepted.stream.get_ref().1.server_name(), None);
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let ca = Ca::new("cluster.local");
    let error = judged_by_server(&ca, hostile_client(None), PeerChecks::default())
        .await
        .unwrap_err();
    assert!(matches!(error, HandshakeError::NoCertificate), "{error}");
}

#[tokio::test]
async fn a_client_of_a_foreign_root_is_refused() {
    let (ours, theirs) = (Ca::new("cluster.local"), Ca::new("cluster.local"));
    // One that does not check us: its own check would end the handshake first.
    let client = hostile_client(Some(theirs.names(&[uri(&identity("client").to_string())])));
    assert_eq!(
        rejected(judged_by_server(&ours, client, PeerChecks::default()).await),
        PeerRejection::UnknownIssuer
    );
}

#[tokio::test]
async fn an_expired_client_is_refused() {
    let ca = Ca::new("cluster.local");
    let client = hostile_client(Some(dated(&ca, "client", SystemTime::now() - 2 * DAY)));
    assert_eq!(
        rejected(judged_by_server(&ca, client, PeerChecks::default()).await),
        PeerRejection::Expired
    );
}

#[tokio::test]
async fn a_client_from_the_future_is_refused() {
    let ca = Ca::new("cluster.local");
    let client = hostile_client(Some(dated(&ca, "client", SystemTime::now() + DAY)));
    assert_eq!(
        rejected(judged_by_server(&ca, client, PeerChecks::default()).await),
        PeerRejection::NotYetValid
    );
}

#[tokio::test]
async fn a_client_with_two_uri_names_is_refused() {
    let ca = Ca::new("cluster.local");
    let names = [
        uri(&identity("client").to_string()),
        uri(&identity("admin").to_string()),
    ];
    let client = hostile_client(Some(ca.names(&names)));
    let rejection = rejected(judged_by_server(&ca, client, PeerChecks::default()).await);
    assert!(rejection.to_string().contains("carries 2"), "{rejection}");
}

#[tokio::test]
async fn a_client_with_only_a_dns_name_is_refused() {
    let ca = Ca::new("cluster.local");
    let client = hostile_client(Some(
        ca.names(&[SanType::DnsName("client.shop".try_into().unwrap())]),
    ));
    let rejection = rejected(judged_by_server(&ca, client, PeerChecks::default()).await);
    assert!(rejection.to_string().contains("carries 0"), "{rejection}");
}

#[tokio::test]
async fn a_client_whose_uri_is_no_spiffe_id_is_refused() {
    let ca = Ca::new("cluster.local");
    for name in [
        "https://cluster.local/ns/shop/sa/client",
        "spiffe://cluster.local/shop/client",
    ] {
        let client = hostile_client(Some(ca.names(&[uri(name)])));
        let rejection = rejected(judged_by_server(&ca, client, PeerChecks::default()).await);
        assert!(
            matches!(rejection, PeerRejection::Identity(_)),
            "{rejection}"
        );
    }
}

#[tokio::test]
async fn a_client_of_another_trust_domain_is_refused() {
    let ca = Ca::new("cluster.local");
    let client = hostile_client(Some(
        ca.names(&[uri("spiffe://other.example/ns/shop/sa/client")]),
    ));
    let rejection = rejected(judged_by_server(&ca, client, PeerChecks::default()).await);
    assert!(
        matches!(rejection, PeerRejection::TrustDomain { .. }),
        "{rejection}"
    );
}

#[tokio::test]
async fn a_client_that_offers_no_http2_is_refused() {
    let ca = Ca::new("cluster.local");
    for offered in [vec![], vec![b"http/1.1".to_vec()]] {
        let mut client = Arc::unwrap_or_clone(client_of(&ca.issue("client")));
        client.alpn_protocols = offered;
        let error = judged_by_server(&ca, Arc::new(client), PeerChecks::default())
            .await
            .unwrap_err();
        assert!(matches!(error, HandshakeError::NoHttp2), "{error}");
    }
}

#[tokio::test]
async fn a_client_that_says_nothing_runs_into_the_deadline() {
    let ca = Ca::new("cluster.local");
    let (near, _far) = tokio::io::duplex(1024);
    let server = server_config(&ca.issue("server"), &PeerChecks::default()).unwrap();
    let error = accept(
        near,
        server,
        Some(Duration::from_millis(20)),
        &PeerChecks::default(),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, HandshakeError::Deadline(_)), "{error}");
}

#[tokio::test]
async fn noise_instead_of_a_handshake_is_an_error() {
    let ca = Ca::new("cluster.local");
    let (near, mut far) = tokio::io::duplex(1024);
    far.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        .await
        .unwrap();
    let server = server_config(&ca.issue("server"), &PeerChecks::default()).unwrap();
    let error = accept(near, server, Some(DEADLINE), &PeerChecks::default())
        .await
        .unwrap_err();
    assert!(matches!(error, HandshakeError::Protocol(_)), "{error}");
}

#[tokio::test]
async fn another_pods_server_is_refused() {
    let ca = Ca::new("cluster.local");
    let server = server_config(&ca.issue("imposter"), &PeerChecks::default()).unwrap();
    let rejection = rejected(judged_by_client(&ca, server, PeerChecks::default()).await);
    assert!(
        matches!(&rejection, PeerRejection::NotExpected { peer, .. } if *peer == identity("imposter")),
        "{rejection}"
    );
}

#[tokio::test]
async fn a_server_of_a_foreign_root_is_refused() {
    let (ours, theirs) = (Ca::new("cluster.local"), Ca::new("cluster.local"));
    let server = hostile_server(theirs.names(&[uri(&identity("server").to_string())]));
    assert_eq!(
        rejected(judged_by_client(&ours, server, PeerChecks::default()).await),
        PeerRejection::UnknownIssuer
    );
}

#[tokio::test]
async fn an_expired_or_future_server_is_refused() {
    let ca = Ca::new("cluster.local");
    let past = hostile_server(dated(&ca, "server", SystemTime::now() - 2 * DAY));
    assert_eq!(
        rejected(judged_by_client(&ca, past, PeerChecks::default()).await),
        PeerRejection::Expired
    );
    let future = hostile_server(dated(&ca, "server", SystemTime::now() + DAY));
    assert_eq!(
        rejected(judged_by_client(&ca, future, PeerChecks::default()).await),
        PeerRejection::NotYetValid
    );
}

#[tokio::test]
async fn a_server_with_two_uri_names_is_refused() {
    let ca = Ca::new("cluster.local");
    let server = hostile_server(ca.names(&[
        uri(&identity("server").to_string()),
        uri(&identity("other").to_string()),
    ]));
    let rejection = rejected(judged_by_client(&ca, server, PeerChecks::default()).await);
    assert!(rejection.to_string().contains("carries 2"), "{rejection}");
}

#[tokio::test]
async fn a_server_with_the_right_dns_name_only_is_refused() {
    let ca = Ca::new("cluster.local");
    let server = hostile_server(ca.names(&[SanType::IpAddress(Ipv4Addr::LOCALHOST.into())]));
    let rejection = rejected(judged_by_client(&ca, server, PeerChecks::default()).await);
    assert!(
        matches!(rejection, PeerRejection::Identity(_)),
        "{rejection}"
    );
}

#[tokio::test]
async fn a_client_that_expects_nobody_accepts_nobody_and_several_any_of_them() {
    let ca = Ca::new("cluster.local");
    let client = ca.issue("client");
    for (expected, accepted) in [
        (vec![], false),
        (vec![identity("other"), identity("server")], true),
        (vec![identity("other"), identity("another")], false),
    ] {
        let server = server_config(&ca.issue("server"), &PeerChecks::default()).unwrap();
        let client = client_config(
            &client,
            &ExpectedServer::any_of(expected),
            &PeerChecks::default(),
        )
        .unwrap();
        let (_, connected) = handshake(server, client, PeerChecks::default()).await;
        assert_eq!(connected.is_ok(), accepted);
    }
}

#[tokio::test]
async fn the_refused_client_is_told_by_alert() {
    let ca = Ca::new("cluster.local");
    let server = server_config(&ca.issue("server"), &PeerChecks::default()).unwrap();
    let client = hostile_client(Some(dated(&ca, "client", SystemTime::now() - 2 * DAY)));
    // In TLS 1.3 the client is done before the server has judged it: the alert comes with the first read.
    let (_, connected) = handshake(server, client, PeerChecks::default()).await;
    let error = connected.unwrap().stream.read_u8().await.unwrap_err();
    let error = HandshakeError::from_io(error);
    assert!(
        matches!(
            error,
            HandshakeError::Refused(AlertDescription::CertificateExpired)
        ),
        "{error}"
    );
}

#[tokio::test]
async fn an_expired_own_certificate_is_not_presented() {
    let ca = Ca::new("cluster.local");
    let expired = ca.issue_at("server", SystemTime::now() - 2 * DAY);
    let expected = ExpectedServer::one(identity("server"));
    assert!(matches!(
        server_config(&expired, &PeerChecks::default()),
        Err(ConfigError::Expired(_))
    ));
    assert!(matches!(
        client_config(&expired, &expected, &PeerChecks::default()),
        Err(ConfigError::Expired(_))
    ));
    // Also when it expires between configuration and handshake.
    let brief = Arc::new(
        ca.ca
            .issue(
                &identity("server"),
                Duration::from_secs(2),
                SystemTime::now(),
            )
            .unwrap(),
    );
    let server = server_config(&brief, &PeerChecks::default()).unwrap();
    while !brief.validity().expired(SystemTime::now()) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (accepted, connected) = handshake(
        server,
        client_of(&ca.issue("client")),
        PeerChecks::default(),
    )
    .await;
    assert!(accepted.is_err() && connected.is_err());
}

fn first_of_several() -> PeerChecks {
    PeerChecks {
        names: CertificateNames::FirstOfSeveral,
        ..PeerChecks::default()
    }
}

#[tokio::test]
async fn where_several_names_are_taken_the_first_spiffe_id_counts() {
    let ca = Ca::new("cluster.local");
    let pair = |first: &str, second: &str| {
        let ids = [first, second].map(|account| uri(&identity(account).to_string()));
        let [first, second] = ids;
        ca.names(&[uri("https://example.com/a"), first, second])
    };
    let client = hostile_client(Some(pair("client", "other")));
    let peer = judged_by_server(&ca, client, first_of_several()).await;
    assert_eq!(peer.unwrap(), Some(identity("client")));
    let server = hostile_server(pair("server", "other"));
    let peer = judged_by_client(&ca, server, first_of_several()).await;
    assert_eq!(peer.unwrap(), identity("server"));
    // Not the second, though it would be the expected one.
    let server = hostile_server(pair("other", "server"));
    let rejection = rejected(judged_by_client(&ca, server, first_of_several()).await);
    assert!(
        matches!(&rejection, PeerRejection::NotExpected { peer, .. } if *peer == identity("other")),
        "{rejection}"
    );
}

#[tokio::test]
async fn where_several_names_are_taken_one_must_be_a_spiffe_id() {
    let ca = Ca::new("cluster.local");
    let names = [
        uri("https://example.com/a"),
        uri("spiffe://cluster.local/x"),
    ];
    let client = hostile_client(Some(ca.names(&names)));
    let rejection = rejected(judged_by_server(&ca, client, first_of_several()).await);
    assert!(
        rejection
            .to_string()
            .contains("none of the certificate's 2"),
        "{rejection}"
    );
}

#[cfg(feature = "test-knobs")]
mod twins {
    use super::*;

    #[tokio::test]
    async fn without_the_client_certificate_check_an_anonymous_client_is_admitted() {
        let ca = Ca::new("cluster.local");
        let knobs = TestKnobs {
            skip_client_certificate: true,
            ..TestKnobs::default()
        };
        assert_eq!(
            judged_by_server(&ca, hostile_client(None), checks(knobs))
                .await
                .unwrap(),
            None
        );
    }

    #[tokio::test]
    async fn without_the_chain_check_foreign_and_expired_peers_are_admitted() {
        let (ours, theirs) = (Ca::new("cluster.local"), Ca::new("cluster.local"));
        let knobs = TestKnobs {
            skip_chain: true,
            ..TestKnobs::default()
        };
        let foreign = theirs.names(&[uri(&identity("client").to_string())]);
        let expired = dated(&ours, "client", SystemTime::now() - 2 * DAY);
        let future = dated(&ours, "client", SystemTime::now() + DAY);
        for pair in [foreign, expired, future] {
            let peer = judged_by_server(&ours, hostile_client(Some(pair)), checks(knobs))
                .await
                .unwrap();
            assert_eq!(peer, Some(identity("client")));
        }
        let server = hostile_server(theirs.names(&[uri(&identity("server").to_string())]));
        assert_eq!(
            judged_by_client(&ours, server, checks(knobs))
                .await
                .unwrap(),
            identity("server")
        );
    }

    #[tokio::test]
    async fn without_the_server_identity_check_another_pods_server_is_accepted() {
        let ca = Ca::new("cluster.local");
        let knobs = TestKnobs {
            skip_server_identity: true,
            ..TestKnobs::default()
        };
        let server = server_config(&ca.issue("imposter"), &checks(knobs)).unwrap();
        assert_eq!(
            judged_by_client(&ca, server, checks(knobs)).await.unwrap(),
            identity("imposter")
        );
    }
}
