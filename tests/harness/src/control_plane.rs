//! A control plane on a node: `culvert dev-control-plane` as a process of its own, which tells agents the mesh and gives them
//! certificates. One may serve all agents of a fabric; tests make it misbehave, end it and bring it back.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::agent::{Agent, field_of};
use crate::log::{Log, Mark};
use crate::mesh::{Mesh, replace_file};
use crate::node::Node;
use crate::process::Proc;

const STARTED: Duration = Duration::from_secs(15);
const ENDED: Duration = Duration::from_secs(10);
const TOLD: Duration = Duration::from_secs(15);
/// What an agent has to show it.
pub const TOKEN: &str = "the-harness";

/// A running control plane. Dropping it kills it.
#[derive(Debug)]
pub struct ControlPlane {
    start: Start,
    process: Proc,
    address: SocketAddr,
    root: PathBuf,
}

/// All that is needed to start it again.
#[derive(Debug)]
struct Start {
    node: Node,
    binary: PathBuf,
    mesh_file: PathBuf,
    dev_ca: PathBuf,
    token: PathBuf,
    behaviour: PathBuf,
    env: Vec<(String, String)>,
}

impl ControlPlane {
    /// Starts one on the node for all agents of its fabric that are started from now on, whose options name neither mesh file nor CA.
    pub fn of_fabric(node: &Node, binary: &Path) -> Result<Self> {
        Self::of_fabric_with(node, binary, Vec::new())
    }

    /// The same, with more environment.
    pub fn of_fabric_with(node: &Node, binary: &Path, env: Vec<(String, String)>) -> Result<Self> {
        let mesh_file = Agent::default_mesh_file(node);
        let dev_ca = Agent::default_dev_ca(node);
        let start = Start::new(node, binary, &mesh_file, &dev_ca, env)?;
        let serving = start.begin(node.address())?;
        let mut told = serving.environment();
        let annotations = Mesh::annotations_file(&mesh_file);
        told.push((
            "CULVERT_ANNOTATIONS_PATH",
            annotations.display().to_string(),
        ));
        ensure!(
            node.inner.control_plane.set(told).is_ok(),
            "the fabric has a control plane already"
        );
        Ok(serving)
    }

    /// Starts one in the node's namespace, for its own loopback device alone, at a port that is free.
    pub fn start(node: &Node, binary: &Path, mesh_file: &Path, dev_ca: &Path) -> Result<Self> {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Start::new(node, binary, mesh_file, dev_ca, Vec::new())?.begin(loopback)
    }

    /// What an agent is told, so that it gets everything from here.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let url = format!("https://{}", self.address);
        let root = self.root.display().to_string();
        vec![
            ("XDS_ADDRESS", url.clone()),
            ("CA_ADDRESS", url),
            ("XDS_ROOT_CA", root.clone()),
            ("CA_ROOT_CA", root),
            ("AUTH_TOKEN", self.start.token.display().to_string()),
        ]
    }

    /// Waits until these agents have accepted or refused all of a mesh file that was written after `mark`.
    pub fn wait_until_told(&self, mark: Mark, nodes: &[&Node]) -> Result<()> {
        let number = |line: &str| field_of(line, "revision")?.parse::<u64>().ok();
        let read = self.log().wait_for(mark, TOLD, "a new mesh", |line| {
            let new = line.text.contains("the mesh file is in effect");
            new.then(|| number(&line.text)).flatten()
        })?;
        for node in nodes {
            let what = format!("that {} has revision {read}", node.name());
            self.log().wait_for(mark, TOLD, &what, |line| {
                let told = line.text.contains("a client has all of the mesh")
                    && field_of(&line.text, "name").as_deref() == Some(node.name())
                    && number(&line.text)? >= read;
                told.then_some(())
            })?;
        }
        Ok(())
    }

    /// Has it do wrong what the text says, in the format of `--behaviour`; nothing if it is empty. It tells in its log when it does.
    pub fn misbehave(&self, text: &str) -> Result<()> {
        replace_file(&self.start.behaviour, text)
    }

    /// The same, and returns once it does so.
    pub fn misbehave_now(&self, text: &str) -> Result<()> {
        let mark = self.log().mark();
        self.misbehave(text)?;
        let told = "another behaviour is in effect";
        self.process.wait_for_line_after(mark, told, TOLD).map(drop)
    }

    /// Has it admit only who shows this token, from now on.
    pub fn expect_token(&self, token: &str) -> Result<()> {
        replace_file(&self.start.token, token)
    }

    /// Has it be of another CA from its next start on: certificates and what it is known by.
    pub fn forget_ca(&self) -> Result<()> {
        let ca = self.start.dev_ca.join("dev-ca.pem");
        std::fs::remove_file(&ca).with_context(|| format!("removing {}", ca.display()))
    }

    /// The file with the root that it is known by.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Ends it.
    pub fn stop(&self, signal: Signal) -> Result<()> {
        self.process.kill(signal)?;
        self.process.wait(ENDED).map(drop)
    }

    /// Ends it, if it still runs, and starts it anew at the same address.
    pub fn restart(&mut self) -> Result<()> {
        self.stop(Signal::SIGTERM)?;
        let (process, address, root) = self.start.at(&self.address.to_string())?;
        self.process = process;
        self.address = address;
        self.root = root;
        Ok(())
    }

    /// Where it listens, in its node's namespace.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has printed.
    pub fn log(&self) -> &Log {
        self.process.log()
    }

    /// Its process.
    pub fn process(&self) -> &Proc {
        &self.process
    }
}

impl Start {
    fn new(
        node: &Node,
        binary: &Path,
        mesh_file: &Path,
        dev_ca: &Path,
        env: Vec<(String, String)>,
    ) -> Result<Self> {
        let token = node.directory().join("token");
        std::fs::write(&token, TOKEN).with_context(|| format!("writing {}", token.display()))?;
        Ok(Self {
            node: node.clone(),
            binary: binary.to_owned(),
            mesh_file: mesh_file.to_owned(),
            dev_ca: dev_ca.to_owned(),
            token,
            behaviour: node.directory().join("behaviour.yaml"),
            env,
        })
    }

    fn begin(self, ip: IpAddr) -> Result<ControlPlane> {
        let (process, address, root) = self.at(&SocketAddr::new(ip, 0).to_string())?;
        Ok(ControlPlane {
            start: self,
            process,
            address,
            root,
        })
    }

    fn at(&self, address: &str) -> Result<(Proc, SocketAddr, PathBuf)> {
        let process = self
            .node
            .command(&self.binary)
            .args(["dev-control-plane", "--listen", address])
            .arg("--mesh")
            .arg(&self.mesh_file)
            .arg("--dev-ca")
            .arg(&self.dev_ca)
            .arg("--token")
            .arg(&self.token)
            .arg("--behaviour")
            .arg(&self.behaviour)
            .env(
                "RUST_LOG",
                "debug,h2=info,hyper=info,tower=info,rustls=info",
            )
            .envs(self.env.clone())
            .spawn()?;
        let event = process.wait_for_event("listening", STARTED)?;
        let text = |key: &str| {
            let value = event.get(key).and_then(serde_json::Value::as_str);
            value.with_context(|| format!("the control plane tells no {key}: {event}"))
        };
        let address = text("address")?
            .parse()
            .with_context(|| format!("reading {event}"))?;
        let root = PathBuf::from(text("root")?);
        Ok((process, address, root))
    }
}
