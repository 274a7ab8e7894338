//! The list of settings: name in the file, environment variable, flag, what it takes. The file, the environment, the
//! command line with its help, and the error messages all follow this one list. Names never change once released.

/// One setting.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// Key in the configuration file.
    pub key: &'static str,
    /// Environment variable.
    pub variable: &'static str,
    /// Flag without dashes; none for secrets, which must not be in the process list.
    pub flag: Option<&'static str>,
    /// What it takes, in words that finish "expected …".
    pub expects: &'static str,
    /// What it is for, with the default.
    pub help: &'static str,
    /// Its value must not be shown.
    pub secret: bool,
}

/// How Istio's charts name the cluster. As with ztunnel it wins over the variable of [`CLUSTER_ID`].
pub const META_CLUSTER_ID: &str = "ISTIO_META_CLUSTER_ID";

macro_rules! settings {
    ($($id:ident = $key:literal, $variable:literal, $flag:literal, $expects:literal, $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $id: Setting = Setting {
                key: $key,
                variable: $variable,
                flag: Some($flag),
                expects: $expects,
                help: $help,
                secret: false,
            };
        )*
        /// Every setting, in the order in which they are printed.
        pub const ALL: &[&Setting] = &[$(&$id,)* &AUTH_TOKEN];
    };
}

settings! {
    NODE_NAME = "nodeName", "NODE_NAME", "node-name",
        "a name of letters, digits, `.`, `-` and `_`",
        "Name of this node, as in the workloads' `node` [the machine's name]";
    CLUSTER_ID = "clusterId", "CLUSTER_ID", "cluster-id",
        "a name of letters, digits, `.`, `-` and `_`",
        "Cluster this node belongs to [Kubernetes]";
    NETWORK = "network", "NETWORK", "network",
        "a name of letters, digits, `.`, `-` and `_`, or nothing",
        "Network this node's addresses belong to [empty]";
    CLUSTER_DOMAIN = "clusterDomain", "CLUSTER_DOMAIN", "cluster-domain",
        "a lower-case DNS name such as cluster.local",
        "DNS suffix of the cluster's services [cluster.local]";
    TRUST_DOMAIN = "trustDomain", "TRUST_DOMAIN", "trust-domain",
        "a lower-case SPIFFE trust domain such as cluster.local",
        "Trust domain of identities that name none [cluster.local]";
    ROOT_NAMESPACE = "rootNamespace", "CULVERT_ROOT_NAMESPACE", "root-namespace",
        "a lower-case namespace such as istio-system",
        "Namespace whose policies apply to the whole mesh [istio-system]";
    POD_NAME = "podName", "POD_NAME", "pod-name",
        "a name of letters, digits, `.`, `-` and `_`, or nothing",
        "Name of the agent's own pod [empty]";
    POD_NAMESPACE = "podNamespace", "POD_NAMESPACE", "pod-namespace",
        "a name of letters, digits, `.`, `-` and `_`, or nothing",
        "Namespace of the agent's own pod [empty]";
    INSTANCE_IP = "instanceIp", "INSTANCE_IP", "instance-ip",
        "an IP address such as 10.0.0.7",
        "Address of the agent's own pod [none]";
    LOCAL_XDS_PATH = "localXdsPath", "LOCAL_XDS_PATH", "local-xds-path",
        "the path of a YAML file with workloads, services and policies",
        "Mesh file, reloaded when it changes [none]";
    LOCAL_XDS = "localXds", "LOCAL_XDS", "local-xds",
        "workloads, services and policies as YAML text",
        "The mesh itself, as a mesh file has it; never read again [none]";
    ANNOTATIONS_PATH = "annotationsPath", "CULVERT_ANNOTATIONS_PATH", "annotations-path",
        "the path of a YAML file with annotations of namespaces and workloads",
        "Annotations file beside a control plane, reloaded when it changes [none]";
    XDS_ADDRESS = "xdsAddress", "XDS_ADDRESS", "xds-address",
        "an address such as https://istiod.istio-system.svc:15012",
        "The control plane that tells the mesh [https://istiod.istio-system.svc:15012 in a cluster]";
    XDS_ROOT_CA = "xdsRootCa", "XDS_ROOT_CA", "xds-root-ca",
        "a path, `SYSTEM`, or certificates as PEM",
        "Who vouches for that control plane; a file is read anew for every connection [./var/run/secrets/istio/root-cert.pem]";
    ALT_XDS_HOSTNAME = "altXdsHostname", "ALT_XDS_HOSTNAME", "alt-xds-hostname",
        "a DNS name or an IP address",
        "The name in that control plane's certificate [the address's]";
    XDS_ON_DEMAND = "xdsOnDemand", "XDS_ON_DEMAND", "xds-on-demand",
        "`true` or `false`",
        "Ask the control plane only for addresses that pods connect to, not for all [false]";
    CA_ADDRESS = "caAddress", "CA_ADDRESS", "ca-address",
        "an address such as https://istiod.istio-system.svc:15012",
        "The certificate authority [https://istiod.istio-system.svc:15012 in a cluster]";
    CA_ROOT_CA = "caRootCa", "CA_ROOT_CA", "ca-root-ca",
        "a path, `SYSTEM`, or certificates as PEM",
        "Who vouches for that authority's server [./var/run/secrets/istio/root-cert.pem]";
    ALT_CA_HOSTNAME = "altCaHostname", "ALT_CA_HOSTNAME", "alt-ca-hostname",
        "a DNS name or an IP address",
        "The name in the certificate of that authority's server [the address's]";
    CRL_PATH = "crlPath", "CRL_PATH", "crl-path",
        "the path of a file with certificate revocation lists, as PEM, or one as DER",
        "Revocation lists of the mesh's authorities, read again when the file changes; peers whose certificate is on one are refused, and cut off [none]";
    INPOD_UDS = "inpodUds", "INPOD_UDS", "inpod-uds",
        "an absolute path of at most 90 bytes",
        "Unix socket of istio-cni, which tells what pods of this node are in the mesh [none: pods are enrolled with `culvert pod add`; as `culvert proxy ztunnel` /var/run/ztunnel/ztunnel.sock]";
    DEV_CA = "devCa", "CULVERT_DEV_CA", "dev-ca",
        "the path of a directory",
        "Issue certificates from a development CA kept in this directory; unsafe for production [none]";
    SECRET_TTL = "secretTtl", "SECRET_TTL", "secret-ttl",
        "a duration from 10s to 8760h, such as 86400s, 24h or 3600",
        "How long a workload certificate is valid [86400s]";
    PACKET_MARK = "packetMark", "PACKET_MARK", "packet-mark",
        "a number from 1 to 4095 other than 1338, such as 1337 or 0x539",
        "Packet mark of the agent's connections to the applications of its pods [1337]";
    ORIGINAL_SOURCE = "enableOrigSrc", "ENABLE_ORIG_SRC", "enable-orig-src",
        "`true` or `false`",
        "Applications see the addresses of their clients, not their pod's own, where the agent carries the connection [true]";
    POOL_MAX_STREAMS = "poolMaxStreamsPerConnection", "POOL_MAX_STREAMS_PER_CONNECTION", "pool-max-streams-per-connection",
        "a number from 1 to 10000",
        "Connections carried by one HBONE tunnel [100]";
    TERMINATION_GRACE_PERIOD = "terminationGracePeriodSeconds", "TERMINATION_GRACE_PERIOD_SECONDS", "termination-grace-period-seconds",
        "a duration from 0s to 24h, such as 30s or 30",
        "How long open connections may go on after SIGTERM; Kubernetes' own default [30s]";
    IPV6_ENABLED = "ipv6Enabled", "IPV6_ENABLED", "ipv6-enabled",
        "`true` or `false`",
        "Serve pods over IPv6 as well [true]";
    LOG_FILTER = "log", "RUST_LOG", "log",
        "log directives such as `info` or `warn,access=info`",
        "What is logged [info]";
    LOG_FORMAT = "logFormat", "LOG_FORMAT", "log-format",
        "`text` or `json`",
        "How it is logged [text]";
    CGROUP_ROOT = "cgroupRoot", "CULVERT_CGROUP_ROOT", "cgroup-root",
        "an absolute path in the cgroup v2 filesystem",
        "Cgroup below which pods are served; the agent must run inside it [the cgroup v2 mount]";
    PIN_DIR = "pinDir", "CULVERT_PIN_DIR", "pin-dir",
        "an absolute path in a bpf filesystem",
        "Where programs and maps are pinned [`culvert` under the bpf filesystem's mount]";
    ADMIN_SOCKET = "adminSocket", "CULVERT_ADMIN_SOCKET", "admin-socket",
        "an absolute path of at most 90 bytes",
        "Unix socket for `culvert pod`, `flows` and `status` [/run/culvert/admin.sock]";
    VERDICT_MAX_AGE = "verdictMaxAge", "CULVERT_VERDICT_MAX_AGE", "verdict-max-age",
        "a duration from 1s to 24h, such as 300s or 5m",
        "How long the kernel goes on using verdicts when the agent is gone [300s]";
    DIRECT = "direct", "CULVERT_DIRECT", "direct",
        "`true` or `false`",
        "Let pods of this node talk to each other directly; `false` sends all of it through HBONE [true]";
    REDIRECT_MODE = "redirectMode", "CULVERT_REDIRECT_MODE", "redirect-mode",
        "`ebpf` or `iptables`",
        "What brings a pod's connections to the agent: `ebpf`, or istio-cni's `iptables` rules, which need the packet mark 1337 and keep pods of a node from talking directly [ebpf]";
    SHORT_CIRCUIT = "shortCircuit", "CULVERT_SHORT_CIRCUIT", "short-circuit",
        "`off`, `auto` or `on`",
        "Short-circuit direct flows of pods whose annotations, and whose namespace's, do not say: `off`, `auto` (where no program can tell) or `on` [auto]";
    PASS_NODE_PROBES = "passNodeProbes", "CULVERT_PASS_NODE_PROBES", "pass-node-probes",
        "`true` or `false`",
        "Let processes of the node outside all pods, such as kubelet's probes, reach applications without policy [true]";
    HOST_NETNS = "hostNetns", "CULVERT_HOST_NETNS", "host-netns",
        "the absolute path of a network namespace",
        "The node's own network namespace [/proc/1/ns/net]";
    PODS_CGROUP = "podsCgroup", "CULVERT_PODS_CGROUP", "pods-cgroup",
        "an absolute path in the cgroup v2 filesystem",
        "Cgroup below which all pods live, also those of the host's network [kubelet's, where it is found]";
    FLOW_TELEMETRY = "flowTelemetry", "CULVERT_FLOW_TELEMETRY", "flow-telemetry",
        "`true` or `false`",
        "Report each direct flow [true]";
    FLOW_REPORT_INTERVAL = "flowReportInterval", "CULVERT_FLOW_REPORT_INTERVAL", "flow-report-interval",
        "a duration from 1s to 1h, such as 10s",
        "How often flows that stay open are reported [10s]";
    THREADS = "threads", "CULVERT_THREADS", "threads",
        "a number from 1 to 1024",
        "Threads that carry traffic [the number of CPUs]";
    STATS_ADDRESS = "statsAddress", "CULVERT_STATS_ADDRESS", "stats-address",
        "an address and port such as 0.0.0.0:15020",
        "Where /metrics is served [0.0.0.0:15020]";
    READINESS_ADDRESS = "readinessAddress", "CULVERT_READINESS_ADDRESS", "readiness-address",
        "an address and port such as 0.0.0.0:15021",
        "Where /healthz/ready is served [0.0.0.0:15021]";
    ADMIN_ADDRESS = "adminAddress", "CULVERT_ADMIN_ADDRESS", "admin-address",
        "a loopback address and port such as 127.0.0.1:15000",
        "Where /config_dump is served, to this machine only [127.0.0.1:15000]";
    LENIENT = "lenient", "CULVERT_LENIENT", "lenient",
        "names separated by commas, out of `unknown-policies`, `unreadable-resources`, `later-policies`, `certificate-names`, `authority` and `handshake-deadlines`",
        "What to do as ztunnel does it, where that is less strict; docs/MIGRATION.md says what each name means [nothing]";
    TEST_KNOBS = "testKnobs", "CULVERT_TEST_KNOBS", "test-knobs",
        "names of lower-case letters, digits, `-` and `_`, separated by commas",
        "Protections switched off for a test; only in builds made for tests [none]";
}

/// The token shown to istiod.
pub const AUTH_TOKEN: Setting = Setting {
    key: "authToken",
    variable: "AUTH_TOKEN",
    flag: None,
    expects: "a path beginning with `/`, `./` or `../`, or the token itself",
    help: "Token shown to istiod, or the file it is read from [./var/run/secrets/tokens/istio-token]",
    secret: true,
};

/// The setting of this name in the file.
pub fn by_key(key: &str) -> Option<&'static Setting> {
    ALL.iter().copied().find(|setting| setting.key == key)
}

/// The setting whose key is closest to a mistyped one, if at most two edits away or only the spelling style differs.
pub fn nearest(key: &str) -> Option<&'static str> {
    if key.len() > 64 {
        return None;
    }
    let plain = |text: &str| text.to_lowercase().replace(['_', '-'], "");
    let wanted = plain(key);
    ALL.iter()
        .map(|setting| (edits(&wanted, &plain(setting.key)), setting.key))
        .min()
        .filter(|(distance, _)| *distance <= 2)
        .map(|(_, name)| name)
}

/// Levenshtein's distance, row by row.
fn edits(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.chars().count()).collect();
    for (i, a) in left.chars().enumerate() {
        let mut diagonal = i;
        let mut last = i + 1;
        let mut next = vec![last];
        for (b, above) in right.chars().zip(row.iter().skip(1)) {
            last = (diagonal + usize::from(a != b))
                .min(last + 1)
                .min(above + 1);
            diagonal = *above;
            next.push(last);
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}
