use super::*;

#[test]
fn addresses_are_https_with_a_port() {
    for (text, shown) in [
        (
            "https://istiod.istio-system.svc:15012",
            "https://istiod.istio-system.svc:15012",
        ),
        ("istiod:15012", "https://istiod:15012"),
        ("https://[fd00::1]:15012/", "https://[fd00::1]:15012"),
    ] {
        assert_eq!(Address::parse(text).unwrap().to_string(), shown);
    }
    for text in [
        "",
        "http://istiod:15012",
        "https://istiod",
        "https://istiod:0",
        "https://istiod:70000",
        "https://user@istiod:1",
        "https://istiod:15012/path",
        "https://:1",
    ] {
        assert!(Address::parse(text).is_err(), "{text}");
    }
}

#[test]
fn roots_are_a_path_or_system_or_pem() {
    assert_eq!(RootSource::parse("SYSTEM"), Some(RootSource::System));
    let ca = rcgen::generate_simple_self_signed([]).unwrap();
    assert!(matches!(
        RootSource::parse(&ca.cert.pem()),
        Some(RootSource::Pem(_))
    ));
    assert_eq!(RootSource::parse("-----BEGIN CERTIFICATE-----\n"), None);
    assert_eq!(
        RootSource::parse("./root.pem"),
        Some(RootSource::File("./root.pem".into()))
    );
    assert_eq!(RootSource::parse(""), None);
}

struct Token(Result<Option<String>, String>);

impl TokenSource for Token {
    fn token(&self) -> Result<Option<String>, String> {
        self.0.clone()
    }
}

fn channel(token: Result<Option<String>, String>, roots: &str) -> ControlChannel {
    ControlChannel {
        address: Address::parse("127.0.0.1:1").unwrap(),
        server_name: None,
        roots: RootSource::parse(roots).unwrap(),
        token: Arc::new(Token(token)),
        cluster_id: "Kubernetes".to_owned(),
        headers: vec![("X-One".to_owned(), "1".to_owned())].into(),
    }
}

#[tokio::test]
async fn a_call_shows_token_cluster_and_headers_and_hides_the_token_from_who_prints_it() {
    let metadata = channel(Ok(Some("secret".to_owned())), "SYSTEM")
        .metadata()
        .await
        .unwrap();
    assert_eq!(
        metadata.get("authorization").unwrap().to_str().unwrap(),
        "Bearer secret"
    );
    assert_eq!(
        metadata.get("clusterid").unwrap().to_str().unwrap(),
        "Kubernetes"
    );
    assert_eq!(metadata.get("x-one").unwrap().to_str().unwrap(), "1");
    assert!(!format!("{metadata:?}").contains("secret"));
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let unread = channel(Err("no such file".to_owned()), "SYSTEM");
    let error = unread.metadata().await.unwrap_err().to_string();
    assert!(
        error.contains("no such file") && error.contains("127.0.0.1:1"),
        "{error}"
    );
    let error = channel(Ok(None), "/nowhere/root.pem")
        .connect()
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/nowhere/root.pem") && error.contains("XDS_ROOT_CA"),
        "{error}"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    let pem = "-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----";
    std::fs::write(file.path(), pem).unwrap();
    let path = file.path().to_str().unwrap();
    let error = channel(Ok(None), path)
        .connect()
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(path) && error.contains("holds no roots"),
        "{error}"
    );
}
