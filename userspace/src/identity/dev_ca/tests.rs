//! The development CA on a real directory.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn identity() -> Identity {
    Identity::parse("spiffe://cluster.local/ns/shop/sa/cart").unwrap()
}

fn write(directory: &Path, text: &str) {
    let path = directory.join("dev-ca.pem");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn read(directory: &Path) -> String {
    fs::read_to_string(directory.join("dev-ca.pem")).unwrap()
}

const DAY: Duration = Duration::from_secs(24 * 3600);

#[test]
fn the_root_is_made_once_and_private() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("a/b");
    let first = DevCa::open(&directory, "cluster.local").unwrap();
    let second = DevCa::open(&directory, "cluster.local").unwrap();
    assert_eq!(first.roots().certificates(), second.roots().certificates());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join("dev-ca.pem")), 0o600);
}

#[test]
fn agents_that_start_at_once_share_one_root() {
    let directory = tempfile::tempdir().unwrap();
    let roots: Vec<_> = std::thread::scope(|scope| {
        let open = || {
            DevCa::open(directory.path(), "cluster.local")
                .unwrap()
                .roots()
                .certificates()
                .to_vec()
        };
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(open)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(roots.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_leaf_has_an_empty_subject_one_name_and_the_right_uses() {
    let directory = tempfile::tempdir().unwrap();
    let ca = DevCa::open(directory.path(), "cluster.local").unwrap();
    let now = SystemTime::now();
    let certificate = ca.issue(&identity(), DAY, now).unwrap();
    assert_eq!(certificate.identity(), &identity());
    let leaf = spiffe::parse(&certificate.chain()[0]).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 1);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any);
    assert!(!leaf.is_ca());
    let validity = certificate.validity();
    let back = now.duration_since(validity.not_before).unwrap();
    assert!((60..=61).contains(&back.as_secs()), "{back:?}");
    assert!(!validity.expired(now) && validity.expired(now + DAY));
}

#[test]
fn a_leaf_of_an_intermediate_leads_to_the_root_by_it_alone() {
    let now = SystemTime::now();
    let ca = DevCa::in_memory("cluster.local", now).unwrap();
    let intermediate = ca.intermediate(now).unwrap();
    assert_eq!(
        intermediate.roots().certificates(),
        ca.roots().certificates()
    );
    let certificate = intermediate.issue(&identity(), DAY, now).unwrap();
    let [leaf, above] = certificate.chain() else {
        panic!("{} certificates", certificate.chain().len());
    };
    let leaf = webpki::EndEntityCert::try_from(leaf).unwrap();
    let holds = |others: &[CertificateDer<'_>]| {
        let now = now.duration_since(UNIX_EPOCH).unwrap();
        leaf.verify_for_usage(
            rustls::crypto::aws_lc_rs::default_provider()
                .signature_verification_algorithms
                .all,
            &ca.roots().store().roots,
            others,
            rustls::pki_types::UnixTime::since_unix_epoch(now),
            webpki::KeyUsage::client_auth(),
            None,
            None,
        )
        .is_ok()
    };
    assert!(holds(std::slice::from_ref(above)));
    assert!(!holds(&[]));
}

#[test]
fn a_leaf_never_outlives_the_root() {
    let directory = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let ca = DevCa::open_at(directory.path(), "cluster.local", now).unwrap();
    let certificate = ca.issue(&identity(), DAY * 36_500, now).unwrap();
    assert_eq!(certificate.validity().not_after, ca.validity.not_after);
}

#[test]
fn an_identity_of_another_trust_domain_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let ca = DevCa::open(directory.path(), "other.example").unwrap();
    let error = ca.issue(&identity(), DAY, SystemTime::now()).unwrap_err();
    assert!(
        matches!(error, DevCaError::ForeignIdentity { .. }),
        "{error}"
    );
}

#[test]
fn times_that_no_certificate_can_carry_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let ca = DevCa::open(directory.path(), "cluster.local").unwrap();
    let error = ca
        .issue(&identity(), Duration::MAX, SystemTime::now())
        .unwrap_err();
    assert!(matches!(error, DevCaError::Time), "{error}");
    assert!(ca.issue(&identity(), DAY, UNIX_EPOCH).is_err());
}

#[test]
fn a_trust_domain_that_is_none_is_refused() {
    for name in ["", "a/b", "spaß", "a b"] {
        let directory = tempfile::tempdir().unwrap();
        let error = DevCa::open(directory.path(), name).unwrap_err();
        assert!(matches!(error, DevCaError::BadName(_)), "{name:?}: {error}");
    }
}

#[test]
fn a_file_of_another_trust_domain_is_named() {
    let directory = tempfile::tempdir().unwrap();
    DevCa::open(directory.path(), "cluster.local").unwrap();
    let error = DevCa::open(directory.path(), "other.example").unwrap_err();
    assert!(
        matches!(&error, DevCaError::TrustDomain { found, .. } if found == "cluster.local"),
        "{error}"
    );
}

#[test]
fn an_expired_root_is_not_used() {
    let directory = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    DevCa::open_at(directory.path(), "cluster.local", now).unwrap();
    let error = DevCa::open_at(directory.path(), "cluster.local", now + DAY * 3700).unwrap_err();
    assert!(matches!(error, DevCaError::RootExpired { .. }), "{error}");
}

#[test]
fn malformed_files_are_refused_with_what_is_wrong_and_left_as_they_are() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    DevCa::open(here.path(), "cluster.local").unwrap();
    DevCa::open(there.path(), "cluster.local").unwrap();
    let (good, other) = (read(here.path()), read(there.path()));
    let split = good.find("-----BEGIN PRIVATE KEY").unwrap();
    let other_split = other.find("-----BEGIN PRIVATE KEY").unwrap();
    let flipped = good.replacen("MII", "MIJ", 1);
    let cases = [
        (String::new(), "no certificate"),
        (good[split..].to_owned(), "no certificate"),
        (good[..split].to_owned(), "private key cannot be read"),
        (
            format!("{}{}", &good[..split], &other[other_split..]),
            "not the certificate's",
        ),
        (
            format!("{good}{}", &other[..other_split]),
            "more than one certificate",
        ),
        (good[..split / 2].to_owned(), "certificate cannot be read"),
        (flipped, "DER"),
        ("x".repeat(70_000), "too large"),
    ];
    for (text, expected) in cases {
        write(here.path(), &text);
        let error = DevCa::open(here.path(), "cluster.local").unwrap_err();
        assert!(
            matches!(error, DevCaError::Malformed { .. }),
            "{expected}: {error}"
        );
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert_eq!(read(here.path()), text);
    }
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    DevCa::open(directory.path(), "cluster.local").unwrap();
    fs::set_permissions(
        directory.path().join("dev-ca.pem"),
        fs::Permissions::from_mode(0o640),
    )
    .unwrap();
    let error = DevCa::open(directory.path(), "cluster.local").unwrap_err();
    assert!(error.to_string().contains("chmod 600"), "{error}");
}

#[test]
fn a_directory_that_others_may_write_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let error = DevCa::open(directory.path(), "cluster.local").unwrap_err();
    assert!(error.to_string().contains("chmod 700"), "{error}");
}

#[test]
fn a_symlink_is_not_followed() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    DevCa::open(there.path(), "cluster.local").unwrap();
    std::os::unix::fs::symlink(
        there.path().join("dev-ca.pem"),
        here.path().join("dev-ca.pem"),
    )
    .unwrap();
    let error = DevCa::open(here.path(), "cluster.local").unwrap_err();
    assert!(matches!(error, DevCaError::Io { .. }), "{error}");
}

#[test]
fn what_is_left_of_an_interrupted_start_does_not_matter() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("dev-ca.pem.new"), "half a ro").unwrap();
    DevCa::open(directory.path(), "cluster.local").unwrap();
}

#[test]
fn nothing_printed_holds_the_key() {
    let directory = tempfile::tempdir().unwrap();
    let ca = DevCa::open(directory.path(), "cluster.local").unwrap();
    let certificate = ca.issue(&identity(), DAY, SystemTime::now()).unwrap();
    let printed = format!("{ca:?} {certificate:?}");
    assert!(!printed.contains("key"), "{printed}");
}

#[test]
fn names_that_prove_nothing_are_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let ca = DevCa::open(directory.path(), "cluster.local").unwrap();
    let now = SystemTime::now();
    let validity = Validity {
        not_before: now,
        not_after: now + DAY,
    };
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let dns = SanType::DnsName("a.example".try_into().unwrap());
    let read = |names| spiffe::identity_of(&ca.issue_names(names, validity).unwrap().0);
    let good = "spiffe://cluster.local/ns/shop/sa/cart";
    assert_eq!(read(vec![uri(good)]), Ok(identity()));
    assert_eq!(read(vec![dns.clone(), uri(good)]), Ok(identity()));
    assert_eq!(read(vec![]), Err(spiffe::SpiffeError::UriCount(0)));
    assert_eq!(read(vec![dns]), Err(spiffe::SpiffeError::UriCount(0)));
    assert_eq!(
        read(vec![uri(good), uri(good)]),
        Err(spiffe::SpiffeError::UriCount(2))
    );
    for bad in [
        "https://a.example/",
        "spiffe://cluster.local",
        "spiffe://cluster.local/ns/shop/sa/cart/",
    ] {
        let result = read(vec![uri(bad)]);
        assert!(
            matches!(result, Err(spiffe::SpiffeError::NotAnIdentity { .. })),
            "{bad}: {result:?}"
        );
    }
    let long = format!("spiffe://cluster.local/ns/shop/sa/{}", "a".repeat(3000));
    assert_eq!(
        read(vec![uri(&long)]),
        Err(spiffe::SpiffeError::TooLong(long.len()))
    );
    assert!(matches!(
        spiffe::identity_of(&CertificateDer::from(vec![0x30, 0x84])),
        Err(spiffe::SpiffeError::NotX509(_))
    ));
}
