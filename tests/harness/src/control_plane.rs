//! A control plane on a node: `culvert dev-control-plane` as a process of its own, which tells one agent the mesh and gives it
//! certificates. Started by `agent` for an agent that wants one; tests make it misbehave, end it and bring it back.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::log::Log;
use crate::mesh::replace_file;
use crate::node::Node;
use crate::process::Proc;

const STARTED: Duration = Duration::from_secs(15);
const ENDED: Duration = Duration::from_secs(10);
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
}

impl ControlPlane {
    /// Starts one in the node's namespace, at a port that is free.
    pub fn start(node: &Node, binary: &Path, mesh_file: &Path, dev_ca: &Path) -> Result<Self> {
        let start = Start {
            node: node.clone(),
            binary: binary.to_owned(),
            mesh_file: mesh_file.to_owned(),
            dev_ca: dev_ca.to_owned(),
            token: node.directory().join("token"),
            behaviour: node.directory().join("behaviour.yaml"),
        };
        std::fs::write(&start.token, TOKEN)
            .with_context(|| format!("writing {}", start.token.display()))?;
        let (process, address, root) = start.at("127.0.0.1:0")?;
        Ok(Self {
            start,
            process,
            address,
            root,
        })
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

    /// Has it do wrong what the text says, in the format of `--behaviour`; nothing if it is empty. It tells in its log when it does.
    pub fn misbehave(&self, text: &str) -> Result<()> {
        replace_file(&self.start.behaviour, text)
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
            .env("RUST_LOG", "debug,h2=info,hyper=info")
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
