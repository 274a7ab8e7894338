//! What the configuration promises, over its public functions.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use super::*;

const MOUNTS: &[u8] = b"31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                        33 25 0:29 / /sys/fs/bpf rw - bpf none rw\n";

fn environment(variables: &[(&str, &str)]) -> Environment {
    Environment {
        variables: variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), OsString::from(value)))
            .collect(),
        mountinfo: MOUNTS.to_vec(),
        hostname: "machine-1".to_owned(),
        cpus: 3,
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn flags(config: Option<&Path>, values: &[(&'static Setting, &str)]) -> Flags {
    Flags {
        config: config.map(Path::to_owned),
        values: values
            .iter()
            .map(|(setting, value)| (*setting, (*value).to_owned()))
            .collect(),
        in_place_of_ztunnel: false,
    }
}

fn errors(flags: &Flags, environment: &Environment) -> Vec<String> {
    let errors = Config::load(flags, environment).unwrap_err();
    errors.0.iter().map(ToString::to_string).collect()
}

#[test]
fn defaults_come_from_the_machine() {
    let config = Config::load(&Flags::default(), &environment(&[])).unwrap();
    assert_eq!(config.node_name, "machine-1");
    assert_eq!(config.cgroup_root, Path::new("/sys/fs/cgroup"));
    assert_eq!(config.pin_dir, Path::new("/sys/fs/bpf/culvert"));
    assert_eq!(config.threads, 3);
    assert_eq!(config.packet_mark, 1337);
    assert_eq!(config.secret_ttl, Duration::from_secs(86_400));
    assert_eq!(config.trust_domain, "cluster.local");
    assert_eq!(config.admin_socket, Path::new(DEFAULT_ADMIN_SOCKET));
}

#[test]
fn flags_win_over_environment_and_environment_over_file() {
    let file = file("nodeName: from-file\nnetwork: from-file\nclusterId: from-file\n");
    let env = environment(&[("NODE_NAME", "from-env"), ("NETWORK", "from-env")]);
    let flags = flags(Some(file.path()), &[(&settings::NODE_NAME, "from-flag")]);
    let config = Config::load(&flags, &env).unwrap();
    assert_eq!(config.node_name, "from-flag");
    assert_eq!(config.network, "from-env");
    assert_eq!(config.cluster_id, "from-file");
}

#[test]
fn the_short_circuit_is_off_auto_or_on_in_every_layer() {
    let file = file("shortCircuit: off\n");
    let in_file = flags(Some(file.path()), &[]);
    let by_flag = flags(Some(file.path()), &[(&settings::SHORT_CIRCUIT, "auto")]);
    let set = environment(&[("CULVERT_SHORT_CIRCUIT", "on")]);
    let mode = |flags: &Flags, environment: &Environment| {
        Config::load(flags, environment).unwrap().short_circuit
    };
    assert_eq!(
        mode(&Flags::default(), &environment(&[])),
        ShortCircuitMode::Auto
    );
    assert_eq!(mode(&in_file, &environment(&[])), ShortCircuitMode::Off);
    assert_eq!(mode(&in_file, &set), ShortCircuitMode::On);
    assert_eq!(mode(&by_flag, &set), ShortCircuitMode::Auto);
    // Ports are a matter of pods and namespaces.
    for wrong in ["true", "ON", "6379=on"] {
        let errors = errors(
            &Flags::default(),
            &environment(&[("CULVERT_SHORT_CIRCUIT", wrong)]),
        );
        let expected = format!(
            "shortCircuit: {wrong:?} (environment variable CULVERT_SHORT_CIRCUIT) is not valid: expected `off`, `auto` or `on`"
        );
        assert_eq!(errors, [expected]);
    }
}

#[test]
fn nothing_is_lenient_but_what_is_named() {
    let lenient = |file: &str, set: &[(&str, &str)]| {
        let file = self::file(file);
        let config = Config::load(&flags(Some(file.path()), &[]), &environment(set)).unwrap();
        config.lenient.iter().collect::<Vec<_>>()
    };
    assert_eq!(lenient("", &[]), []);
    assert_eq!(lenient("lenient: ''", &[]), []);
    for one in Leniency::ALL {
        assert_eq!(lenient("", &[("CULVERT_LENIENT", one.name())]), [one]);
        assert!(
            settings::LENIENT
                .expects
                .contains(&format!("`{}`", one.name()))
        );
    }
    let in_file = "lenient: authority, later-policies";
    let both = [Leniency::LaterPolicies, Leniency::Authority];
    assert_eq!(lenient(in_file, &[]), both);
    // The stronger layer says all of it.
    let set = [("CULVERT_LENIENT", "certificate-names")];
    assert_eq!(lenient(in_file, &set), [Leniency::CertificateNames]);
}

#[test]
fn a_word_that_names_no_leniency_is_an_error_that_says_what_does() {
    let set = [("CULVERT_LENIENT", "authority,all,Later-policies")];
    let errors = errors(&Flags::default(), &environment(&set));
    for (error, word) in errors.iter().zip(["all", "Later-policies"]) {
        let begins = format!(
            "lenient: {word:?} (environment variable CULVERT_LENIENT) is not valid: expected names separated by commas, out of `unknown-policies`"
        );
        assert!(error.starts_with(&begins), "{error}");
    }
    assert_eq!(errors.len(), 2);
}

#[test]
fn an_empty_variable_counts_as_unset() {
    let config = Config::load(&Flags::default(), &environment(&[("PACKET_MARK", "")])).unwrap();
    assert_eq!(config.packet_mark, 1337);
}

#[test]
fn a_packet_mark_that_no_rule_could_tell_apart_is_refused() {
    for mark in ["0", "0x1000", "4294967295", "0x53b", "1339"] {
        let errors = errors(&Flags::default(), &environment(&[("PACKET_MARK", mark)]));
        assert!(
            errors.iter().any(|error| error.starts_with("packetMark")),
            "{mark}: {errors:?}"
        );
    }
}

#[test]
fn all_errors_of_all_layers_are_reported_together() {
    let file = file("# a comment\nnodeNam: x\n  \npacketMark: zero\nsecretTtl: 24h\nthreads: 0\n");
    let mut env = environment(&[
        ("PACKET_MARK", "0"),
        ("LOG_FORMAT", "xml"),
        ("RUST_LOG", "info,=x=y"),
    ]);
    let bytes = OsString::from_vec(vec![0xff, 0xfe]);
    env.variables.insert("CLUSTER_ID".to_owned(), bytes);
    env.mountinfo.clear();
    let flags = flags(
        Some(file.path()),
        &[
            (&settings::ADMIN_ADDRESS, "0.0.0.0:15000"),
            (&settings::PACKET_MARK, "7"),
        ],
    );
    let errors = errors(&flags, &env);
    let at = |position: &str| format!("{}:{position}", file.path().display());
    for expected in [
        format!("\"nodeNam\" ({}) is not a setting; did you mean `nodeName`?", at("2:1")),
        format!("packetMark: \"zero\" ({}) is not valid: expected a number from 1", at("4:13")),
        format!("threads: \"0\" ({}) is not valid: expected a number from 1 to 1024", at("6:10")),
        "packetMark: \"0\" (environment variable PACKET_MARK)".to_owned(),
        "logFormat: \"xml\" (environment variable LOG_FORMAT) is not valid: expected `text` or `json`".to_owned(),
        "log: \"info,=x=y\" (environment variable RUST_LOG)".to_owned(),
        "clusterId: environment variable CLUSTER_ID is not Unicode".to_owned(),
        "adminAddress: \"0.0.0.0:15000\" (flag --admin-address) is not valid: expected a loopback".to_owned(),
        "cgroupRoot is not set and no cgroup v2 filesystem is mounted; mount one".to_owned(),
        "pinDir is not set and no bpf filesystem is mounted; mount one".to_owned(),
    ] {
        assert!(
            errors.iter().any(|error| error.starts_with(&expected)),
            "no `{expected}` in {errors:#?}"
        );
    }
    assert_eq!(errors.len(), 10, "{errors:#?}");
    let together = Config::load(&flags, &env).unwrap_err().to_string();
    assert!(together.starts_with("configuration: 10 errors\n  - "));
}

#[test]
fn a_broken_file_is_reported_with_its_position_beside_the_other_errors() {
    let file = file("nodeName: a\n  bad: [\n");
    let errors = errors(
        &flags(Some(file.path()), &[]),
        &environment(&[("THREADS", "x"), ("CULVERT_THREADS", "x")]),
    );
    assert_eq!(errors.len(), 2, "{errors:#?}");
    let start = format!("{}:", file.path().display());
    let position = errors[0].strip_prefix(&start).unwrap();
    assert!(position.starts_with(['1', '2', '3']), "{position}");
    assert!(!errors[0].contains('\n'));
}

#[test]
fn hostile_files_are_refused_not_followed() {
    let nested = "a: ".to_owned() + &"[".repeat(100_000);
    for text in [
        "- a\n- b\n",
        "nodeName: {a: b}\n",
        "nodeName: a\nnodeName: b\n",
        "just text",
        "\u{0}",
        "--- \nnodeName: a\n--- \nnodeName: b\n",
        nested.as_str(),
    ] {
        let file = file(text);
        let result = Config::load(&flags(Some(file.path()), &[]), &environment(&[]));
        assert!(result.is_err(), "{:?}", &text[..text.len().min(30)]);
    }
    let absent = Path::new("/nonexistent/culvert.yaml");
    assert!(errors(&flags(Some(absent), &[]), &environment(&[]))[0].contains("--config"));
    let directory = errors(&flags(Some(Path::new("/")), &[]), &environment(&[]));
    assert!(directory[0].contains("not a regular file"));
    let large = file(&"#".repeat(2 << 20));
    let errors = errors(&flags(Some(large.path()), &[]), &environment(&[]));
    assert!(errors[0].contains("larger than"), "{errors:?}");
}

#[test]
fn hostile_values_are_shown_escaped_and_shortened() {
    let value = "\u{1b}[31m\n".to_owned() + &"x".repeat(5000);
    let errors = errors(&Flags::default(), &environment(&[("CLUSTER_ID", &value)]));
    assert!(errors[0].len() < 300, "{}", errors[0]);
    assert!(!errors[0].contains(['\n', '\u{1b}']));
}

#[test]
fn the_printed_configuration_is_a_file_that_gives_the_same() {
    let env = environment(&[
        ("NODE_NAME", "1.10"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "1500ms"),
        ("INSTANCE_IP", "fd00::1"),
        ("LOCAL_XDS_PATH", "/etc/a \"b\": #c.yaml"),
        ("LOG_FORMAT", "json"),
        ("CRL_PATH", "/etc/crl.pem"),
        ("SECRET_TTL", "1h30m"),
        ("IPV6_ENABLED", "false"),
        ("ENABLE_ORIG_SRC", "false"),
    ]);
    let config = Config::load(&Flags::default(), &env).unwrap();
    let printed = file(&config.to_yaml());
    let bare = Environment::default();
    let again = Config::load(&flags(Some(printed.path()), &[]), &bare).unwrap();
    assert_eq!(again, config);
}

#[test]
fn a_mesh_that_is_given_as_text_is_printed_so_that_it_can_be_read_again() {
    let mesh = "workloads:\n- uid: \"a\"\n  name: a # one\n";
    let env = environment(&[("LOCAL_XDS", mesh)]);
    let config = Config::load(&Flags::default(), &env).unwrap();
    let printed = file(&config.to_yaml());
    let flags = flags(Some(printed.path()), &[]);
    let again = Config::load(&flags, &Environment::default()).unwrap();
    assert_eq!(again.local_xds.as_deref(), Some(mesh));
}

#[test]
fn an_unquoted_value_keeps_its_spelling() {
    let file = file("nodeName: 1.10\nnetwork: 0x10\nclusterId: true\npacketMark: 0x539\n");
    let config = Config::load(&flags(Some(file.path()), &[]), &environment(&[])).unwrap();
    assert_eq!(config.node_name, "1.10");
    assert_eq!(config.network, "0x10");
    assert_eq!(config.cluster_id, "true");
    assert_eq!(config.packet_mark, 1337);
}

#[test]
fn every_setting_is_used_and_printed() {
    let printed = |more: &[(&str, &str)]| {
        let some = [
            ("INSTANCE_IP", "10.0.0.1"),
            ("INPOD_UDS", "/run/ztunnel.sock"),
            ("CULVERT_PODS_CGROUP", "/sys/fs/cgroup/kubepods"),
        ];
        let env = environment(&[&some, more].concat());
        Config::load(&Flags::default(), &env).unwrap().to_yaml()
    };
    let on_a_laptop = [("LOCAL_XDS_PATH", "mesh.yaml"), ("CULVERT_DEV_CA", "ca")];
    let inline = [("LOCAL_XDS", "workloads: []"), ("CRL_PATH", "crl.pem")];
    let in_a_cluster = [
        ("XDS_ADDRESS", "istiod:15012"),
        ("ALT_XDS_HOSTNAME", "istiod"),
        ("CA_ADDRESS", "istiod:15012"),
        ("ALT_CA_HOSTNAME", "istiod"),
        ("CULVERT_ANNOTATIONS_PATH", "annotations.yaml"),
    ];
    let yaml = printed(&on_a_laptop) + &printed(&inline) + &printed(&in_a_cluster);
    for setting in settings::ALL {
        if setting.key != settings::TEST_KNOBS.key {
            assert!(
                yaml.contains(&format!("{}: ", setting.key)),
                "{}",
                setting.key
            );
        }
        // A value nothing takes is refused by each setting, except the free-form ones.
        let free = [
            "authToken",
            "localXdsPath",
            "localXds",
            "annotationsPath",
            "crlPath",
            "devCa",
        ];
        let free = free.contains(&setting.key);
        let env = environment(&[(setting.variable, "\u{1}")]);
        let refused = Config::load(&Flags::default(), &env).is_err();
        assert!(refused || free, "{}", setting.key);
    }
    let mut keys: Vec<_> = settings::ALL.iter().map(|s| s.variable).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), settings::ALL.len());
}

#[test]
fn a_token_is_never_shown() {
    let token = "eyJhbGciOiJSUzI1NiJ9.c2VjcmV0.c2ln";
    let config = Config::load(&Flags::default(), &environment(&[("AUTH_TOKEN", token)])).unwrap();
    assert_eq!(config.auth_token, AuthToken::Inline(token.to_owned()));
    assert!(config.to_yaml().contains("authToken: \"<set>\""));
    assert!(!config.to_yaml().contains("eyJ"));
    assert!(!format!("{config:?}").contains("eyJ"));
    let errors = errors(&Flags::default(), &environment(&[("AUTH_TOKEN", "eyJ\n")]));
    assert!(!errors[0].contains("eyJ"), "{}", errors[0]);
    let path = environment(&[("AUTH_TOKEN", "/var/run/token")]);
    let config = Config::load(&Flags::default(), &path).unwrap();
    assert!(config.to_yaml().contains("authToken: \"/var/run/token\""));
}

#[test]
fn durations_are_read_in_all_their_forms() {
    for (text, seconds) in [
        ("86400s", 86_400),
        ("24h", 86_400),
        ("86400", 86_400),
        ("1h30m", 5400),
        ("1d", 86_400),
        ("0", 0),
    ] {
        assert_eq!(duration(text), Some(Duration::from_secs(seconds)), "{text}");
    }
    assert_eq!(duration("1500ms"), Some(Duration::from_millis(1500)));
    for text in [
        "",
        "s",
        "-1s",
        "+1s",
        "1.5h",
        "1 h",
        "1y",
        "1s2",
        "99999999999999999999",
        "18446744073709551615d",
        "ß",
        "1ß",
    ] {
        assert_eq!(duration(text), None, "{text}");
    }
}

#[cfg(not(feature = "test-knobs"))]
#[test]
fn a_build_without_knobs_refuses_them() {
    let errors = errors(
        &Flags::default(),
        &environment(&[("CULVERT_TEST_KNOBS", "skip-claims")]),
    );
    assert!(errors[0].contains("this build has no test knobs"));
    assert!(errors[0].contains("CULVERT_TEST_KNOBS"));
}

#[cfg(feature = "test-knobs")]
#[test]
fn a_build_for_tests_takes_knobs() {
    let env = environment(&[("CULVERT_TEST_KNOBS", "skip-claims, no_generation")]);
    let config = Config::load(&Flags::default(), &env).unwrap();
    assert_eq!(config.test_knobs, ["skip-claims", "no_generation"]);
    for bad in ["a,,b", ",", "A"] {
        let env = environment(&[("CULVERT_TEST_KNOBS", bad)]);
        assert!(Config::load(&Flags::default(), &env).is_err(), "{bad}");
    }
}

#[test]
fn clients_find_the_socket_by_flag_variable_or_default() {
    let env = environment(&[("CULVERT_ADMIN_SOCKET", "/run/env.sock")]);
    assert_eq!(
        admin_socket(Some("/run/flag.sock"), &env).unwrap(),
        Path::new("/run/flag.sock")
    );
    assert_eq!(
        admin_socket(None, &env).unwrap(),
        Path::new("/run/env.sock")
    );
    assert_eq!(
        admin_socket(None, &environment(&[])).unwrap(),
        Path::new(DEFAULT_ADMIN_SOCKET)
    );
    assert!(admin_socket(Some(&"/x".repeat(60)), &env).is_err());
    assert_eq!(
        pin_dir(None, &env).unwrap(),
        Path::new("/sys/fs/bpf/culvert")
    );
    let bare = Environment::default();
    assert!(
        pin_dir(None, &bare)
            .unwrap_err()
            .to_string()
            .contains("mount -t bpf")
    );
}

/// What Istio's chart sets for ztunnel, and what Kubernetes adds.
const OF_ZTUNNEL: [(&str, &str); 15] = [
    ("CA_ADDRESS", "istiod.istio-system.svc:15012"),
    ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
    ("RUST_LOG", "info"),
    ("LOG_FORMAT", "json"),
    ("RUST_BACKTRACE", "1"),
    ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
    ("INPOD_ENABLED", "true"),
    ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
    ("POD_NAME", "ztunnel-x7z2p"),
    ("POD_NAMESPACE", "istio-system"),
    ("NODE_NAME", "node-1"),
    ("INSTANCE_IP", "10.0.0.9"),
    ("SERVICE_ACCOUNT", "ztunnel"),
    ("ISTIO_META_ENABLE_HBONE", "true"),
    ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
];

#[test]
fn ztunnels_environment_is_understood() {
    let as_ztunnel = Flags {
        in_place_of_ztunnel: true,
        ..Flags::default()
    };
    let config = Config::load(&as_ztunnel, &environment(&OF_ZTUNNEL)).unwrap();
    let shown = config.to_json();
    for (key, value) in [
        ("xdsAddress", "https://istiod.istio-system.svc:15012"),
        ("caAddress", "https://istiod.istio-system.svc:15012"),
        ("xdsRootCa", "./var/run/secrets/istio/root-cert.pem"),
        ("authToken", "./var/run/secrets/tokens/istio-token"),
        ("inpodUds", "/var/run/ztunnel/ztunnel.sock"),
        ("nodeName", "node-1"),
        ("clusterDomain", "cluster.local"),
        ("secretTtl", "86400s"),
        ("terminationGracePeriodSeconds", "30s"),
    ] {
        assert_eq!(shown[key], value, "{key}");
    }
    assert_eq!(config.packet_mark, 1337);
    assert_eq!(config.pool_max_streams, 100);
    let metadata = &config.node_metadata;
    assert_eq!(metadata["CLUSTER_ID"], "Kubernetes");
    assert_eq!(metadata["ENABLE_HBONE"], "true");
    // Started as itself, the agent enrols what an operator says.
    let as_itself = Config::load(&Flags::default(), &environment(&OF_ZTUNNEL)).unwrap();
    assert_eq!(as_itself.inpod_uds, None);
}

#[test]
fn the_cluster_is_the_one_that_istio_s_chart_names() {
    let both = environment(&[
        ("CLUSTER_ID", "mine"),
        ("ISTIO_META_CLUSTER_ID", "cluster-7"),
    ]);
    let config = Config::load(&Flags::default(), &both).unwrap();
    assert_eq!(config.cluster_id, "cluster-7");
    let flags = Flags {
        values: vec![(&settings::CLUSTER_ID, "by-flag".to_owned())],
        ..Flags::default()
    };
    let config = Config::load(&flags, &both).unwrap();
    assert_eq!(config.cluster_id, "by-flag");
    let wrong = environment(&[("ISTIO_META_CLUSTER_ID", "not a name")]);
    let errors = errors(&Flags::default(), &wrong);
    assert!(
        errors.len() == 1 && errors[0].contains("ISTIO_META_CLUSTER_ID"),
        "{errors:?}"
    );
}

#[test]
fn in_a_cluster_the_control_plane_is_istiod() {
    let inside = environment(&[("KUBERNETES_SERVICE_HOST", "10.96.0.1")]);
    let config = Config::load(&Flags::default(), &inside).unwrap();
    let istiod = "https://istiod.istio-system.svc:15012";
    let shown = |address: &Option<Address>| address.as_ref().map(ToString::to_string);
    assert_eq!(shown(&config.xds_address).as_deref(), Some(istiod));
    assert_eq!(shown(&config.ca_address).as_deref(), Some(istiod));
    let outside = Config::load(&Flags::default(), &environment(&[])).unwrap();
    assert_eq!((outside.xds_address, outside.ca_address), (None, None));
}

#[test]
fn of_two_sources_one_has_to_be_chosen() {
    let both = environment(&[
        ("LOCAL_XDS_PATH", "/mesh.yaml"),
        ("XDS_ADDRESS", "istiod:15012"),
        ("CULVERT_DEV_CA", "/ca"),
        ("CA_ADDRESS", "istiod:15012"),
        ("CULVERT_ANNOTATIONS_PATH", "/annotations.yaml"),
    ]);
    let found = errors(&Flags::default(), &both);
    assert_eq!(found.len(), 3, "{found:?}");
    for (error, names) in found.iter().zip([
        ["LOCAL_XDS_PATH", "CULVERT_ANNOTATIONS_PATH"],
        ["LOCAL_XDS_PATH", "XDS_ADDRESS"],
        ["CULVERT_DEV_CA", "CA_ADDRESS"],
    ]) {
        assert!(names.iter().all(|name| error.contains(name)), "{error}");
    }
    for (one, other) in [
        ("LOCAL_XDS_PATH", "LOCAL_XDS"),
        ("LOCAL_XDS", "XDS_ADDRESS"),
    ] {
        let both = environment(&[(one, "/mesh.yaml"), (other, "istiod:15012")]);
        let found = errors(&Flags::default(), &both);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(
            found[0].contains(one) && found[0].contains(other),
            "{found:?}"
        );
    }
    // In a cluster a file wins over the control plane that nobody has named.
    let file = environment(&[
        ("LOCAL_XDS_PATH", "/mesh.yaml"),
        ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
    ]);
    let config = Config::load(&Flags::default(), &file).unwrap();
    assert_eq!(config.xds_address, None);
}

#[test]
fn headers_for_the_control_plane_are_not_shown() {
    let env = environment(&[
        ("XDS_HEADER_X-KEY", "secret-one"),
        ("CA_HEADER_X-KEY", "secret-two"),
        ("AUTH_TOKEN", "secret-three"),
    ]);
    let config = Config::load(&Flags::default(), &env).unwrap();
    let one = Headers::from(vec![("X-KEY".to_owned(), "secret-one".to_owned())]);
    assert_eq!(config.xds_headers, one);
    assert_eq!(config.ca_headers.iter().count(), 1);
    for shown in [
        config.to_yaml(),
        config.to_json().to_string(),
        format!("{config:?} {config:#?}"),
        format!("{env:?}"),
    ] {
        assert!(!shown.contains("secret-"), "{shown}");
    }
    // The same search finds what is no secret.
    assert!(format!("{config:?}").contains("X-KEY"));
}

#[test]
fn wrong_values_of_ztunnels_variables_are_named() {
    for (name, value) in [
        ("XDS_ADDRESS", "http://istiod:15010"),
        ("CA_ADDRESS", "istiod"),
        ("ALT_XDS_HOSTNAME", "not a name"),
        ("XDS_ON_DEMAND", "maybe"),
        ("INSTANCE_IP", "node"),
        ("SECRET_TTL", "-1"),
        ("INPOD_UDS", "relative.sock"),
        ("XDS_HEADER_NOT A NAME", "value"),
        ("XDS_HEADER_X-KEY", "no\nvalue"),
        ("CA_HEADER_X-KEY", "\u{7f}"),
        ("XDS_ROOT_CA", "-----BEGIN CERTIFICATE-----\nnone"),
        (
            "CA_ROOT_CA",
            "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----",
        ),
        ("POOL_MAX_STREAMS_PER_CONNECTION", "0"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "soon"),
        ("IPV6_ENABLED", "6"),
        ("ENABLE_ORIG_SRC", "perhaps"),
    ] {
        let errors = errors(&Flags::default(), &environment(&[(name, value)]));
        assert!(
            errors.len() == 1 && errors[0].contains(name),
            "{name}: {errors:?}"
        );
    }
}
