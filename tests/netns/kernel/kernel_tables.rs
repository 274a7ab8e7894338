//! The kernel part's tables, opened where the agent of a node has pinned them.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData, MapError};
use culvert_abi::{Claim, Config, Flow, FlowKey, LAYOUT_VERSION, Pod as PodEntry, Quota};
use culvert_harness::{Agent, Node, Pod, wait_until};
use culvert_tests::scene::SOON;
use nix::errno::Errno;

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

pub fn config(node: &Node) -> Result<Config> {
    let data = MapData::from_pin(pinned(node, "CONFIG"))?;
    let config: Array<_, Config> = Map::Array(data).try_into().context("map CONFIG")?;
    Ok(config.get(&0, 0)?)
}

/// What pods have used up.
pub fn quotas(node: &Node) -> Result<Array<MapData, Quota>> {
    let data = MapData::from_pin(pinned(node, "QUOTAS"))?;
    Map::Array(data).try_into().context("map QUOTAS")
}

/// Where a pod's is.
pub fn quota_of(node: &Node, pod: &Pod) -> Result<u32> {
    let entry = table::<u64, PodEntry>(node, "PODS")?.get(&pod.netns().cookie()?, 0)?;
    Ok(entry.quota)
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

/// A key that belongs to nobody: keys are told apart by the number, and none is one that an agent or a hook would make.
pub fn nobodys_flow(number: u64) -> FlowKey {
    FlowKey {
        netns_cookie: u64::MAX,
        client: [0xfd; 16],
        server: [0xfd; 16],
        client_port: (number >> 16) as u16,
        server_port: number as u16,
        padding: 0,
    }
}

pub fn is_full(error: &MapError) -> bool {
    matches!(error, MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(Errno::E2BIG as i32))
}

/// Fills a table with entries of nobody's until there is room for only so many more; returns their keys.
pub fn fill<K: aya::Pod, V: aya::Pod>(
    node: &Node,
    name: &str,
    room: usize,
    key: impl Fn(u64) -> K,
    value: V,
) -> Result<Vec<K>> {
    let mut table = table::<K, V>(node, name)?;
    let mut keys = Vec::new();
    for key in (1..).map(key) {
        match table.insert(key, value, 0) {
            Ok(()) => keys.push(key),
            Err(error) if is_full(&error) => break,
            Err(error) => return Err(error).with_context(|| format!("filling {name}")),
        }
    }
    for key in keys.drain(keys.len().saturating_sub(room)..) {
        table.remove(&key)?;
    }
    Ok(keys)
}

/// Removes what [`fill`] entered.
pub fn clear<K: aya::Pod, V: aya::Pod>(node: &Node, name: &str, keys: &[K]) -> Result<()> {
    let mut table = table::<K, V>(node, name)?;
    for key in keys {
        table.remove(key)?;
    }
    Ok(())
}

/// How many connections came to the agent, for whatever reason.
pub fn steered(agent: &Agent) -> Result<u64> {
    Ok(agent.metric("culvert_kernel_decisions_total", &["reason=\"steered_"])? as u64)
}
