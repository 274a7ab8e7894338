//! The configuration: one typed struct out of file < environment < flags.
//! Invariants: a `Config` that exists is valid; every layer is checked even where a stronger one overrides it; all
//! errors are reported together; nothing else reads the environment. Built once by the command line, read by the node.

mod environment;
mod error;
mod file;
mod lenient;
pub mod mounts;
mod resolve;
pub mod settings;
mod values;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::{
    control_channel::{Address, Headers, RootSource},
    kernel::RedirectMode,
    mesh::ShortCircuitMode,
};

pub use environment::{Environment, Variable};
pub use error::{ConfigError, ConfigErrors, Origin};
pub use lenient::{Leniency, Lenient};
use resolve::Resolver;
pub use settings::Setting;
pub use values::{AuthToken, LogFilter, LogFormat, duration, show_duration};

/// As ztunnel marks its packets.
const DEFAULT_PACKET_MARK: u32 = 1337;

/// Where the admin socket is unless told otherwise.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/culvert/admin.sock";

/// A Unix socket's path may have 107 bytes; the rest is for the temporary name it is bound under first.
const MAX_SOCKET_PATH: usize = 90;

/// Istio's control plane in a cluster, and where its DaemonSets mount what vouches for it.
const ISTIOD: &str = "https://istiod.istio-system.svc:15012";
const ISTIOD_ROOTS: &str = "./var/run/secrets/istio/root-cert.pem";

/// The socket of istio-cni, as its DaemonSet and ztunnel's mount it.
const ISTIO_CNI: &str = "/var/run/ztunnel/ztunnel.sock";

const DAY: u64 = 86_400;

/// The effective configuration. Serialised in camelCase it is what `--print-config` and `/config_dump` show, and, but
/// for a secret, what the file takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// Name of this node.
    pub node_name: String,
    /// Cluster of this node.
    pub cluster_id: String,
    /// Network of this node; empty is a network like any other.
    pub network: String,
    /// DNS suffix of services.
    pub cluster_domain: String,
    /// Trust domain of identities that name none.
    pub trust_domain: String,
    /// Namespace of mesh-wide policies.
    pub root_namespace: String,
    /// The agent's own pod, or empty.
    pub pod_name: String,
    /// The agent's own namespace, or empty.
    pub pod_namespace: String,
    /// The agent's own address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance_ip: Option<IpAddr>,
    /// The mesh from a local file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_xds_path: Option<PathBuf>,
    /// The mesh as text, in the place of a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_xds: Option<String>,
    /// What annotations hold beside what the control plane tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations_path: Option<PathBuf>,
    /// The control plane that tells the mesh, unless a local file does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xds_address: Option<Address>,
    /// Who vouches for it.
    pub xds_root_ca: RootSource,
    /// The name in its certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alt_xds_hostname: Option<String>,
    /// It is only asked for what is needed.
    pub xds_on_demand: bool,
    /// The certificate authority, unless it is a development CA.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_address: Option<Address>,
    /// Who vouches for its server.
    pub ca_root_ca: RootSource,
    /// The name in that server's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alt_ca_hostname: Option<String>,
    /// Certificate revocation lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crl_path: Option<PathBuf>,
    /// More headers for the control plane: `XDS_HEADER_*` without that beginning. They may be secrets.
    #[serde(skip)]
    pub xds_headers: Headers,
    /// The same for the authority: `CA_HEADER_*`.
    #[serde(skip)]
    pub ca_headers: Headers,
    /// What the agent tells of itself beside its names: `ISTIO_META_*` without that beginning.
    #[serde(skip)]
    pub node_metadata: BTreeMap<String, String>,
    /// The socket of istio-cni; none where nobody but an operator enrols pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inpod_uds: Option<PathBuf>,
    /// Directory of the development CA.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dev_ca: Option<PathBuf>,
    /// Validity asked for workload certificates.
    #[serde(serialize_with = "values::serialize_duration")]
    pub secret_ttl: Duration,
    /// The mark of connections that the agent opens to the applications of its pods; 1 to 0xfff, and not that of steering.
    pub packet_mark: u32,
    /// Applications see the addresses of their clients.
    #[serde(rename = "enableOrigSrc")]
    pub original_source: bool,
    /// Streams on one HBONE tunnel.
    #[serde(rename = "poolMaxStreamsPerConnection")]
    pub pool_max_streams: u32,
    /// Time for open connections after SIGTERM.
    #[serde(
        rename = "terminationGracePeriodSeconds",
        serialize_with = "values::serialize_duration"
    )]
    pub termination_grace_period: Duration,
    /// IPv6 for pods.
    pub ipv6_enabled: bool,
    /// What is logged.
    #[serde(rename = "log")]
    pub log_filter: LogFilter,
    /// How it is logged.
    pub log_format: LogFormat,
    /// Cgroup below which pods are served.
    pub cgroup_root: PathBuf,
    /// Directory of pinned programs and maps.
    pub pin_dir: PathBuf,
    /// The admin socket.
    pub admin_socket: PathBuf,
    /// How long verdicts outlive the agent.
    #[serde(serialize_with = "values::serialize_duration")]
    pub verdict_max_age: Duration,
    /// Pods of this node may talk to each other directly.
    pub direct: bool,
    /// What brings a pod's connections to the agent.
    pub redirect_mode: RedirectMode,
    /// Which direct flows may be short-circuited where annotations leave it open.
    #[serde(serialize_with = "values::serialize_short_circuit")]
    pub short_circuit: ShortCircuitMode,
    /// The node's own processes pass.
    pub pass_node_probes: bool,
    /// The node's own network namespace.
    pub host_netns: PathBuf,
    /// Where all pods are; none means where kubelet usually puts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods_cgroup: Option<PathBuf>,
    /// Direct flows are reported.
    pub flow_telemetry: bool,
    /// How often open flows are reported.
    #[serde(serialize_with = "values::serialize_duration")]
    pub flow_report_interval: Duration,
    /// Data threads; never 0.
    pub threads: u32,
    /// `/metrics`.
    pub stats_address: SocketAddr,
    /// `/healthz/ready`.
    pub readiness_address: SocketAddr,
    /// `/config_dump`; always a loopback address.
    pub admin_address: SocketAddr,
    /// What is done as ztunnel does it, where that is less strict.
    pub lenient: Lenient,
    /// Protections switched off for a test.
    #[cfg(feature = "test-knobs")]
    #[serde(serialize_with = "joined", skip_serializing_if = "Vec::is_empty")]
    pub test_knobs: Vec<String>,
    /// The token for istiod.
    pub auth_token: AuthToken,
}

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// The settings given as flags.
    pub values: Vec<(&'static Setting, String)>,
    /// The agent was started as ztunnel is: pods are enrolled by istio-cni.
    pub in_place_of_ztunnel: bool,
}

impl Config {
    /// Puts the three layers together.
    ///
    /// # Errors
    /// All that is wrong in any layer, together.
    pub fn load(flags: &Flags, environment: &Environment) -> Result<Self, ConfigErrors> {
        let mut layers = Resolver::new(flags, environment);
        let config = Self::resolve(&mut layers, environment, flags.in_place_of_ztunnel);
        layers.finish(config)
    }

    /// `None` only together with an error noted in the resolver. Every setting is looked at before the first `?`.
    fn resolve(
        layers: &mut Resolver,
        environment: &Environment,
        in_place_of_ztunnel: bool,
    ) -> Option<Self> {
        let name_or_nothing = values::optional_name;
        let node_name = layers.or_missing(
            &settings::NODE_NAME,
            values::name,
            values::name(&environment.hostname),
            "this machine's name is not one",
            "set NODE_NAME or --node-name",
        );
        let cluster_id = layers.or(&settings::CLUSTER_ID, values::name, "Kubernetes".to_owned());
        let network = layers.or(&settings::NETWORK, name_or_nothing, String::new());
        let cluster_local = || "cluster.local".to_owned();
        let cluster_domain = layers.or(&settings::CLUSTER_DOMAIN, values::domain, cluster_local());
        let trust_domain = layers.or(&settings::TRUST_DOMAIN, values::domain, cluster_local());
        let root_namespace = layers.or(
            &settings::ROOT_NAMESPACE,
            values::domain,
            "istio-system".to_owned(),
        );
        let pod_name = layers.or(&settings::POD_NAME, name_or_nothing, String::new());
        let pod_namespace = layers.or(&settings::POD_NAMESPACE, name_or_nothing, String::new());
        let instance_ip = layers.take(&settings::INSTANCE_IP, values::ip);
        let local_xds_path = layers.take(&settings::LOCAL_XDS_PATH, values::path);
        let local_xds = layers.take(&settings::LOCAL_XDS, values::text);
        if local_xds_path.is_some() && local_xds.is_some() {
            layers.contradiction(&settings::LOCAL_XDS_PATH, &settings::LOCAL_XDS);
        }
        let local = match (&local_xds_path, &local_xds) {
            (Some(_), _) => Some(&settings::LOCAL_XDS_PATH),
            (None, Some(_)) => Some(&settings::LOCAL_XDS),
            (None, None) => None,
        };
        let annotations_path = layers.take(&settings::ANNOTATIONS_PATH, values::path);
        // A mesh file says them itself.
        if let Some(local) = local
            && annotations_path.is_some()
        {
            layers.contradiction(local, &settings::ANNOTATIONS_PATH);
        }
        let address = |text: &str| Address::parse(text).ok();
        let in_cluster = match environment.variable("KUBERNETES_SERVICE_HOST") {
            Variable::Unset => None,
            _ => address(ISTIOD),
        };
        let roots = || RootSource::File(PathBuf::from(ISTIOD_ROOTS));
        let xds_address = layers.take(&settings::XDS_ADDRESS, address);
        // Who gives a mesh means it; who names a control plane too has to choose.
        let xds_address = match (local, xds_address) {
            (Some(local), Some(_)) => {
                layers.contradiction(local, &settings::XDS_ADDRESS);
                None
            }
            (Some(_), None) => None,
            (None, given) => given.or_else(|| in_cluster.clone()),
        };
        let xds_root_ca = layers.or(&settings::XDS_ROOT_CA, RootSource::parse, roots());
        let alt_xds_hostname = layers.take(&settings::ALT_XDS_HOSTNAME, values::host);
        let xds_on_demand = layers.or(&settings::XDS_ON_DEMAND, values::boolean, false);
        let inpod_uds = layers.take(&settings::INPOD_UDS, socket_path);
        let inpod_uds = inpod_uds.or_else(|| in_place_of_ztunnel.then(|| ISTIO_CNI.into()));
        let dev_ca = layers.take(&settings::DEV_CA, values::path);
        let ca_address = layers.take(&settings::CA_ADDRESS, address);
        let ca_address = match (&dev_ca, ca_address) {
            (Some(_), Some(_)) => {
                layers.contradiction(&settings::DEV_CA, &settings::CA_ADDRESS);
                None
            }
            (Some(_), None) => None,
            (None, given) => given.or(in_cluster),
        };
        let ca_root_ca = layers.or(&settings::CA_ROOT_CA, RootSource::parse, roots());
        let alt_ca_hostname = layers.take(&settings::ALT_CA_HOSTNAME, values::host);
        let crl_path = layers.take(&settings::CRL_PATH, values::path);
        let mut headers = |prefix| {
            let expected = "a header of HTTP, named by what follows the prefix, of printable ASCII";
            layers.beginning_with(environment, prefix, expected, Headers::can_be)
        };
        let (xds_headers, ca_headers) =
            (headers("XDS_HEADER_").into(), headers("CA_HEADER_").into());
        let node_metadata =
            layers.beginning_with(environment, "ISTIO_META_", "Unicode text", |_, _| true);
        let node_metadata = node_metadata.into_iter().collect();
        let secret_ttl = layers.or(
            &settings::SECRET_TTL,
            |text| values::duration_within(text, 10, 365 * DAY),
            Duration::from_secs(DAY),
        );
        let packet_mark = layers.or(&settings::PACKET_MARK, mark, DEFAULT_PACKET_MARK);
        let pool_max_streams = layers.or(
            &settings::POOL_MAX_STREAMS,
            |text| values::number_within(text, 1, 10_000),
            100,
        );
        let termination_grace_period = layers.or(
            &settings::TERMINATION_GRACE_PERIOD,
            |text| values::duration_within(text, 0, DAY),
            Duration::from_secs(30),
        );
        let original_source = layers.or(&settings::ORIGINAL_SOURCE, values::boolean, true);
        let ipv6_enabled = layers.or(&settings::IPV6_ENABLED, values::boolean, true);
        let log_filter = layers
            .take(&settings::LOG_FILTER, LogFilter::parse)
            .or_else(|| LogFilter::parse("info"));
        let log_format = layers.or(
            &settings::LOG_FORMAT,
            values::log_format,
            LogFormat::default(),
        );
        let cgroup_root = layers.or_missing(
            &settings::CGROUP_ROOT,
            values::absolute_path,
            mounts::find(&environment.mountinfo, "cgroup2"),
            "no cgroup v2 filesystem is mounted",
            "mount one (`mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified`), or set CULVERT_CGROUP_ROOT",
        );
        let pin_dir = layers.or_missing(
            &settings::PIN_DIR,
            values::absolute_path,
            default_pin_dir(environment),
            "no bpf filesystem is mounted",
            "mount one (`mount -t bpf bpf /sys/fs/bpf`), or set CULVERT_PIN_DIR",
        );
        let admin_socket = layers.or(
            &settings::ADMIN_SOCKET,
            socket_path,
            PathBuf::from(DEFAULT_ADMIN_SOCKET),
        );
        let verdict_max_age = layers.or(
            &settings::VERDICT_MAX_AGE,
            |text| values::duration_within(text, 1, DAY),
            Duration::from_secs(300),
        );
        let direct = layers.or(&settings::DIRECT, values::boolean, true);
        let redirect_mode = layers.or(
            &settings::REDIRECT_MODE,
            |text| text.parse().ok(),
            RedirectMode::default(),
        );
        let short_circuit = layers.or(
            &settings::SHORT_CIRCUIT,
            values::short_circuit,
            ShortCircuitMode::default(),
        );
        let pass_node_probes = layers.or(&settings::PASS_NODE_PROBES, values::boolean, true);
        let host_netns = layers.or(
            &settings::HOST_NETNS,
            values::absolute_path,
            PathBuf::from("/proc/1/ns/net"),
        );
        let pods_cgroup = layers.take(&settings::PODS_CGROUP, values::absolute_path);
        let flow_telemetry = layers.or(&settings::FLOW_TELEMETRY, values::boolean, true);
        let flow_report_interval = layers.or(
            &settings::FLOW_REPORT_INTERVAL,
            |text| values::duration_within(text, 1, 3600),
            Duration::from_secs(10),
        );
        let threads = layers.or(
            &settings::THREADS,
            |text| values::number_within(text, 1, 1024),
            u32::try_from(environment.cpus).unwrap_or(1).clamp(1, 1024),
        );
        let any = IpAddr::from([0, 0, 0, 0]);
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let stats_address = layers.or(
            &settings::STATS_ADDRESS,
            values::address,
            SocketAddr::new(any, 15020),
        );
        let readiness_address = layers.or(
            &settings::READINESS_ADDRESS,
            values::address,
            SocketAddr::new(any, 15021),
        );
        let admin_address = layers.or(
            &settings::ADMIN_ADDRESS,
            values::loopback_address,
            SocketAddr::new(loopback, 15000),
        );
        let lenient = layers.list(&settings::LENIENT, Leniency::parse);
        #[cfg(feature = "test-knobs")]
        let test_knobs = layers
            .take(&settings::TEST_KNOBS, knob_names)
            .unwrap_or_default();
        #[cfg(not(feature = "test-knobs"))]
        layers.refuse_knobs(&settings::TEST_KNOBS);
        let auth_token = layers.or(
            &settings::AUTH_TOKEN,
            AuthToken::parse,
            AuthToken::Usual(PathBuf::from(AuthToken::USUAL)),
        );

        Some(Self {
            node_name: node_name?,
            cluster_id,
            network,
            cluster_domain,
            trust_domain,
            root_namespace,
            pod_name,
            pod_namespace,
            instance_ip,
            local_xds_path,
            local_xds,
            annotations_path,
            xds_address,
            xds_root_ca,
            alt_xds_hostname,
            xds_on_demand,
            ca_address,
            ca_root_ca,
            alt_ca_hostname,
            crl_path,
            xds_headers,
            ca_headers,
            node_metadata,
            inpod_uds,
            dev_ca,
            secret_ttl,
            packet_mark,
            original_source,
            pool_max_streams,
            termination_grace_period,
            ipv6_enabled,
            log_filter: log_filter?,
            log_format,
            cgroup_root: cgroup_root?,
            pin_dir: pin_dir?,
            admin_socket,
            verdict_max_age,
            direct,
            redirect_mode,
            short_circuit,
            pass_node_probes,
            host_netns,
            pods_cgroup,
            flow_telemetry,
            flow_report_interval,
            threads,
            stats_address,
            readiness_address,
            admin_address,
            lenient: lenient.into_iter().collect(),
            #[cfg(feature = "test-knobs")]
            test_knobs,
            auth_token,
        })
    }

    /// The effective configuration as JSON, without secrets.
    pub fn to_json(&self) -> serde_json::Value {
        // Fails for a path that is not Unicode only, and every path came from Unicode text or mountinfo.
        serde_json::to_value(self)
            .unwrap_or_else(|error| serde_json::json!({"unprintable": error.to_string()}))
    }

    /// The effective configuration as YAML, without secrets: what `--print-config` prints.
    pub fn to_yaml(&self) -> String {
        // A JSON scalar is a YAML scalar, and the configuration is flat.
        match self.to_json() {
            serde_json::Value::Object(settings) => settings
                .iter()
                .map(|(key, value)| format!("{key}: {value}\n"))
                .collect(),
            other => format!("{other}\n"),
        }
    }
}

/// Reads one setting from its flag or variable, for the commands that need no whole configuration.
fn single<T>(
    setting: &'static Setting,
    flag: Option<&str>,
    environment: &Environment,
    parse: fn(&str) -> Option<T>,
    default: Option<T>,
    mend: &str,
) -> Result<T, ConfigErrors> {
    let given = flag.map(|value| (setting, value.to_owned()));
    let flags = Flags {
        values: given.into_iter().collect(),
        ..Flags::default()
    };
    let mut layers = Resolver::new(&flags, environment);
    let found = layers.or_missing(setting, parse, default, "there is no default here", mend);
    layers.finish(found)
}

/// The admin socket a client talks to: flag, else environment, else the default.
///
/// # Errors
/// A value that is no path for a socket.
pub fn admin_socket(
    flag: Option<&str>,
    environment: &Environment,
) -> Result<PathBuf, ConfigErrors> {
    let default = Some(PathBuf::from(DEFAULT_ADMIN_SOCKET));
    let mend = "set CULVERT_ADMIN_SOCKET or --admin-socket";
    let setting = &settings::ADMIN_SOCKET;
    single(setting, flag, environment, socket_path, default, mend)
}

/// The pin directory: flag, else environment, else the default of this machine.
///
/// # Errors
/// A value that is no absolute path, or no bpf filesystem and no value.
pub fn pin_dir(flag: Option<&str>, environment: &Environment) -> Result<PathBuf, ConfigErrors> {
    let default = default_pin_dir(environment);
    let mend = "mount a bpf filesystem (`mount -t bpf bpf /sys/fs/bpf`), or set CULVERT_PIN_DIR";
    let setting = &settings::PIN_DIR;
    let parse = values::absolute_path;
    single(setting, flag, environment, parse, default, mend)
}

/// The packet mark of the agent's connections to applications: flag, else environment, else the default.
///
/// # Errors
/// A value that is no such mark.
pub fn packet_mark(flag: Option<&str>, environment: &Environment) -> Result<u32, ConfigErrors> {
    let default = Some(DEFAULT_PACKET_MARK);
    let mend = "set PACKET_MARK or --packet-mark";
    let setting = &settings::PACKET_MARK;
    single(setting, flag, environment, mark, default, mend)
}

/// Rules compare only these bits: a mark without any of them would be every packet's.
fn mark(text: &str) -> Option<u32> {
    values::number_within(text, 1, culvert_abi::MARK_MASK)
        .filter(|mark| *mark != culvert_abi::STEER_MARK)
}

fn default_pin_dir(environment: &Environment) -> Option<PathBuf> {
    mounts::find(&environment.mountinfo, "bpf").map(|mount| mount.join("culvert"))
}

fn socket_path(text: &str) -> Option<PathBuf> {
    values::absolute_path(text).filter(|path| path.as_os_str().len() <= MAX_SOCKET_PATH)
}

#[cfg(feature = "test-knobs")]
fn knob_names(text: &str) -> Option<Vec<String>> {
    let valid = |name: &&str| {
        !name.is_empty()
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b))
    };
    let names: Vec<&str> = text.split(',').map(str::trim).collect();
    names
        .iter()
        .all(valid)
        .then(|| names.into_iter().map(str::to_owned).collect())
}

#[cfg(feature = "test-knobs")]
fn joined<S: serde::Serializer>(names: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&names.join(","))
}
