//! The kernel part's tables, opened where the agent of a node has pinned them.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use aya::maps::{HashMap, Map, MapData};
use culvert_abi::{Claim, Flow, FlowKey, LAYOUT_VERSION};
use culvert_harness::{Agent, Node, wait_until};
use culvert_tests::scene::SOON;

pub fn pinned(node: &Node, name: &str) -> PathBuf {
    node.pin_directory()
        .join(format!("v{LAYOUT_VERSION}/maps/{name}"))
}

/// A table of the agent on `node`, by its name in the object.
pub fn table<K: aya::Pod, V: aya::Pod>(node: &Node, name: &str) -> Result<HashMap<MapData, K, V>> {
    let path = pinned(node, name);
    let data = MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))?;
    Map::HashMap(data)
        .try_into()
        .with_context(|| format!("map {name}"))
}

pub fn claims(node: &Node) -> Result<Vec<(FlowKey, Claim)>> {
    Ok(table(node, "CLAIMS")?.iter().flatten().collect())
}

pub fn flows(node: &Node) -> Result<Vec<(FlowKey, Flow)>> {
    Ok(table(node, "FLOWS")?.iter().flatten().collect())
}

/// Waits for the claim of a connection from `port`, so that what follows happens while it is outstanding.
pub fn wait_for_claim(node: &Node, port: u16) -> Result<Claim> {
    wait_until(SOON, "the claim", || {
        Ok(claims(node)?
            .into_iter()
            .find(|(key, _)| key.client_port == port)
            .map(|(_, claim)| claim))
    })
}

pub fn wait_for_no_claims(node: &Node) -> Result<()> {
    wait_until(SOON, "every claim to be settled", || {
        Ok(claims(node)?.is_empty().then_some(()))
    })
}

/// How often the hooks of the agent's node decided so.
pub fn decisions(agent: &Agent, reason: &str) -> Result<u64> {
    let label = format!("reason=\"{reason}\"");
    Ok(agent.metric("culvert_kernel_decisions_total", &[&label])? as u64)
}
