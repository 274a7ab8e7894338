//! No token, header for the control plane or private key is in anything that is printed, whatever is logged and whatever goes wrong.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use culvert_harness::{
    Agent, Finished, Node, Pod, Workload, control_plane::TOKEN, culvert_binary, log::Stream,
    wait_until,
};
use culvert_tests::scene::{NAMESPACE, SOON, Scene, Setting, answered, echo, serve};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject};

const XDS_HEADER: &str = "the-header-of-the-control-plane";
const CA_HEADER: &str = "the-header-of-the-authority";
/// How a P-256 key begins in PKCS #8, as rcgen and Istio write it: up to the private number.
const P256: [u8; 36] = [
    0x30, 0x81, 0x87, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02,
    0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x04, 0x6d, 0x30, 0x6b, 0x02,
    0x01, 0x01, 0x04, 0x20,
];
/// The same in base64.
const P256_BASE64: &str = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg";

/// What must not be printed, each with a name that may be.
struct Secrets(Vec<(String, String)>);

impl Secrets {
    /// Those of any agent, and of the development CA in this directory: the agents' own keys never leave their memory, so it is what
    /// every such key begins with that is looked for.
    fn with_ca(directory: &Path) -> Result<Self> {
        let mut secrets = Self(Vec::new());
        secrets.add("a private key as PEM", "PRIVATE KEY");
        secrets.add("a private key in base64", P256_BASE64);
        secrets.add_bytes("a private key", &P256);

        let pem = std::fs::read_to_string(directory.join("dev-ca.pem"))?;
        let body = pem.split("PRIVATE KEY-----").nth(1).context("a key")?;
        let lines: Vec<_> = body.lines().map(str::trim).collect();
        for line in lines.iter().filter(|line| line.len() >= 16) {
            secrets.add("a line of the CA's key", line);
        }
        secrets.add("the CA's key in base64", &lines[..lines.len() - 1].concat());
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())?;
        let key = key.secret_pkcs8_der();
        secrets.add_bytes("the CA's key", key);
        let number = key.get(P256.len()..P256.len() + 32).context("a number")?;
        ensure!(key.starts_with(&P256), "the CA's key is of another form");
        secrets.add_bytes("the CA's private number", number);
        Ok(secrets)
    }

    fn add(&mut self, name: &str, secret: &str) {
        self.0.push((name.to_owned(), secret.to_owned()));
    }

    /// In the forms in which programs print bytes.
    fn add_bytes(&mut self, name: &str, bytes: &[u8]) {
        let with = |form: fn(&u8) -> String, between: &str| {
            bytes.iter().map(form).collect::<Vec<_>>().join(between)
        };
        let lower = |byte: &u8| format!("{byte:02x}");
        let upper = |byte: &u8| format!("{byte:02X}");
        let decimal = |byte: &u8| byte.to_string();
        for (form, text) in [
            ("hexadecimal", with(lower, "")),
            ("hexadecimal", with(upper, "")),
            ("hexadecimal with colons", with(lower, ":")),
            ("a list of numbers", with(decimal, ", ")),
            ("escaped bytes", bytes.escape_ascii().to_string()),
        ] {
            self.add(&format!("{name} as {form}"), &text);
        }
    }

    /// The first that is in a text.
    fn found_in(&self, text: &str) -> Option<&str> {
        let found = self.0.iter().find(|(_, secret)| text.contains(secret));
        found.map(|(name, _)| name.as_str())
    }

    #[track_caller]
    fn are_not_in(&self, what: &str, text: &str) {
        assert!(!text.is_empty(), "{what} is empty");
        if let Some(name) = self.found_in(text) {
            panic!("{name} is in {what}");
        }
        // The same search finds each of them in this very text.
        for (name, secret) in &self.0 {
            let middle = text.len() / 2;
            let middle = (0..=middle).rfind(|at| text.is_char_boundary(*at));
            let (before, after) = text.split_at(middle.unwrap_or(0));
            let planted = format!("{before}{secret}{after}");
            assert!(self.found_in(&planted).is_some(), "{name} was not found");
        }
    }

    /// Everything that an agent shows.
    fn are_not_shown_by(&self, agent: &Agent) -> Result<()> {
        let mut shown = vec![
            ("the log", agent.log().text(Stream::Out)),
            ("/config_dump", agent.config_dump()?.body),
            ("/metrics", agent.metrics()?),
            (
                "culvert status --json",
                agent.cli(["status", "--json"])?.success()?,
            ),
            ("culvert status", agent.cli(["status"])?.success()?),
            (
                "culvert pod list --json",
                agent.cli(["pod", "list", "--json"])?.success()?,
            ),
            ("culvert flows --json", flows(agent)?),
        ];
        let errors = agent.log().text(Stream::Err);
        if !errors.is_empty() {
            shown.push(("standard error", errors));
        }
        for (what, text) in &shown {
            self.are_not_in(what, text);
        }
        Ok(())
    }
}

/// What is told of the flows so far.
fn flows(agent: &Agent) -> Result<String> {
    let flows = agent
        .node()
        .command(culvert_binary()?)
        .args(["flows", "--json", "--recent", "100", "--admin-socket"])
        .arg(agent.admin_socket())
        .spawn()?;
    flows.wait_for_line("hbone", SOON)?;
    Ok(flows.log().text(Stream::Out))
}

fn traced(mut setting: Setting) -> Result<Scene> {
    setting.env.push(("RUST_LOG", "trace".to_owned()));
    let scene = Scene::with(setting)?;
    let _server = serve(scene.server_b()?, "echo")?;
    assert!(answered(&echo(&scene.client, scene.server_b()?)?));
    assert!(!answered(&echo(&scene.intruder, scene.server_b()?)?));
    Ok(scene)
}

fn secrets_of(scene: &Scene) -> Result<Secrets> {
    Secrets::with_ca(&scene.node1.shared_directory().join("dev-ca"))
}

#[test]
fn no_key_is_ever_printed_where_the_agent_has_the_development_ca() -> Result<()> {
    let scene = traced(Setting {
        mesh_file: true,
        ..Setting::default()
    })?;
    let secrets = secrets_of(&scene)?;
    for agent in [&scene.agent1, scene.agent2()?] {
        secrets.are_not_shown_by(agent)?;
    }
    Ok(())
}

/// The token itself is in the environment, not a path of it.
fn with_control_plane() -> Result<(Scene, Secrets)> {
    let scene = traced(Setting {
        env: vec![
            ("AUTH_TOKEN", TOKEN.to_owned()),
            ("XDS_HEADER_X-ONE", XDS_HEADER.to_owned()),
            ("CA_HEADER_X-TWO", CA_HEADER.to_owned()),
        ],
        ..Setting::default()
    })?;
    let mut secrets = secrets_of(&scene)?;
    secrets.add("the token", TOKEN);
    secrets.add("a header for the control plane", XDS_HEADER);
    secrets.add("a header for the authority", CA_HEADER);
    Ok((scene, secrets))
}

#[test]
fn no_secret_is_in_anything_that_is_printed() -> Result<()> {
    let (mut scene, secrets) = with_control_plane()?;
    for agent in [&scene.agent1, scene.agent2()?] {
        secrets.are_not_shown_by(agent)?;
    }
    let plane = scene.control_plane()?.log();
    let said = plane.text(Stream::Out) + &plane.text(Stream::Err);
    secrets.are_not_in("the log of the control plane", &said);
    Ok(())
}

/// A request for a certificate fails in each of these ways; its key was made, and the token sent.
#[test]
fn no_secret_is_printed_when_a_request_for_a_certificate_fails() -> Result<()> {
    let (mut scene, secrets) = with_control_plane()?;
    for (number, fault) in ["refuse", "leaf-only", "other-identity", "expired"]
        .into_iter()
        .enumerate()
    {
        scene
            .control_plane()?
            .misbehave_now(&format!("ca: [{fault}]"))?;
        let mark = scene.agent1.log().mark();
        let name = format!("unlucky-{number}");
        let pod: Pod = scene.node1.pod(&name)?;
        scene.change_mesh(|mesh| {
            mesh.workloads
                .push(Workload::of_pod(&pod, NAMESPACE, &name));
        })?;
        scene.agent1.enrol_as(&pod, scene.workload(&pod)?)?;
        let log = scene.agent1.process();
        log.wait_for_line_after(mark, "no certificate; trying again later", SOON)?;
    }
    // And where the control plane refuses the agent itself.
    scene
        .control_plane()?
        .stop(nix::sys::signal::Signal::SIGKILL)?;
    wait_until(SOON, "the loss to be told", || {
        let status = scene.agent1.cli(["status", "--json"])?.success()?;
        Ok(status.contains("lost for").then_some(()))
    })?;
    secrets.are_not_shown_by(&scene.agent1)
}

fn node_with(
    node: &Node,
    file: &str,
    arguments: &[&str],
    env: &[(&str, &str)],
) -> Result<Finished> {
    let path = node.directory().join("config.yaml");
    std::fs::write(&path, file)?;
    let launch = node
        .agent_command(culvert_binary()?)
        .arg("node")
        .arg("--config")
        .arg(&path)
        .env("CULVERT_ADMIN_SOCKET", node.directory().join("admin.sock"))
        .env("CULVERT_CGROUP_ROOT", node.cgroup().path())
        .env("CULVERT_PIN_DIR", node.pin_directory());
    launch.args(arguments).envs(env.iter().copied()).run(SOON)
}

#[test]
fn no_secret_is_in_a_printed_configuration_nor_in_what_is_said_of_a_wrong_one() -> Result<()> {
    const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.dGhlIHNlY3JldA.c2ln";
    let fabric = culvert_harness::Fabric::new()?;
    let node = fabric.node()?;
    let mut secrets = Secrets(Vec::new());
    secrets.add("the token", TOKEN);
    secrets.add("a header for the control plane", XDS_HEADER);
    let broken = format!("{TOKEN}\u{1}");
    let in_file = [
        format!("authToken: {TOKEN}\n"),
        format!("authToken: \"{TOKEN}\\n\"\n"),
        format!("authTokn: {TOKEN}\n"),
        format!("authToken: {TOKEN}: more\n"),
        format!("authToken: [{TOKEN}]\n"),
        format!("authToken: {{token: {TOKEN}}}\n"),
        format!("authToken: \"{TOKEN}\n"),
        format!("authToken: {TOKEN}\nauthToken: {TOKEN}\n"),
        format!("- {TOKEN}\n"),
    ];
    let none = Vec::new();
    let cases = in_file.iter().map(|file| (file.as_str(), none.clone()));
    let in_environment = [
        vec![("AUTH_TOKEN", TOKEN), ("XDS_HEADER_X", XDS_HEADER)],
        vec![("AUTH_TOKEN", TOKEN), ("CULVERT_THREADS", "0")],
        vec![("AUTH_TOKEN", broken.as_str())],
        // Nothing to get a mesh from: it ends after it has begun.
        vec![("AUTH_TOKEN", TOKEN), ("RUST_LOG", "trace")],
    ];
    let cases = cases.chain(in_environment.into_iter().map(|env| ("", env)));
    for (file, env) in cases {
        for arguments in [&["--print-config"][..], &[]] {
            let finished = node_with(&node, file, arguments, &env)?;
            let said = finished.stdout + &finished.stderr;
            let what = format!("the answer to {file:?}, {arguments:?}");
            secrets.are_not_in(&what.replace(TOKEN, "TOKEN"), &said);
        }
    }
    Ok(())
}
