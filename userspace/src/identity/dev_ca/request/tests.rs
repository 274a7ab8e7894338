//! Requests that the development CA must not believe.

use rcgen::{
    CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
    SanType, SignatureAlgorithm,
};

use super::*;

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn uri(name: &str) -> SanType {
    SanType::URI(name.try_into().unwrap())
}

fn request(names: Vec<SanType>, algorithm: &'static SignatureAlgorithm) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    let key = KeyPair::generate_for(algorithm).unwrap();
    params.serialize_request(&key).unwrap().der().to_vec()
}

fn read(der: &[u8]) -> Result<SigningRequest, RequestError> {
    SigningRequest::from_pem(&pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der)))
}

#[test]
fn a_request_names_its_identity() {
    let request = read(&request(vec![uri(CART)], &PKCS_ECDSA_P256_SHA256)).unwrap();
    assert_eq!(request.identity().to_string(), CART);
}

#[test]
fn a_request_for_other_names_than_one_identity_is_refused() {
    let dns = SanType::DnsName("cart.shop".try_into().unwrap());
    for (names, error) in [
        (vec![], RequestError::Names(0)),
        (vec![dns.clone()], RequestError::Names(1)),
        (vec![uri(CART), dns], RequestError::Names(2)),
        (vec![uri(CART), uri(CART)], RequestError::Names(2)),
        (
            vec![uri("https://cart")],
            RequestError::Identity("https://cart".to_owned()),
        ),
    ] {
        let outcome = read(&request(names, &PKCS_ECDSA_P256_SHA256));
        assert_eq!(outcome.map(drop), Err(error));
    }
}

#[test]
fn a_request_with_another_kind_of_key_is_refused() {
    let outcome = read(&request(vec![uri(CART)], &PKCS_ECDSA_P384_SHA384));
    assert_eq!(outcome.map(drop), Err(RequestError::Key));
}

/// The algorithm of the signature, ecdsa-with-SHA256, in DER. What is before it is signed.
const ALGORITHM: &[u8] = &[48, 10, 6, 8, 42, 134, 72, 206, 61, 4, 3, 2];

fn position(of: &[u8], within: &[u8]) -> usize {
    let mut windows = within.windows(of.len());
    windows.position(|window| window == of).unwrap()
}

#[test]
fn a_request_that_was_changed_is_refused_wherever_that_was() {
    let whole = request(vec![uri(CART)], &PKCS_ECDSA_P256_SHA256);
    let mut renamed = whole.clone();
    renamed[position(CART.as_bytes(), &whole) + CART.len() - 1] ^= 1;
    assert_eq!(read(&renamed).map(drop), Err(RequestError::Signature));
    for changed in 0..position(ALGORITHM, &whole) {
        let mut request = whole.clone();
        request[changed] ^= 1;
        assert!(read(&request).is_err(), "byte {changed}");
    }
    for length in 0..whole.len() {
        assert!(read(&whole[..length]).is_err(), "{length} bytes");
    }
    let longer = [whole.as_slice(), b"x"].concat();
    assert!(read(&longer).is_err());
}
