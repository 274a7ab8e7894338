//! Lists as they come in files, and chains that are on them, at any height.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber,
};
use rustls::pki_types::UnixTime;
use tokio_util::sync::CancellationToken;

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority_params(name: &str, serial: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(SerialNumber::from(serial));
    params
}

fn authority(name: &str, serial: u64, above: Option<&Authority>) -> Authority {
    let params = authority_params(name, serial);
    let key = KeyPair::generate().unwrap();
    match above {
        Some(above) => CertifiedIssuer::signed_by(params, key, above).unwrap(),
        None => CertifiedIssuer::self_signed(params, key).unwrap(),
    }
}

fn leaf(serial: u64, issuer: &Authority) -> CertificateDer<'static> {
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from(serial));
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    let key = KeyPair::generate().unwrap();
    let signed = params.signed_by(&key, issuer).unwrap();
    signed.der().clone()
}

fn list_until(next_update: SystemTime, issuer: &Authority, serials: &[u64]) -> String {
    let revoked = serials.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: (SystemTime::now() - DAY).into(),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: (next_update - 2 * DAY).into(),
        next_update: next_update.into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(issuer).unwrap().pem().unwrap()
}

fn list(issuer: &Authority, serials: &[u64]) -> String {
    list_until(SystemTime::now() + DAY, issuer, serials)
}

fn lists(pem: &[String]) -> RevocationLists {
    RevocationLists::parse(pem.concat().as_bytes()).unwrap()
}

fn der(authority: &Authority) -> CertificateDer<'static> {
    authority.der().clone()
}

fn roots(authorities: &[&Authority]) -> RootCertStore {
    let mut store = RootCertStore::empty();
    for authority in authorities {
        store.add(der(authority)).unwrap();
    }
    store
}

/// What the lists say of a chain; the other way of asking must agree.
fn judged(
    lists: &RevocationLists,
    chain: &[CertificateDer<'_>],
    roots: &RootCertStore,
) -> Result<(), webpki::Error> {
    let (first, others) = chain.split_first().unwrap();
    let first = EndEntityCert::try_from(first).unwrap();
    let usage = KeyUsage::client_auth();
    let verdict = lists.verify(&first, others, roots, UnixTime::now(), usage);
    let revoked = lists.revoke(chain, roots, SystemTime::now());
    assert_eq!(revoked, verdict == Err(webpki::Error::CertRevoked));
    verdict
}

const REVOKED: Result<(), webpki::Error> = Err(webpki::Error::CertRevoked);

/// root (1) -> middle (2) -> low (3) -> leaf (4)
struct Tree {
    root: Authority,
    middle: Authority,
    low: Authority,
    chain: Vec<CertificateDer<'static>>,
}

fn tree_named(names: [&str; 3]) -> Tree {
    let root = authority(names[0], 1, None);
    let middle = authority(names[1], 2, Some(&root));
    let low = authority(names[2], 3, Some(&middle));
    let chain = vec![leaf(4, &low), der(&low), der(&middle)];
    Tree {
        root,
        middle,
        low,
        chain,
    }
}

fn tree() -> Tree {
    tree_named(["root", "middle", "low"])
}

#[test]
fn every_certificate_of_a_chain_is_looked_at() {
    let tree = tree();
    let roots = roots(&[&tree.root]);
    for (what, list, verdict) in [
        ("no list", String::new(), Ok(())),
        (
            "empty lists",
            list(&tree.low, &[]) + &list(&tree.root, &[]),
            Ok(()),
        ),
        (
            "others",
            list(&tree.low, &[5, 6]) + &list(&tree.middle, &[4]),
            Ok(()),
        ),
        ("the leaf", list(&tree.low, &[5, 4]), REVOKED),
        ("the authority below", list(&tree.middle, &[3]), REVOKED),
        ("the authority above", list(&tree.root, &[2]), REVOKED),
        (
            "the authority above, in the last of several lists",
            list(&tree.low, &[]) + &list(&tree.middle, &[9]) + &list(&tree.root, &[2]),
            REVOKED,
        ),
    ] {
        assert_eq!(
            judged(&lists(&[list]), &tree.chain, &roots),
            verdict,
            "{what}"
        );
    }
}

#[test]
fn a_list_of_an_issuer_that_nobody_knows_says_nothing() {
    let tree = tree();
    let stranger = authority("stranger", 1, None);
    let strange = lists(&[list(&stranger, &[1, 2, 3, 4])]);
    assert_eq!(judged(&strange, &tree.chain, &roots(&[&tree.root])), Ok(()));
}

#[test]
fn a_list_with_an_issuers_name_but_not_its_signature_says_nothing() {
    let tree = tree();
    let other = tree_named(["root", "middle", "low"]);
    let roots = roots(&[&tree.root, &other.root]);
    for forged in [
        list(&other.low, &[4]),
        list(&other.middle, &[3]),
        list(&other.root, &[2]),
    ] {
        let forged_only = lists(std::slice::from_ref(&forged));
        assert_eq!(judged(&forged_only, &tree.chain, &roots), Ok(()));
        // It does not hide the true one, wherever it stands.
        let genuine = list(&tree.low, &[4]);
        for both in [[forged.clone(), genuine.clone()], [genuine, forged]] {
            assert_eq!(judged(&lists(&both), &tree.chain, &roots), REVOKED);
        }
    }
}

#[test]
fn authorities_of_one_name_are_told_apart_by_their_keys() {
    let tree = tree_named(["mesh", "mesh", "mesh"]);
    let roots = roots(&[&tree.root]);
    for (list, verdict) in [
        (list(&tree.low, &[4]), REVOKED),
        (list(&tree.middle, &[3]), REVOKED),
        (list(&tree.root, &[2]), REVOKED),
        (list(&tree.root, &[3, 4]), Ok(())),
        (list(&tree.middle, &[2, 4]), Ok(())),
        (list(&tree.low, &[2, 3]), Ok(())),
    ] {
        assert_eq!(judged(&lists(&[list]), &tree.chain, &roots), verdict);
    }
}

#[test]
fn of_several_lists_of_one_issuer_each_counts() {
    let tree = tree();
    let roots = roots(&[&tree.root]);
    let (with, without) = (list(&tree.low, &[4]), list(&tree.low, &[5]));
    for both in [[with.clone(), without.clone()], [without, with]] {
        assert_eq!(judged(&lists(&both), &tree.chain, &roots), REVOKED);
    }
}

/// Two roots vouch for one authority, and both have revoked that: there is always one list that does not name the way taken.
#[test]
fn a_second_way_to_a_root_does_not_help_when_both_are_revoked() {
    let (one, other) = (authority("one", 1, None), authority("other", 1, None));
    let middle = authority("middle", 2, Some(&one));
    let again = authority_params("middle", 2);
    let key = KeyPair::from_pem(&middle.key().serialize_pem()).unwrap();
    let again = CertifiedIssuer::signed_by(again, key, &other).unwrap();
    let chain = [leaf(4, &middle), der(&middle), der(&again)];
    let roots = roots(&[&one, &other]);
    let (first, second) = (list(&one, &[2]), list(&other, &[2]));
    assert_eq!(
        judged(&lists(std::slice::from_ref(&first)), &chain, &roots),
        Ok(())
    );
    assert_eq!(
        judged(&lists(std::slice::from_ref(&second)), &chain, &roots),
        Ok(())
    );
    assert_eq!(judged(&lists(&[first, second]), &chain, &roots), REVOKED);
}

/// The authority has another certificate, which has expired: the worse error of the two ways is not the revocation.
#[test]
fn a_way_that_does_not_hold_hides_no_revocation() {
    let root = authority("root", 1, None);
    let middle = authority("middle", 2, Some(&root));
    let mut expired = authority_params("middle", 3);
    expired.not_before = (SystemTime::now() - 2 * DAY).into();
    expired.not_after = (SystemTime::now() - DAY).into();
    let key = KeyPair::from_pem(&middle.key().serialize_pem()).unwrap();
    let expired = CertifiedIssuer::signed_by(expired, key, &root).unwrap();
    let roots = roots(&[&root]);
    let chain = [leaf(4, &middle), der(&expired), der(&middle)];
    let revoking = lists(&[list(&middle, &[4])]);
    assert!(revoking.revoke(&chain, &roots, SystemTime::now()));
    assert!(!lists(&[list(&middle, &[5])]).revoke(&chain, &roots, SystemTime::now()));
}

#[test]
fn a_list_past_its_next_update_goes_on_to_count_and_is_named() {
    let tree = tree();
    let old = list_until(SystemTime::now() - DAY, &tree.low, &[4]);
    let old = lists(&[old, list(&tree.root, &[])]);
    assert_eq!(judged(&old, &tree.chain, &roots(&[&tree.root])), REVOKED);
    let overdue: Vec<_> = old.overdue(SystemTime::now()).collect();
    assert_eq!(overdue.len(), 1);
    assert!(overdue[0].contains("CN=low"), "{overdue:?}");
    assert_eq!(old.overdue(SystemTime::now() - 2 * DAY).count(), 0);
}

#[test]
fn what_does_not_hold_at_all_is_told_as_that() {
    let tree = tree();
    let stranger = authority("stranger", 1, None);
    let lists = lists(&[list(&tree.low, &[4])]);
    let verdict = judged(&lists, &tree.chain, &roots(&[&stranger]));
    assert_eq!(verdict, Err(webpki::Error::UnknownIssuer));
    assert!(!lists.revoke(&[], &roots(&[&tree.root]), SystemTime::now()));
}

#[test]
fn lists_are_read_as_pem_among_other_things_and_as_der() {
    let tree = tree();
    let pem = list(&tree.low, &[4, 5]);
    let among = format!(
        "# ours\n{}\n{pem}\n{}",
        tree.root.pem(),
        list(&tree.root, &[])
    );
    let read = RevocationLists::parse(among.as_bytes()).unwrap();
    assert_eq!((read.count(), read.certificates()), (2, 2));
    let der = CertificateRevocationListDer::from_pem_slice(pem.as_bytes()).unwrap();
    let read = RevocationLists::parse(&der).unwrap();
    assert_eq!((read.count(), read.certificates()), (1, 2));
    let padded = [&der[..], b"\n"].concat();
    assert!(matches!(
        RevocationLists::parse(&padded),
        Err(MalformedCrl::List { position: 1, .. })
    ));
    for nothing in ["", " \n\t\r\n"] {
        assert!(
            RevocationLists::parse(nothing.as_bytes())
                .unwrap()
                .is_empty()
        );
    }
}

#[test]
fn what_is_no_list_is_refused_whole() {
    let tree = tree();
    let good = list(&tree.low, &[4]);
    let garbled = good.replacen("MII", "MIJ", 1).replacen("MIH", "MIJ", 1);
    for (content, error) in [
        ("garbage".to_owned(), MalformedCrl::NoList),
        (tree.root.pem(), MalformedCrl::NoList),
    ] {
        assert_eq!(
            RevocationLists::parse(content.as_bytes()).unwrap_err(),
            error
        );
    }
    for bad in [
        "-----BEGIN X509 CRL-----\nMIIB\n-----END X509 CRL-----\n".to_owned(),
        "-----BEGIN X509 CRL-----\nMII".to_owned(),
        "-----BEGIN X509 CRL-----\n\u{0}\n-----END X509 CRL-----\n".to_owned(),
        garbled,
    ] {
        assert!(RevocationLists::parse(bad.as_bytes()).is_err(), "{bad}");
        assert!(
            RevocationLists::parse((good.clone() + &bad).as_bytes()).is_err(),
            "{bad}"
        );
    }
}

#[test]
fn no_more_lists_are_read_than_a_mesh_can_have() {
    let tree = tree();
    let one = list(&tree.low, &[4]);
    let most = RevocationLists::parse(one.repeat(MOST_LISTS).as_bytes()).unwrap();
    assert_eq!(most.count(), MOST_LISTS);
    assert_eq!(
        RevocationLists::parse(one.repeat(MOST_LISTS + 1).as_bytes()).unwrap_err(),
        MalformedCrl::TooMany
    );
}

proptest! {
    #[test]
    fn no_content_makes_it_panic(content: Vec<u8>, der in any::<bool>()) {
        let head: &[u8] = if der { &[0x30, 0x82] } else { b"-----BEGIN X509 CRL-----\n" };
        let _ = RevocationLists::parse(&[head, &content].concat());
    }

    #[test]
    fn a_list_with_a_changed_byte_names_nobody_new(at in 0usize..400, byte: u8) {
        let tree = tree();
        let pem = list(&tree.low, &[5]);
        let mut changed = CertificateRevocationListDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec();
        let at = at % changed.len();
        changed[at] = byte;
        if let Ok(lists) = RevocationLists::parse(&changed) {
            prop_assert_ne!(judged(&lists, &tree.chain, &roots(&[&tree.root])), REVOKED);
        }
    }
}

mod followed {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::watched_file::{FileWatcher, Told};

    const SOON: Duration = Duration::from_secs(20);

    struct Case {
        path: PathBuf,
        revocations: Revocations,
        tree: Tree,
        _directory: tempfile::TempDir,
    }

    impl Case {
        fn new(content: Option<&[u8]>) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("crl.pem");
            if let Some(content) = content {
                fs::write(&path, content).unwrap();
            }
            Self {
                path,
                revocations: Revocations::new(RevocationLists::default()),
                tree: tree(),
                _directory: directory,
            }
        }

        fn open(&self) -> Result<(FileWatcher<CrlFile>, Told<CrlFile>), CrlFileError> {
            CrlFile::open(&self.path, self.revocations.clone())
        }

        fn write(&self, serials: &[u64]) {
            fs::write(&self.path, list(&self.tree.low, serials)).unwrap();
        }

        fn revokes(&self) -> bool {
            let roots = roots(&[&self.tree.root]);
            let lists = self.revocations.current();
            lists.revoke(&self.tree.chain, &roots, SystemTime::now())
        }
    }

    #[tokio::test]
    async fn what_is_wrong_at_the_start_is_an_error_that_says_what_to_do() {
        let huge = vec![b' '; (16 << 20) + 1];
        for (content, words) in [
            (&b"garbage"[..], "holds no revocation list"),
            (&huge, "larger than 16777216 bytes"),
        ] {
            let case = Case::new(Some(content));
            let error = case.open().unwrap_err().to_string();
            for word in ["CRL_PATH", "crl.pem", words] {
                assert!(error.contains(word), "{error}");
            }
        }
        let case = Case::new(None);
        fs::create_dir(&case.path).unwrap();
        let error = case.open().unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }

    #[tokio::test]
    async fn a_file_is_in_force_from_the_start_and_followed() {
        let case = Case::new(None);
        case.write(&[4]);
        let (file, mut status) = case.open().unwrap();
        assert!(case.revokes());
        assert!(status.borrow().error.is_none());
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(file.run(shutdown.clone()));
        let mut news = case.revocations.subscribe().unwrap();
        case.write(&[5]);
        let gone = news.wait_for(|_| !case.revokes());
        tokio::time::timeout(SOON, gone).await.unwrap().unwrap();

        // What is of no use leaves them as they are, whatever it is.
        case.write(&[4]);
        let back = news.wait_for(|_| case.revokes());
        tokio::time::timeout(SOON, back).await.unwrap().unwrap();
        for bad in [&b"garbage"[..], b"", b"\n\n", b"-----BEGIN X509 CRL-----\n"] {
            fs::write(&case.path, bad).unwrap();
            let told = status.wait_for(|status| status.error.is_some());
            tokio::time::timeout(SOON, told).await.unwrap().unwrap();
            assert!(case.revokes());
            case.write(&[4]);
            let mended = status.wait_for(|status| status.error.is_none());
            tokio::time::timeout(SOON, mended).await.unwrap().unwrap();
        }
        fs::remove_file(&case.path).unwrap();
        let told = status.wait_for(|status| status.error.is_some());
        tokio::time::timeout(SOON, told).await.unwrap().unwrap();
        assert!(case.revokes());
        assert!(case.revocations.counts().rejected >= 5);
        shutdown.cancel();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_file_may_come_later() {
        let case = Case::new(None);
        let (file, mut status) = case.open().unwrap();
        let shutdown = CancellationToken::new();
        let _guard = shutdown.clone().drop_guard();
        tokio::spawn(file.run(shutdown));
        let told = status.wait_for(|status| status.error.is_some());
        let told = tokio::time::timeout(SOON, told).await.unwrap().unwrap();
        let error = told.error.as_ref().unwrap().to_string();
        drop(told);
        assert!(error.contains("CRL_PATH: cannot read"), "{error}");
        let mut news = case.revocations.subscribe().unwrap();
        case.write(&[4]);
        let came = news.wait_for(|_| case.revokes());
        tokio::time::timeout(SOON, came).await.unwrap().unwrap();
    }
}
