//! The agent where ztunnel stood: started as its DaemonSet starts it, between a control plane and istio-cni, whose rules are in the pods.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use culvert_harness::{
    Agent, AgentOptions, ControlPlane, Fabric, FabricOptions, Mesh, Node, Pod, Policy, Proc,
    Subcommand, Workload, ZdsAgent, ZdsPod, ZdsServer,
    cni_rules::{Backend, program, redirection},
    control_plane::TOKEN,
    culvert_binary, wait_until,
};
use culvert_tests::scene::{NAMESPACE, PORT, SOON, answered, connect_to, only, principal, text};
use nix::sys::signal::Signal;
use serde_json::Value;

const MARKER: &str = "culvert-ztunnel-marker";
const HELLO: [&str; 4] = ["--send", "hello", "--read", "5"];

/// Two nodes of a cluster without agents, with pods that nobody has enrolled.
pub struct Stage {
    pub mesh: Mesh,
    pub control_plane: ControlPlane,
    pub client: Pod,
    pub server_a: Pod,
    pub server_b: Pod,
    pub node1: Node,
    pub node2: Node,
    // Last, so that it takes everything down when all else is gone.
    pub fabric: Fabric,
}

/// An agent, and istio-cni on its node.
pub struct Served {
    pub agent: Agent,
    pub cni: ZdsAgent,
    _server: ZdsServer,
}

impl Stage {
    pub fn new(policies: Vec<Policy>) -> Result<Self> {
        let fabric = Fabric::with(FabricOptions { ipv6: true })?;
        let node1 = fabric.node()?;
        let node2 = fabric.node()?;
        let client = node1.pod("client")?;
        let server_a = node1.pod("server-a")?;
        let server_b = node2.pod("server-b")?;
        let workloads =
            [&client, &server_a, &server_b].map(|pod| Workload::of_pod(pod, NAMESPACE, pod.name()));
        let mesh = Mesh {
            workloads: workloads.to_vec(),
            policies,
            ..Mesh::default()
        };
        mesh.write(&Agent::default_mesh_file(&node1))?;
        let control_plane = ControlPlane::of_fabric(&node1, &culvert_binary()?)?;
        Ok(Self {
            mesh,
            control_plane,
            client,
            server_a,
            server_b,
            node1,
            node2,
            fabric,
        })
    }

    /// Starts an agent as ztunnel's DaemonSet does.
    pub fn ztunnel(&self, node: &Node, more: &[(&str, &str)]) -> Result<Agent> {
        let mut env = self.environment(node);
        let more = more.iter();
        env.extend(more.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        node.start_agent(AgentOptions {
            subcommand: Subcommand::ProxyZtunnel,
            directory: Some(self.volumes(node)?),
            env,
            ..AgentOptions::default()
        })
    }

    /// The same with istio-cni, which has named no pod yet.
    pub fn served(&self, node: &Node, more: &[(&str, &str)]) -> Result<Served> {
        let server = ZdsServer::listen(&socket(node))?;
        let agent = self.ztunnel(node, more)?;
        let cni = server.accept(SOON)?;
        Ok(Served {
            agent,
            cni,
            _server: server,
        })
    }

    /// Takes a pod into the mesh as istio-cni does: its rules first.
    pub fn join(&self, served: &Served, pod: &Pod) -> Result<()> {
        program(pod, Backend::Legacy)?;
        self.name_to(served, pod)
    }

    pub fn name_to(&self, served: &Served, pod: &Pod) -> Result<()> {
        let complaint = served.cni.add(&ZdsPod::of(self.workload(pod)?), pod)?;
        assert_eq!(complaint, "");
        Ok(())
    }

    pub fn workload(&self, pod: &Pod) -> Result<&Workload> {
        let mut all = self.mesh.workloads.iter();
        let found = all.find(|workload| workload.name == pod.name());
        found.context("a pod of the mesh")
    }

    /// What Istio's chart sets for ztunnel, and what Kubernetes adds. Only addresses and the socket are this test's.
    fn environment(&self, node: &Node) -> BTreeMap<String, String> {
        let istiod = self.control_plane.address().to_string();
        let variables = [
            ("CA_ADDRESS", istiod.as_str()),
            ("XDS_ADDRESS", &istiod),
            ("RUST_LOG", "info"),
            ("LOG_FORMAT", "json"),
            ("RUST_BACKTRACE", "1"),
            ("ISTIO_META_CLUSTER_ID", "cluster-7"),
            ("INPOD_ENABLED", "true"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
            ("POD_NAME", &format!("ztunnel-{}", node.name())),
            ("POD_NAMESPACE", "istio-system"),
            ("INSTANCE_IP", &node.address().to_string()),
            ("SERVICE_ACCOUNT", "ztunnel"),
            ("ISTIO_META_ENABLE_HBONE", "true"),
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            ("INPOD_UDS", &socket(node).to_string_lossy()),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        variables.into()
    }

    /// A working directory with the volumes of ztunnel's pod.
    fn volumes(&self, node: &Node) -> Result<PathBuf> {
        let directory = node.directory().join("ztunnel");
        for (variable, path) in [
            ("XDS_ROOT_CA", "var/run/secrets/istio/root-cert.pem"),
            ("AUTH_TOKEN", "var/run/secrets/tokens/istio-token"),
        ] {
            let told = self.control_plane.environment();
            let mut told = told.into_iter().filter(|(name, _)| *name == variable);
            let (_, source) = told.next().context("what agents are told")?;
            let path = directory.join(path);
            let parent = path.parent().unwrap_or(Path::new("/"));
            std::fs::create_dir_all(parent)?;
            std::fs::copy(source, path)?;
        }
        Ok(directory)
    }
}

pub fn socket(node: &Node) -> PathBuf {
    node.directory().join("ztunnel.sock")
}

/// A server of both families.
pub fn serve_both(pod: &Pod) -> Result<Proc> {
    let port = PORT.to_string();
    let arguments = ["serve", "--port", &port, "--mode", "echo", "--bind", "::"];
    let server = pod.probe()?.args(arguments).spawn()?;
    server.wait_for_line("listening", SOON)?;
    Ok(server)
}

pub fn addresses(pod: &Pod) -> Result<[String; 2]> {
    Ok([pod.at(PORT), pod.at_v6(PORT)?])
}

/// A connection to this address gets an answer, and the agent's log has it as the mesh's.
pub fn is_in_the_mesh(agent: &Agent, from: &Pod, to: &str, path: &str) -> Result<()> {
    let mark = agent.log().mark();
    let report = connect_to(from, to, &HELLO)?;
    assert!(answered(&report), "{to}: {report}");
    let identity = format!("spiffe://{}", principal(from.name()));
    let fields = [("src.identity", identity.as_str()), ("path", path)];
    let line = agent.wait_for_access(mark, &fields, SOON)?;
    let key = match path {
        "hbone" => "dst.hbone_addr",
        _ => "dst.addr",
    };
    assert_eq!(line.field(key).as_deref(), Some(to), "{}", line.text);
    Ok(())
}

/// What the agent says when it is not ready, once it says this.
fn unready(agent: &Agent, says: impl Fn(&str) -> bool) -> Result<String> {
    let mut last = String::new();
    let waited = wait_until(SOON * 2, "the agent to say what it waits for", || {
        let Ok(answer) = agent.get(15021, "/healthz/ready") else {
            return Ok(None);
        };
        last = format!("{} {}", answer.status, answer.body);
        Ok((answer.status == 500 && says(&answer.body)).then_some(answer.body))
    });
    waited.with_context(|| last)
}

#[test]
fn it_is_ready_when_both_have_told_it_all_and_says_what_is_missing_until_then() -> Result<()> {
    let mut stage = Stage::new(Vec::new())?;
    stage.control_plane.stop(Signal::SIGTERM)?;
    let agent = stage.ztunnel(&stage.node1, &[])?;
    let missing = unready(&agent, |missing| !missing.is_empty())?;
    for part in [
        "istio.workload.Address",
        "istio.security.Authorization",
        "istio-cni",
    ] {
        assert!(missing.contains(part), "{part}: {missing}");
    }
    stage.control_plane.restart()?;
    let missing = unready(&agent, |missing| !missing.contains("xDS"))?;
    assert!(missing.contains("ztunnel.sock"), "{missing}");
    let server = ZdsServer::listen(&socket(&stage.node1))?;
    let cni = server.accept(SOON)?;
    let listing = |missing: &str| missing.contains("has not named all of its pods yet");
    unready(&agent, listing)?;
    let served = Served {
        agent,
        cni,
        _server: server,
    };
    stage.join(&served, &stage.client)?;
    unready(&served.agent, listing)?;
    assert_eq!(served.cni.snapshot_sent()?, "");
    served.agent.ready()
}

#[test]
fn what_istio_cni_enrols_is_in_the_mesh_and_gets_its_rules_back() -> Result<()> {
    let stage = Stage::new(vec![only("client")])?;
    let one = stage.served(&stage.node1, &[])?;
    let two = stage.served(&stage.node2, &[])?;
    let _servers = (serve_both(&stage.server_a)?, serve_both(&stage.server_b)?);
    let pods = [
        (&one, &stage.client),
        (&one, &stage.server_a),
        (&two, &stage.server_b),
    ];
    let mut before = Vec::new();
    for (served, pod) in pods {
        program(pod, Backend::Legacy)?;
        before.push(redirection(pod, Backend::Legacy)?);
        assert!(before.iter().all(|rules| rules.contains("-A ISTIO_")));
        stage.name_to(served, pod)?;
        let found = redirection(pod, Backend::Legacy)?;
        assert!(!found.contains("-A ISTIO_"), "{found}");
    }
    for served in [&one, &two] {
        assert_eq!(served.cni.snapshot_sent()?, "");
        served.agent.ready()?;
    }
    let capture = stage.fabric.capture()?;
    for to in addresses(&stage.server_b)? {
        let length = MARKER.len().to_string();
        let marked = ["--send", MARKER, "--read", &length];
        let report = connect_to(&stage.client, &to, &marked)?;
        assert_eq!(text(&report, "data"), MARKER, "{to}: {report}");
        is_in_the_mesh(&one.agent, &stage.client, &to, "hbone")?;
    }
    assert!(!capture.contains(MARKER.as_bytes())?);
    for to in addresses(&stage.server_a)? {
        // The kernel part learns from the first one.
        connect_to(&stage.client, &to, &HELLO)?;
        is_in_the_mesh(&one.agent, &stage.client, &to, "direct")?;
        let report = connect_to(&stage.server_b, &to, &HELLO)?;
        assert!(!answered(&report), "{to}: {report}");
    }
    // By the pod's leaving, by the agent's, and not by its end.
    let [client, server_a, server_b] = [&before[0], &before[1], &before[2]];
    assert_eq!(one.cni.del(&stage.workload(&stage.client)?.uid)?, "");
    assert_eq!(redirection(&stage.client, Backend::Legacy)?, *client);
    for (served, node) in [(&one, &stage.node1), (&two, &stage.node2)] {
        assert!(served.agent.stop(Signal::SIGTERM)?.success());
        let pod = match node.name() == stage.node1.name() {
            true => &stage.server_a,
            false => &stage.server_b,
        };
        let found = redirection(pod, Backend::Legacy)?;
        assert!(!found.contains("-A ISTIO_"), "{found}");
        let (pins, admin) = (node.pin_directory(), served.agent.admin_socket());
        node.command(culvert_binary()?)
            .args(["unload".as_ref(), "--pin-dir".as_ref(), pins.as_os_str()])
            .args(["--admin-socket".as_ref(), admin.as_os_str()])
            .run(SOON)?
            .success()?;
    }
    assert_eq!(redirection(&stage.server_a, Backend::Legacy)?, *server_a);
    assert_eq!(redirection(&stage.server_b, Backend::Legacy)?, *server_b);
    Ok(())
}

#[test]
fn its_metrics_and_its_log_are_those_of_ztunnel() -> Result<()> {
    let stage = Stage::new(Vec::new())?;
    let one = stage.served(&stage.node1, &[])?;
    let two = stage.served(&stage.node2, &[])?;
    let _server = serve_both(&stage.server_b)?;
    let counts = |agent: &Agent| -> Result<[f64; 2]> {
        Ok([
            agent.metric("workload_manager_active_proxy_count", &[])?,
            agent.metric("workload_manager_pending_proxy_count", &[])?,
        ])
    };
    stage.join(&one, &stage.client)?;
    stage.join(&one, &stage.server_a)?;
    stage.join(&two, &stage.server_b)?;
    for served in [&one, &two] {
        assert_eq!(served.cni.snapshot_sent()?, "");
        served.agent.ready()?;
    }
    assert_eq!(counts(&one.agent)?, [2.0, 0.0]);
    assert_eq!(one.cni.del(&stage.workload(&stage.server_a)?.uid)?, "");
    assert_eq!(counts(&one.agent)?, [1.0, 0.0]);
    let metrics = one.agent.metrics()?;
    for part in [
        "workload_manager_active_proxy_count",
        "workload_manager_pending_proxy_count",
    ] {
        assert!(metrics.contains(part), "{part}: {metrics}");
    }
    let build = ["component=\"", "tag=\""];
    assert_eq!(one.agent.metric("istio_build", &build)?, 1.0);
    let messages = |kind: &str| {
        let url = format!("{kind}\"");
        one.agent.metric("istio_xds_message_total", &[&url])
    };
    assert!(messages("istio.workload.Address")? >= 1.0);
    assert!(messages("istio.security.Authorization")? >= 1.0);
    assert_eq!(
        one.agent.get(15020, "/stats/prometheus")?.status,
        200,
        "where Istio's scrapers look"
    );

    let to = stage.server_b.at(PORT);
    is_in_the_mesh(&one.agent, &stage.client, &to, "hbone")?;
    let opened = "istio_tcp_connections_opened_total";
    let labels = [
        "reporter=\"source\"",
        &format!("source_principal=\"spiffe://{}\"", principal("client")),
        &format!(
            "destination_principal=\"spiffe://{}\"",
            principal("server-b")
        ),
        "connection_security_policy=\"mutual_tls\"",
    ];
    wait_until(SOON, "the connection to be counted", || {
        Ok((one.agent.metric(opened, &labels)? == 1.0).then_some(()))
    })?;

    assert!(one.agent.stop(Signal::SIGTERM)?.success());
    let mut tunnels = 0;
    for line in one.agent.log().lines() {
        let parsed: Value =
            serde_json::from_str(&line.text).with_context(|| format!("not JSON: {}", line.text))?;
        for key in ["level", "time", "scope", "message"] {
            assert!(parsed[key].is_string(), "{key}: {}", line.text);
        }
        if parsed["scope"] != "access" || parsed["dst.hbone_addr"].is_null() {
            continue;
        }
        tunnels += 1;
        for (key, value) in [
            ("src.workload", "client"),
            ("src.namespace", NAMESPACE),
            ("dst.workload", "server-b"),
            ("dst.namespace", NAMESPACE),
            ("direction", "outbound"),
            ("dst.hbone_addr", &to),
            (
                "dst.identity",
                &format!("spiffe://{}", principal("server-b")),
            ),
        ] {
            assert_eq!(parsed[key], value, "{key}: {}", line.text);
        }
        for key in [
            "src.addr",
            "dst.addr",
            "bytes_sent",
            "bytes_recv",
            "duration",
        ] {
            assert!(!parsed[key].is_null(), "{key}: {}", line.text);
        }
    }
    assert_eq!(tunnels, 1);
    Ok(())
}

#[test]
fn the_control_plane_is_told_who_asks_as_by_ztunnel() -> Result<()> {
    let stage = Stage::new(Vec::new())?;
    let more = [
        ("ISTIO_META_MESH_ID", "mesh-1"),
        ("XDS_HEADER_X-OF-XDS", "seven b"),
        ("CA_HEADER_X-OF-CA", "eleven byte"),
        ("SECRET_TTL", "2h"),
    ];
    let served = stage.served(&stage.node1, &more)?;
    stage.join(&served, &stage.client)?;
    let node = stage.node1.name();
    let address = stage.node1.address();
    let id =
        format!("ztunnel~{address}~ztunnel-{node}.istio-system~istio-system.svc.cluster.local");
    let metadata = format!(
        "CLUSTER_ID=cluster-7 ENABLE_HBONE=true INSTANCE_IPS={address} MESH_ID=mesh-1 NAME=ztunnel-{node} NAMESPACE=istio-system NODE_NAME={node}"
    );
    let told = |event: &str, parts: &[&str]| -> Result<()> {
        let line = stage.control_plane.process().wait_for_line(event, SOON)?;
        for part in parts {
            assert!(line.contains(part), "{part}: {line}");
        }
        Ok(())
    };
    told("a client of xDS", &[&id])?;
    told("what it says of itself", &[&metadata])?;
    let cluster = "clusterid=cluster-7";
    let bytes = "Bearer ".len() + TOKEN.len();
    let token = format!("authorization=<{bytes} bytes>");
    let header = "x-of-xds=<7 bytes>";
    told("the mesh is asked for", &[cluster, &token, header])?;
    let identity = format!("spiffe://{}", principal("client"));
    told(
        "a certificate was issued",
        &[
            &identity,
            "lifetime=7200s",
            cluster,
            &token,
            "x-of-ca=<11 bytes>",
        ],
    )
}

#[test]
fn wrong_values_of_its_variables_end_it_and_are_named() -> Result<()> {
    let stage = Stage::new(Vec::new())?;
    let wrong = [
        ("SECRET_TTL", "soon"),
        ("XDS_ADDRESS", "http://istiod:15010"),
        ("INSTANCE_IP", "node"),
        ("ISTIO_META_CLUSTER_ID", "not a name"),
    ];
    for one in &wrong {
        let agent = stage.ztunnel(&stage.node1, &[*one])?;
        let status = agent.process().wait(SOON)?;
        assert_eq!(status.code(), Some(78), "{one:?}: {status}");
        assert!(agent.log().contains(one.0), "{}", agent.log().tail());
    }
    let agent = stage.ztunnel(&stage.node1, &wrong)?;
    assert_eq!(agent.process().wait(SOON)?.code(), Some(78));
    for (name, _) in &wrong {
        assert!(agent.log().contains(name), "{name}: {}", agent.log().tail());
    }
    Ok(())
}
